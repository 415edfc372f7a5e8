"""SmolLM2 through `Generate` against Hugging Face transformers, which reads the same GGUF file by its own code."""

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attendant import Client
from export.text import QUALITY
from models.readers.packaged import SMOLLM2

pytestmark = pytest.mark.smollm2

MODEL = "smollm2-135m-fp32"
PROMPT_LENGTHS = (5, 6, 8, 11, 15, 20, 27, 36, 48, 64, 85, 110, 140, 180, 230, 290, 350, 430, 510, 600)
NEW_TOKENS = 16
MARGIN = 1e-3


@pytest.fixture(scope="module")
def address(smollm2_repository: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "service", "--repository", str(smollm2_repository), "--host", "127.0.0.1"]
    command += ["--port", "0", "--metrics-port", "0", "--models", MODEL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = 0
        for line in process.stdout:
            if found := re.search(r"gRPC on port (\d+)", line):
                port = int(found[1])
            if line.startswith("READY"):
                break
        yield f"127.0.0.1:{port}"
        process.terminate()
        process.stdout.read()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = SMOLLM2.path()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its own dependencies
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def test_greedy_tokens_are_those_of_transformers_for_20_prompts(address: str, reference: torch.nn.Module) -> None:
    text = QUALITY.read_text("utf-8")
    compared = 0
    with Client(address) as client:
        tokens = client.tokenize(text[:20_000], model=MODEL).token_ids
        for number, length in enumerate(PROMPT_LENGTHS):
            prompt = list(tokens[100 * number : 100 * number + length])
            answer = client.generate(
                token_ids=prompt, model=MODEL, temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True
            ).result()
            assert len(answer.token_ids) == NEW_TOKENS
            with torch.inference_mode():
                whole = torch.tensor([prompt + list(answer.token_ids)])
                logits = reference(whole, logits_to_keep=NEW_TOKENS + 1).logits[0, :-1]
            best = logits.topk(2).values
            for position, token_id in enumerate(answer.token_ids):
                if best[position, 0] - best[position, 1] > MARGIN:
                    compared += 1
                    assert token_id == int(logits[position].argmax()), (length, position)
    assert compared > 0.98 * len(PROMPT_LENGTHS) * NEW_TOKENS
