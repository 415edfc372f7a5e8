"""A mechanism of one's own, from training to a bundle: attention to what is near.

The score of a key is how near it lies to the query, minus half the squared distance. Nothing in `models`, `export` or
`service` knows of it.

    python tests/examples/nearest.py build/nearest.safetensors
    python -m export --module tests/examples/nearest.py:build --checkpoint build/nearest.safetensors \\
        build/bundles --name nearest

Shapes: B rows, T new tokens, S keys, E model width, H heads, D head width, C capacity.
"""

import math
import sys
from collections.abc import Mapping

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from models.attention.functional import allow
from models.attention.heads import Attended, Heads
from models.attention.normalizers import masked_softmax
from models.checkpoint import TokenizerInfo, TrainedModel
from models.decoder import Decoder, DecoderConfig
from models.states import CAPACITY, Chunk, StateRule, StateSpec, append

TEXT = (
    "Tyger Tyger, burning bright, In the forests of the night; What immortal hand or eye, "
    "Could frame thy fearful symmetry? "
)
END = 256


class NearestAttention(Heads):
    """Causal self-attention whose scores are -|query - key|^2 / (2 sqrt(D))."""

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare keys and values, to which each step appends."""
        shape = (self.num_kv_heads, CAPACITY, self.head_dim)
        return tuple(
            StateSpec(name=name, rule=StateRule.APPEND, dtype=torch.float32, shape=shape) for name in ("key", "value")
        )

    def forward(
        self, x: Tensor, chunk: Chunk, past: Mapping[str, Tensor] | None = None, *, need_weights: bool = False
    ) -> Attended:
        """Attend from x (B, T, E), the tokens of `chunk`, to themselves and to the past."""
        query, key, value = self.queries(x), self.keys(x), self.values(x)
        positions, present = chunk.positions, {}
        key_positions, key_valid = positions, chunk.valid
        if past is not None:
            key, value = append(past["key"], key, chunk), append(past["value"], value, chunk)
            present = {"key": key, "value": value}
            key_positions = torch.arange(key.shape[2])[None]  # (1, C)
            key_valid = key_positions < (chunk.start + chunk.lengths)[:, None]
        mask = allow(positions, key_positions, causal=True, key_valid=key_valid)
        squares = query.square().sum(-1, keepdim=True) + key.square().sum(-1)[:, :, None]  # (B, H, T, S)
        scores = (query @ key.mT - squares / 2) / math.sqrt(self.head_dim)
        weights = masked_softmax(scores, mask)
        return Attended(self.merge(weights @ value), weights if need_weights else None, present)


def build() -> TrainedModel:
    """Return a decoder over bytes whose layers attend so, with random weights."""
    torch.manual_seed(0)
    decoder = Decoder(
        DecoderConfig(
            vocab_size=257,
            d_model=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
            d_ff=128,
            max_model_len=256,
            positions="learned",
            norm="rms",
            norm_eps=1e-5,
            activation="swiglu",
            bias="none",
            tie_embeddings=True,
        )
    )
    for layer in decoder.layers:
        layer.attention = NearestAttention(64, 4)
    return TrainedModel(
        module=decoder, tokenizer=_bytes(), source="trained on a poem by William Blake", licence="Apache-2.0"
    )


def _bytes() -> TokenizerInfo:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return TokenizerInfo(
        json=tokenizer.to_str(),
        bos_token_id=None,
        eos_token_ids=(END,),
        pad_token_id=None,
        add_bos=False,
        chat_template=None,
    )


def train(model: TrainedModel, num_steps: int = 150) -> float:
    """Learn the poem by heart and return the last loss, in nats for each byte."""
    tokenizer = Tokenizer.from_str(model.tokenizer.json)
    token_ids = torch.tensor([[*tokenizer.encode(TEXT, add_special_tokens=False).ids, END]])
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=3e-3)
    for _ in range(num_steps):
        logits = model.module(token_ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits[0], token_ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


if __name__ == "__main__":
    trained = build()
    print(f"loss {train(trained):.4f}")
    save_file(trained.module.weights(), sys.argv[1])
