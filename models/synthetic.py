"""Decoders with the shapes of well-known ones and random weights, to see what a size costs where no checkpoint is.

What they write means nothing. Weights are drawn in the type that is asked for, one tensor at a time, so that a large
decoder needs no more memory than its weights. Text is bytes: of any vocabulary the first 256 tokens are the bytes, and
a token i beyond stands for the text " t<i>", which is written but never read.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from models.checkpoint import TokenizerInfo, TrainedModel
from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.model import initialise

SEED = 1


def _llama(
    *, d_model: int, num_layers: int, num_heads: int, num_kv_heads: int, d_ff: int, vocab_size: int, max_model_len: int
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=d_model // num_heads,
        d_ff=d_ff,
        max_model_len=max_model_len,
        positions="rotary",
        rope_theta=500_000.0,
        norm="rms",
        norm_eps=1e-5,
        activation="swiglu",
        bias="none",
        tie_embeddings=False,
    )


SHAPES = {
    "llama-tiny": _llama(
        d_model=256, num_layers=4, num_heads=4, num_kv_heads=2, d_ff=704, vocab_size=2048, max_model_len=2048
    ),
    "llama-1.3b": _llama(
        d_model=2048, num_layers=24, num_heads=16, num_kv_heads=8, d_ff=5504, vocab_size=32_000, max_model_len=16_384
    ),
    "llama-7b": _llama(
        d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, d_ff=11_008, vocab_size=32_000, max_model_len=16_384
    ),
}


def draw(name: str, dtype: torch.dtype = torch.float32) -> TrainedModel:
    """Return the decoder of a shape, the same for the same name and type; generation ends only at its limits."""
    config = SHAPES[name]
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(dtype).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        initialise(decoder, config.num_layers)
    return TrainedModel(
        module=decoder.requires_grad_(False).eval(),
        tokenizer=TokenizerInfo(
            json=_tokenizer(config.vocab_size).to_str(),
            bos_token_id=None,
            eos_token_ids=(),
            pad_token_id=None,
            add_bos=False,
            chat_template=None,
        ),
        source=f"random weights of the shape {name}, seed {SEED}",
        licence="Apache-2.0",
        synthetic=True,
    )


def _tokenizer(vocab_size: int) -> Tokenizer:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    # "Ġ" is how byte-level vocabularies spell a space.
    symbols += [f"Ġt{token}" for token in range(len(symbols), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: token for token, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
