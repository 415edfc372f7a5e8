"""Embedding through a real server, against PyTorch."""

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from attendant import Client
from attendant.v1 import embedding_pb2 as pb
from attendant.v1 import generation_pb2
from export.text import QUALITY

MODELS = ("encoder-fp32", "encoder-int8")


@pytest.fixture(scope="module")
def server(module_start, encoder_repository):
    return module_start(repository=encoder_repository).wait_ready()


@pytest.fixture(scope="module")
def client(server):
    with Client(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Forty texts of 1 to 120 words."""
    words, numbers = QUALITY.read_text("utf-8").split(), random.Random(0)
    starts = [numbers.randrange(5000) for _ in range(40)]
    return [" ".join(words[start : start + min(120, max(1, int(numbers.lognormvariate(3, 1))))]) for start in starts]


def expected(tiny_encoder, text: str, pooling: str = "mean", *, normalize: bool = True) -> np.ndarray:
    ids = Tokenizer.from_str(tiny_encoder.tokenizer.json).encode(text).ids
    with torch.no_grad():
        hidden = tiny_encoder.module(torch.tensor([ids]))[0]
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "last": hidden[-1]}[pooling]
    return (pooled / pooled.norm() if normalize else pooled).numpy()


def test_vectors_are_those_of_pytorch(client, tiny_encoder, texts):
    found = client.embed(texts, model="encoder-fp32")
    assert found.model == "encoder-fp32/1"
    for text, vector in zip(texts, found, strict=True):
        assert np.abs(np.array(vector) - expected(tiny_encoder, text)).max() < 1e-6


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_scaling_are_the_callers_choice(client, tiny_encoder, texts, pooling, normalize):
    found = client.embed(texts[:3], model="encoder-fp32", pooling=pooling, normalize=normalize)
    for text, vector in zip(texts, found, strict=False):
        wanted = expected(tiny_encoder, text, pooling, normalize=normalize)
        assert np.abs(np.array(vector) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_fewer_dimensions_are_scaled_to_unit_length_too(client, tiny_encoder, texts):
    (vector,) = client.embed(texts[0], model="encoder-fp32", dimensions=8)
    wanted = expected(tiny_encoder, texts[0])[:8]
    assert np.abs(np.array(vector) - wanted / np.linalg.norm(wanted)).max() < 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_bits_are_the_same_alone_and_among_the_texts_of_many_clients(client, texts, model):
    alone = [client.embed(text, model=model)[0] for text in texts]

    def shuffled(seed: int) -> list[tuple[float, ...]]:
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        found = client.embed([texts[index] for index in order], model=model)
        return [found[order.index(index)] for index in range(len(texts))]

    with ThreadPoolExecutor(8) as pool:
        for together in pool.map(shuffled, range(8)):
            assert together == alone


def test_a_text_that_is_too_long_is_refused_or_cut_but_never_silently(client, server, refusal_of):
    long = "the " * 400
    refusal = refusal_of(lambda: call(server, inputs=[pb.EmbedInput(text="a"), pb.EmbedInput(text=long)]))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert "inputs[1] has" in refusal.message and "288" in refusal.message
    cut = client.embed([long, "a"], model="encoder-fp32", truncate=True)
    assert [(each.tokens, each.truncated) for each in cut.embeddings] == [(288, True), (3, False)]
    tokens = client.tokenize(long, model="encoder-fp32").token_ids
    whole = client.embed([[*tokens[:287], tokens[-1]]], model="encoder-fp32")
    assert whole[0] == cut[0], "the special token at the end is kept"


def call(server, model: str = "encoder-fp32", **fields: object) -> pb.EmbedResponse:
    return server.inference.Embed(pb.EmbedRequest(model=model, **fields), timeout=30)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "inputs is '0 inputs': 1 to 256 are needed"),
        ({"inputs": [pb.EmbedInput(text="a")] * 257}, "inputs is '257 inputs'"),
        ({"inputs": [pb.EmbedInput()]}, "inputs[0].input is None"),
        ({"inputs": [pb.EmbedInput(text="")]}, "inputs[0].text is ''"),
        ({"inputs": [pb.EmbedInput(token_ids=generation_pb2.TokenIds())]}, "inputs[0].token_ids.ids is []"),
        (
            {"inputs": [pb.EmbedInput(token_ids=generation_pb2.TokenIds(ids=[1, 10**6]))]},
            "inputs[0].token_ids.ids[1] is 1000000: token ids go from 0 to",
        ),
        ({"inputs": [pb.EmbedInput(text="a")], "dimensions": 0}, "dimensions is 0: must be in [1, 48]"),
        ({"inputs": [pb.EmbedInput(text="a")], "dimensions": 49}, "dimensions is 49: must be in [1, 48]"),
        ({"inputs": [pb.EmbedInput(text="a")], "pooling": 9}, "pooling is 9: must be one of mean, cls, max, last"),
        ({"inputs": [pb.EmbedInput(text="word " * 60_000)]}, "at most 262144 bytes of text"),
    ],
)
def test_bad_input_is_named_with_its_limit(server, refusal_of, fields, message):
    refusal = refusal_of(lambda: call(server, **fields))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in refusal.message


def test_a_model_is_not_asked_for_what_it_cannot_do(server, refusal_of):
    request = generation_pb2.GenerateRequest(model="encoder-fp32", prompt="hello")
    refusal = refusal_of(lambda: list(server.inference.Generate(request, timeout=30)))
    assert refusal.code is grpc.StatusCode.UNIMPLEMENTED
    assert "does not generate text; its tasks: embed" in refusal.message


def test_metrics_tell_lengths_padding_and_outcomes(module_start, encoder_repository, texts):
    server = module_start("--models", "encoder-fp32", repository=encoder_repository).wait_ready()
    with Client(f"127.0.0.1:{server.port}") as client:
        found = client.embed(texts, model="encoder-fp32")
    model = {"model": "encoder-fp32/1"}
    assert server.value("attendant_requests_finished_total", reason="complete", **model) == 1
    assert server.value("attendant_request_duration_seconds_count", task="embed", **model) == len(texts)
    short = sum(each.tokens <= 64 for each in found.embeddings)
    assert server.value("attendant_request_duration_seconds_count", seq_bucket="64", **model) == short
    real = server.value("attendant_batch_tokens_total", kind="real", **model)
    padding = server.value("attendant_batch_tokens_total", kind="padding", **model)
    assert real == found.usage.prompt_tokens
    assert padding <= 0.1 * (real + padding)
    assert server.value("attendant_step_seconds_count", phase="encode", **model) >= 1
    assert server.value("attendant_requests_total", code="OK", task="embed", **model) == 1


def test_a_client_that_hangs_up_is_counted_and_harms_nobody(server, client, texts, eventually):
    before = server.value("attendant_requests_finished_total", reason="cancelled")
    words = " ".join(texts).split()
    request = pb.EmbedRequest(
        model="encoder-fp32", inputs=[pb.EmbedInput(text=" ".join(words[:100])) for _ in range(256)]
    )
    call = server.inference.Embed.future(request)
    eventually(lambda: server.value("attendant_requests_running") + server.value("attendant_requests_waiting") > 0)
    call.cancel()
    eventually(lambda: server.value("attendant_requests_finished_total", reason="cancelled") > before)
    eventually(lambda: server.value("attendant_requests_waiting") == 0)
    assert len(client.embed(texts, model="encoder-fp32")) == len(texts)


@pytest.mark.parametrize("model", MODELS)
def test_other_weights_under_a_valid_hash_are_found_by_the_golden_run(
    module_start, encoder_repository, tmp_path: Path, model
):
    shutil.copytree(encoder_repository, tmp_path / "repository")
    bundle = tmp_path / "repository" / model / "1"
    golden = dict(np.load(bundle / "golden.npz"))
    golden["hidden"] = golden["hidden"] + 0.01
    np.savez(bundle / "golden.npz", **golden)
    rehash(bundle)
    server = module_start(repository=tmp_path / "repository").wait_ready()
    refused = next(line for line in server.lines if line.startswith("REFUSED"))
    assert refused.startswith(f"REFUSED {model}/1: golden replay: ")
    assert server.status_of(f"model/{model}") == "NOT_SERVING"


def rehash(bundle: Path) -> None:
    from attendant.bundle import file_sha256

    manifest = json.loads((bundle / "manifest.json").read_text())
    for entry in manifest["files"]:
        path = bundle / entry["name"]
        entry |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_a_drained_server_finishes_what_it_has_begun(module_start, encoder_repository, texts):
    server = module_start(repository=encoder_repository).wait_ready()
    inputs = [pb.EmbedInput(text=text) for text in texts * 4]
    running = server.inference.Embed.future(pb.EmbedRequest(model="encoder-fp32", inputs=inputs))
    while not server.value("attendant_requests_waiting") + server.value("attendant_requests_running"):
        if running.done():
            break
    server.signal()
    assert len(running.result(timeout=30).embeddings) == len(inputs)
    assert server.wait() == 0
