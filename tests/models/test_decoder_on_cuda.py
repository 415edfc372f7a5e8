"""On a CUDA device a decoder computes what it computes on the CPU, to float32 rounding: `make gpu-test`."""

import pytest
import torch

from models.decoder import Decoder, DecoderConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BASE = {
    "vocab_size": 64,
    "d_model": 48,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 96,
    "max_model_len": 64,
    "norm_eps": 1e-5,
    "tie_embeddings": True,
}
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": "none"}
GPT2 = {"positions": "learned", "norm": "layer", "activation": "gelu_tanh", "bias": "all"}


@pytest.mark.parametrize("family", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_logits_in_one_pass_and_token_by_token_are_the_cpus(family):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**BASE, **family)).eval()
    token_ids = torch.randint(BASE["vocab_size"], (3, 20))
    with torch.inference_mode():
        expected = decoder(token_ids)
        decoder, token_ids = decoder.cuda(), token_ids.cuda()
        one_pass = decoder(token_ids)
        state, steps = decoder.initial_state(3), []
        for position in range(token_ids.shape[1]):
            logits, state = decoder(token_ids[:, position : position + 1], state)
            steps.append(logits)
    for actual in (one_pass, torch.cat(steps, dim=1)):
        assert actual.is_cuda
        assert (actual.cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()
