"""Linear attention: a kernel of feature maps in place of the softmax, so that a sequence is remembered as sums.

Out_i = phi(q_i) . sum_j phi(k_j) v_j^T / phi(q_i) . sum_j phi(k_j), over j <= i if causal. The values carry a further
column of ones, so that numerator and denominator are one product and the state is one tensor.

Shapes: B rows, H query heads, K key/value heads (H = K * G), T tokens, N chunks of L tokens, D head width, F features.
Sources: Katharopoulos et al., Transformers are RNNs, 2020, arXiv:2006.16236 (ELU + 1); Choromanski et al., Rethinking
Attention with Performers, 2020, arXiv:2009.14794 (FAVOR+).
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.heads import Attended, Heads, refuse_global
from models.attention.positions import Rotary
from models.states import Chunk, StateRule, StateSpec

Features = Literal["favor", "elu"]
CHUNK = 128  # tokens whose attention to each other is computed densely
BOUND = 40.0
"""Features lie in [exp(-BOUND), exp(BOUND)]: products and long sums of them neither vanish nor overflow in float32."""


def orthogonal_projection(num_features: int, head_dim: int) -> Tensor:
    """Draw the projection of FAVOR+: float32 (F, D), orthogonal in blocks of D rows, rows as long as Gaussian ones."""
    blocks = -(-num_features // head_dim)
    gaussian = torch.randn(blocks, head_dim, head_dim, dtype=torch.float64)
    directions = torch.linalg.qr(gaussian).Q.mT.reshape(-1, head_dim)[:num_features]
    lengths = torch.randn(num_features, head_dim, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return (directions * lengths).float()


def favor_features(x: Tensor, projection: Tensor, *, is_query: bool) -> Tensor:
    """Return the positive features of FAVOR+ of x (..., T, D): (..., T, F), float32 unless x is float64.

    The product of two keys' features estimates exp(x . y / sqrt(D)), with a relative variance near
    exp(|x + y|^2 / sqrt(D)) / F: good for short vectors only. A query is scaled by its largest feature, which cancels
    in the quotient. Keys are not: a scale that looks at other keys looks at later ones too.
    """
    x = _wide(x)
    width = x.shape[-1]
    exponents = x @ (projection.to(x.dtype) * width**-0.25).mT
    if is_query:  # |x|^2 is the same for all of a query's features, so it goes with the largest of them
        exponents -= exponents.detach().amax(-1, keepdim=True)
    else:
        exponents -= (x.square().sum(-1, keepdim=True) / math.sqrt(width) + math.log(len(projection))) / 2
    return exponents.clamp_(-BOUND, BOUND).exp_()  # in place: there are F / D times as many of these as of x


def elu_features(x: Tensor) -> Tensor:
    """Return ELU(x) + 1 of x of any shape, float32 unless x is float64; written as exp(x) below 0, where it is tiny."""
    x = _wide(x)
    return torch.where(x > 0, x + 1.0, x.clamp(-BOUND, 0.0).exp())


def linear_attend(
    query: Tensor, key: Tensor, value: Tensor, sums: Tensor | None = None, *, causal: bool, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Attend by features; return the output (B, H, T, V) and the sums after all T tokens.

    Where no key can be seen the output is zero.

    Args:
        query: features (B, H, T, F), none negative.
        key: features (B, K, T, F); those of padding are zero.
        value: (B, K, T, V).
        sums: (B, K, F, V + 1), what came before; None is nothing. The last column sums the features alone.
        causal: a token sees itself and what precedes it, `sums` included; otherwise all tokens and `sums`.
        chunk: tokens whose attention to each other is computed densely.
    """
    rows, num_heads, num_tokens, num_features = query.shape
    num_kv_heads = key.shape[1]
    value = F.pad(value.to(query.dtype), (0, 1), value=1.0)
    if sums is None:
        sums = query.new_zeros(rows, num_kv_heads, num_features, value.shape[-1])
    if not causal:
        sums = sums + key.mT @ value
        output = query.reshape(rows, num_kv_heads, -1, num_features) @ sums  # the G heads of a key/value head as one
    elif num_tokens <= chunk:
        queries = query.reshape(rows, num_kv_heads, -1, num_features)  # (B, K, G * T, F)
        scores = (queries @ key.mT).unflatten(2, (num_heads // num_kv_heads, num_tokens)).tril().flatten(2, 3)
        output = scores @ value + queries @ sums
        sums = sums + key.mT @ value
    else:
        padding, cut = (0, 0, 0, -num_tokens % chunk), (-1, chunk)
        queries = F.pad(query, padding).unflatten(2, cut).unflatten(1, (num_kv_heads, -1))  # (B, K, G, N, L, F)
        queries = queries.transpose(2, 3).flatten(3, 4)  # (B, K, N, G * L, F)
        keys, values = F.pad(key, padding).unflatten(2, cut), F.pad(value, padding).unflatten(2, cut)
        # Summed from the left, not as all but what follows: by no rounding may a later token reach an earlier one.
        prefixes = torch.cat((sums[:, :, None], keys.mT @ values), 2).cumsum(2)  # (B, K, 1 + N, F, V + 1)
        scores = (queries @ keys.mT).unflatten(3, cut).tril().flatten(3, 4)
        output = scores @ values + queries @ prefixes[:, :, :-1]
        output = output.unflatten(3, cut).transpose(2, 3).flatten(3, 4)[..., :num_tokens, :]
        sums = prefixes[:, :, -1]
    output = output.reshape(rows, num_heads, num_tokens, value.shape[-1])
    weight = output[..., -1:]
    return output[..., :-1] / weight.masked_fill(weight == 0.0, 1.0), sums


def _wide(x: Tensor) -> Tensor:
    """Return x in the type that features are computed in: half precision loses most of them."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LinearAttention(Heads):
    """Multi-head self-attention whose cost is linear in the length, and whose state does not grow.

    There are no weights to return: no score is ever computed for a pair of tokens. The random directions of FAVOR+ are
    drawn once and stay: drawing them anew would make every live state meaningless, and a run of training irreproducible
    from its weights. Its estimate of the softmax is good for short queries and keys only, so train with it, do not put
    it into a model that was trained with softmax; `qk_norm` keeps them short.

    Args:
        d_model: width of input and output.
        num_heads: query heads.
        features: "favor" approximates the softmax of small queries and keys; "elu" is a kernel of its own.
        num_features: features of FAVOR+ for each head; ELU + 1 has as many as the head is wide.
        causal: a token sees itself and what precedes it; required for a past.
        rotary: rotates queries and keys, before the feature map.
        projections: the arguments of `Heads`.

    Raises:
        ValueError: sizes do not fit, or the features are unknown.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        features: Features = "favor",
        num_features: int = 256,
        causal: bool = False,
        rotary: Rotary | None = None,
        **projections: object,
    ):
        super().__init__(d_model, num_heads, **projections)
        if features not in get_args(Features):
            raise ValueError(f"features is {features!r}; it must be one of {', '.join(get_args(Features))}")
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}; it must be at least 1")
        self.causal = causal
        self.rotary = rotary
        self.num_features = num_features if features == "favor" else self.head_dim
        # Kept with the weights: they were trained with these directions and fit no others.
        projection = orthogonal_projection(num_features, self.head_dim) if features == "favor" else None
        self.projection = None if projection is None else nn.Buffer(projection)

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare the running sums, if causal; never in half precision, which loses small features."""
        if not self.causal:
            return ()
        shape = (self.num_kv_heads, self.num_features, self.head_dim + 1)
        dtype = torch.promote_types(self.key.weight.dtype, torch.float32)
        return (StateSpec(name="sums", rule=StateRule.REPLACE, dtype=dtype, shape=shape),)

    def forward(
        self, x: Tensor, chunk: Chunk, past: Mapping[str, Tensor] | None = None, *, need_weights: bool = False
    ) -> Attended:
        """Attend from x (B, T, E), the tokens of `chunk`, to themselves and, with a past, to what its "sums" hold.

        Raises:
            ValueError: weights are asked for, a past is given to attention that is not causal, or tokens are marked as
                global.
        """
        refuse_global(chunk)
        if need_weights:
            raise ValueError("linear attention computes no weights; ask a model with attention 'softmax' for them")
        if past is not None and not self.causal:
            raise ValueError("a past needs causal attention: later tokens would change what earlier ones saw")
        query, key, value = self.queries(x), self.keys(x), self.values(x)
        if self.rotary is not None:
            query, key = self.rotary(query, chunk.positions), self.rotary(key, chunk.positions)
        valid = chunk.valid[:, None, :, None]
        key = self._features(key, is_query=False).masked_fill(~valid, 0.0)
        value = value.masked_fill(~valid, 0.0)
        sums = None if past is None else past["sums"]
        context, sums = linear_attend(self._features(query, is_query=True), key, value, sums, causal=self.causal)
        return Attended(self.merge(context.to(x.dtype)), None, {} if past is None else {"sums": sums})

    def _features(self, x: Tensor, *, is_query: bool) -> Tensor:
        return elu_features(x) if self.projection is None else favor_features(x, self.projection, is_query=is_query)
