"""Small random decoders of every family, each exported once for all tests of this room."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from export.bundle import CPU_PRECISIONS, Target, export_bundle
from models.checkpoint import TokenizerInfo, TrainedModel
from models.decoder import Decoder
from models.decoder_config import DecoderConfig

LLAMA = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "positions": "rotary",
    "norm": "rms",
    "activation": "swiglu",
    "bias": "none",
    "tie_embeddings": True,
}
GPT2 = {
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "d_ff": 60,  # no multiple of 8: a smaller mixing block
    "positions": "learned",
    "norm": "layer",
    "activation": "gelu_tanh",
    "bias": "all",
    "tie_embeddings": True,
}
MIXTURE = {
    "num_heads": 6,
    "num_kv_heads": 2,
    "positions": "sinusoidal",
    "norm": "layer",
    "activation": "relu",
    "bias": "qkv",
    "tie_embeddings": False,
}
FAMILIES = {"llama": LLAMA, "llama-interleaved": LLAMA | {"rope_interleaved": True}, "gpt2": GPT2, "mixture": MIXTURE}


def small_model(**choices: object) -> TrainedModel:
    """A decoder over bytes with weights far from their initial symmetry, so that nothing cancels."""
    sizes = {"vocab_size": 256, "d_model": 32, "num_layers": 2, "head_dim": 16, "d_ff": 64, "max_model_len": 96}
    torch.manual_seed(7)
    decoder = Decoder(DecoderConfig(**(sizes | {"norm_eps": 1e-5} | choices))).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return TrainedModel(
        module=decoder,
        tokenizer=TokenizerInfo(
            json=tokenizer.to_str(),
            bos_token_id=None,
            eos_token_ids=(0,),
            pad_token_id=None,
            add_bos=False,
            chat_template=None,
        ),
        source="random weights",
        licence="Apache-2.0",
        recipe="none",
        data="none",
    )


@dataclass(frozen=True)
class Exported:
    """A model and the directory of its bundle."""

    model: TrainedModel
    directory: Path


@pytest.fixture(scope="session")
def llama() -> TrainedModel:
    return small_model(**LLAMA)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TrainedModel:
    return small_model(**FAMILIES[request.param])


@pytest.fixture(scope="session")
def exported(family: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """The bundles of one family, by precision."""
    repository = tmp_path_factory.mktemp("bundles")
    bundles = {}
    for precision in CPU_PRECISIONS:
        target = Target(repository=repository, name=precision, version=3)
        export_bundle(family, target, precision=precision, report=lambda line: None)
        bundles[precision] = Exported(family, target.directory)
    return bundles
