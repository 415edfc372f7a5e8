"""How many texts a second become vectors: `make bench-embeddings`.

256 texts of 3 to 180 words (log-normal), through gRPC one by one, from 32 clients at once, and in one call; beside
sentence-transformers and CTranslate2 in int8 on the same weights in the same run, alternating. Nothing is cached, and
no text occurs twice. A peer that is not installed is left out.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from through_grpc import server
from tokenizers import Tokenizer

from attendant import Client
from export.text import QUALITY
from models.readers.packaged import MINILM

Encode = Callable[[Sequence[str]], object]
CLIENTS = 32


def texts(number: int = 256) -> list[str]:
    """Return different pieces of real text of 3 to 180 words."""
    words, numbers = QUALITY.read_text("utf-8").split(), random.Random(0)
    starts = numbers.sample(range(len(words) - 200), number)
    return [" ".join(words[at : at + min(180, max(3, round(numbers.lognormvariate(3.3, 0.9))))]) for at in starts]


def served(address: str, model: str) -> dict[str, Encode]:
    """Return the ways to ask a server."""
    client = Client(address)

    def one_by_one(batch: Sequence[str]) -> None:
        for text in batch:
            client.embed(text, model=model)

    def many_clients(batch: Sequence[str]) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda text: client.embed(text, model=model), batch))

    return {
        f"{model}, one by one": one_by_one,
        f"{model}, {CLIENTS} clients": many_clients,
        f"{model}, one call": lambda batch: client.embed(list(batch), model=model),
    }


def sentence_transformers(threads: int) -> dict[str, Encode]:
    """Return the ways to use sentence-transformers, if it is installed."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return {}
    import torch

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(MINILM.path()), device="cpu")

    def one_by_one(batch: Sequence[str]) -> None:
        for text in batch:
            model.encode(text, normalize_embeddings=True)

    return {
        "sentence-transformers, one by one": one_by_one,
        "sentence-transformers, one call": lambda batch: model.encode(list(batch), normalize_embeddings=True),
    }


def ctranslate2_int8(threads: int) -> dict[str, Encode]:
    """Return the ways to use CTranslate2 with int8 weights, sorted by length, if it is installed."""
    try:
        import ctranslate2
    except ImportError:
        return {}
    directory = Path(tempfile.mkdtemp()) / "minilm"
    converter = ctranslate2.converters.TransformersConverter(str(MINILM.path()))
    converter.convert(str(directory), quantization="int8")
    encoder = ctranslate2.Encoder(str(directory), compute_type="int8", inter_threads=1, intra_threads=threads)
    tokenizer = Tokenizer.from_file(str(MINILM.path() / "tokenizer.json"))
    tokenizer.no_padding()

    def encode(batch: Sequence[str], size: int = 32) -> list[np.ndarray]:
        ids = sorted((each.ids for each in tokenizer.encode_batch(list(batch))), key=len)
        vectors = []
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            hidden = np.array(encoder.forward_batch(part).last_hidden_state)
            vectors += [row[: len(tokens)].mean(0) for row, tokens in zip(hidden, part, strict=True)]
        return vectors

    def one_by_one(batch: Sequence[str]) -> None:
        for text in batch:
            encode([text])

    return {"CTranslate2 int8, one by one": one_by_one, "CTranslate2 int8, one call": encode}


def main() -> None:
    """Print texts a second, best and median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("build/bundles"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    batch = texts()
    names = ["all-minilm-l6-v2", "all-minilm-l6-v2-int8"]
    with server(given.repository, names, given.threads) as address:
        ways = sentence_transformers(given.threads) | ctranslate2_int8(given.threads)
        for name in names:
            ways |= served(address, name)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for encode in ways.values():
            encode(batch[:40])
        for _ in range(given.rounds):
            for name, encode in ways.items():
                begin = time.perf_counter()
                encode(batch)
                rates[name].append(len(batch) / (time.perf_counter() - begin))
    print(f"{len(batch)} texts, texts/s: best (median) of {given.rounds} rounds, {given.threads} threads\n")
    for name, values in rates.items():
        print(f"  {name:<40}{max(values):6.0f} ({statistics.median(values):.0f})")


if __name__ == "__main__":
    main()
