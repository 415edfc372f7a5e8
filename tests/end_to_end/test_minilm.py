"""The real all-MiniLM-L6-v2 behind the real server, against transformers' own reading of the same weights."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from attendant import Client
from export.text import QUALITY
from models.readers.packaged import MINILM

pytestmark = pytest.mark.smollm2

FP32, INT8 = "all-minilm-l6-v2", "all-minilm-l6-v2-int8"


@pytest.fixture(scope="module")
def client(module_start, smollm2_repository):
    server = module_start("--models", f"{FP32},{INT8}", repository=smollm2_repository).wait_ready()
    with Client(f"127.0.0.1:{server.port}") as client:
        yield client


def sentences(number: int) -> list[str]:
    """Return sentences of real text, of 3 to 60 words."""
    text = " ".join(QUALITY.read_text("utf-8").split())
    found = [sentence.strip() for sentence in text.replace("?", ".").replace("!", ".").split(".")]
    return [sentence for sentence in found if 3 <= len(sentence.split()) <= 60][:number]


@torch.no_grad()
def reference(texts: list[str]) -> np.ndarray:
    """Mean vectors of unit length, as sentence-transformers makes them."""
    model, tokenizer = BertModel.from_pretrained(MINILM.path()).eval(), AutoTokenizer.from_pretrained(MINILM.path())
    vectors = []
    for start in range(0, len(texts), 32):
        batch = tokenizer(texts[start : start + 32], padding=True, return_tensors="pt")
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        vectors.append(torch.nn.functional.normalize(mean, dim=1))
    return torch.cat(vectors).numpy()


def served(client: Client, texts: list[str], model: str) -> np.ndarray:
    found = [
        vector
        for start in range(0, len(texts), 200)
        for vector in client.embed(texts[start : start + 200], model=model)
    ]
    return np.array(found)


@pytest.mark.parametrize("number", [64, pytest.param(1000, marks=pytest.mark.slow)])
def test_vectors_are_those_of_transformers_and_int8_points_the_same_way(client, number):
    texts = sentences(number)
    assert len(texts) == number
    expected = reference(texts)
    assert (served(client, texts, FP32) * expected).sum(1).min() >= 0.99999
    assert (served(client, texts, INT8) * expected).sum(1).mean() >= 0.999


def test_like_sentences_are_near(client):
    first, second, third = client.embed(
        ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply today."], model=FP32
    )
    assert np.dot(first, second) == pytest.approx(0.689, abs=1e-3)
    assert np.dot(first, third) == pytest.approx(0.004, abs=1e-3)
