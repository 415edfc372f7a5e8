"""Everything that `make serve` offers is served, and answers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from attendant import Client
from models.examples import PICTURES, picture, png

ROOT = Path(__file__).parents[2]
OFFERED = {
    "all-minilm-l6-v2": "embed",
    "all-minilm-l6-v2-int8": "embed",
    "caption-digits": "generate",
    "dates-bahdanau": "generate",
    "dates-luong": "generate",
    "g2p": "generate",
    "hard-digits": "classify",
    "lm-performer": "generate",
    "lm-window": "generate",
    "mlm": "fill_mask",
    "smollm2-135m": "generate",
    "smollm2-135m-fp32": "generate",
    "vit-digits": "classify",
}


@pytest.fixture(scope="module")
def client(module_start, smollm2_repository):
    server = module_start("--kv-memory", "4GiB", "--models", ",".join(OFFERED), repository=smollm2_repository)
    with Client(f"127.0.0.1:{server.wait_ready().port}") as client:
        yield client


def drawn(kind: str, index: int) -> bytes:
    return png(picture(index, *PICTURES[kind]))


def test_every_bundle_is_ready_for_its_task(client):
    found = {model.name: model for model in client.models()}
    assert {name: model.state for name, model in found.items()} == dict.fromkeys(OFFERED, "ready")
    assert all(task in found[name].tasks for name, task in OFFERED.items())
    assert found["caption-digits"].image_shape == (1, 16, 16) and found["caption-digits"].reads == "image"
    assert (found["g2p"].max_source_len, found["g2p"].reads) == (64, "text")
    assert found["vit-digits"].labels[4] == "four" and found["lm-window"].labels == ()


@pytest.mark.parametrize("name", [name for name, task in OFFERED.items() if task == "generate"])
def test_every_generating_bundle_writes(client, name):
    given = {
        "g2p": "attention",
        "dates-bahdanau": "May the 3rd, 1998",
        "dates-luong": "3/5/98",
    }
    options = {"temperature": 0.0, "max_tokens": 12, "model": name}
    if name == "caption-digits":
        answer = client.generate(image=drawn("scene", 1), **options).result()
        assert re.search("zero|one|two|three|four|five|six|seven|eight|nine", answer.text)
    else:
        answer = client.generate(given.get(name, "The state of the union"), **options).result()
        assert answer.text.strip()
    assert answer.started.model == f"{name}/1"


def test_digits_are_read_by_both_ways_of_looking(client):
    (plain,) = client.classify(drawn("digit", 0), model="vit-digits", top_k=1)
    (found,) = client.classify(drawn("clutter", 0), model="hard-digits", top_k=1)
    assert plain.classes[0].probability > 0.5 and found.classes[0].probability > 0.5


def test_gaps_are_filled_and_texts_are_compared(client):
    (text,) = client.fill_mask("The Const<|mask|>tution", model="mlm", top_k=1)
    assert text.masks[0].candidates[0].token == "i"
    for name in ("all-minilm-l6-v2", "all-minilm-l6-v2-int8"):
        one, other, third = client.embed(["A man eats.", "Somebody has a meal.", "It rains."], model=name)
        assert sum(a * b for a, b in zip(one, other, strict=True)) > sum(a * b for a, b in zip(one, third, strict=True))


def test_a_mechanism_of_ones_own_is_served_as_the_readme_says(module_start, tmp_path):
    """The example is trained, exported and served by the commands of the README."""
    weights = tmp_path / "nearest.safetensors"
    example = ROOT / "tests" / "examples" / "nearest.py"
    for command in (
        [str(example), str(weights)],
        [
            "-m",
            "export",
            "--module",
            f"{example}:build",
            "--checkpoint",
            str(weights),
            str(tmp_path),
            "--name",
            "nearest",
        ],
    ):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    server = module_start(repository=tmp_path).wait_ready()
    with Client(f"127.0.0.1:{server.port}") as client:
        answer = client.generate("Tyger Tyger,", model="nearest", temperature=0.0).result()
        assert answer.text.startswith(" burning bright, In the forests of the night;")
        sheet = client.explain("Tyger", model="nearest")
        assert [len(layer.heads) for layer in sheet.layers] == [4, 4]
