"""Hugging Face transformers in a worker: static cache, compiled decode step; and what the device can do at most.

Keys and values of the past are random numbers, written straight into the cache: attention takes as long over them.
Tokens come to the host in every step, as they must where somebody waits for them.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu_cells import Shape, capacity_for
from gpu_worker import answer, spread
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WARM_UP = 5  # compiling, warming up, recording, and replays


class Side:
    """One model on one device, of random weights."""

    def load(
        self, *, shape: dict[str, Any], precision: str, device: str, context: int, steps: int, compiled: bool
    ) -> None:
        """Build the model with its weights where they are used."""
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        self._shape, self._dtype, self._device = Shape(**shape), DTYPES[precision], torch.device(device)
        self._capacity = capacity_for(context, steps)
        self._config = llama_config(self._shape, self._capacity)
        torch.set_default_dtype(self._dtype)
        with self._device:
            self._model = LlamaForCausalLM(self._config).eval()
        torch.set_default_dtype(torch.float32)
        self._step = self._greedy
        if compiled:
            self._step = torch.compile(self._greedy, mode="reduce-overhead")
        self._cache: tuple[int, StaticCache] | None = None

    def decode(self, *, rows: int, context: int, steps: int) -> dict[str, Any]:
        """Return the seconds of decode steps around a context."""
        if self._cache is None or self._cache[0] != rows:
            self._cache = None  # before the next one is made
            self._cache = rows, self._filled(rows)
            self._times(rows, self._cache[1], context, WARM_UP)
        return {"step": spread(self._times(rows, self._cache[1], max(2, context - steps // 2), steps))}

    def prefill(self, *, tokens: int) -> dict[str, Any]:
        """Return the seconds from a prompt to its first token."""
        prompt = torch.randint(3, self._shape.vocab_size, (1, tokens), device=self._device)
        cache = StaticCache(config=self._config, max_cache_len=self._capacity)
        self._wait()
        started = time.perf_counter()
        logits = self._model(prompt, past_key_values=cache, logits_to_keep=1).logits
        int(logits[0, -1].argmax())
        return {"first_token": time.perf_counter() - started}

    def ceilings(self, *, copied_bytes: int, matrix: int) -> dict[str, float]:
        """Measure a copy, counting what is read and what is written, and a matrix product of random numbers."""
        source = torch.empty(copied_bytes, dtype=torch.uint8, device=self._device).random_()
        target = torch.empty_like(source)
        copy = self._best(lambda: target.copy_(source))
        a, b = (torch.randn(matrix, matrix, device=self._device).to(self._dtype) for _ in range(2))
        product = self._best(lambda: torch.matmul(a, b))
        return {"bandwidth": 2 * copied_bytes / copy, "matrix_peak": 2 * matrix**3 / product}

    def _greedy(self, tokens: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        return self._model(tokens, past_key_values=cache).logits[:, -1].argmax(dim=-1, keepdim=True)

    def _times(self, rows: int, cache: StaticCache, start: int, steps: int) -> list[float]:
        """Return the seconds of steps from a position on; each ends with its tokens in the host's memory."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(start)
        tokens = torch.ones((rows, 1), dtype=torch.int64, device=self._device)
        seconds = []
        for _ in range(steps):
            self._wait()
            started = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()
            tokens = self._step(tokens, cache).clone()  # the next replay overwrites what this one returned
            tokens.cpu()
            seconds.append(time.perf_counter() - started)
        return seconds

    def _filled(self, rows: int) -> StaticCache:
        cache = StaticCache(config=self._config, max_cache_len=self._capacity)
        cache.early_initialization(rows, self._shape.num_kv_heads, self._shape.head_dim, self._dtype, self._device)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        return cache

    def _best(self, work: Callable[[], object], repeats: int = 20) -> float:
        seconds = []
        for _ in range(repeats):
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def llama_config(shape: Shape, positions: int) -> LlamaConfig:
    """Return what transformers calls a shape."""
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
    )


if __name__ == "__main__":
    side = Side()
    answer({"load": side.load, "decode": side.decode, "prefill": side.prefill, "ceilings": side.ceilings})
