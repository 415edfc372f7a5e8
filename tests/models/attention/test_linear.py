"""Linear attention: features against the paper, one definition for every way to compute it, exact causality."""

import math
import warnings

import pytest
import torch

from models.attention import linear
from models.attention.functional import attend
from models.attention.linear import LinearAttention, elu_features, favor_features, linear_attend, orthogonal_projection
from models.attention.positions import Rotary
from models.states import Chunk, StateRule

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
FEATURES = pytest.mark.parametrize("features", ["favor", "elu"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def chunk_of(x, lengths=None, start=None):
    start = None if start is None else torch.tensor(start)
    return Chunk.of(x[..., 0], None if lengths is None else torch.tensor(lengths), start)


def layer_of(features="favor", *, causal=True, kv_heads=2, dtype=torch.float64, **options):
    attention = LinearAttention(
        24, 4, features=features, num_features=20, causal=causal, rotary=Rotary(6), num_kv_heads=kv_heads, **options
    )
    return attention.to(dtype).eval()


def featured(tokens, *, rows=2, heads=4, kv_heads=2, num_features=20, width=6, dtype=torch.float64):
    return (
        torch.rand(rows, heads, tokens, num_features, dtype=dtype),
        torch.rand(rows, kv_heads, tokens, num_features, dtype=dtype),
        torch.randn(rows, kv_heads, tokens, width, dtype=dtype),
    )


def dense(query, key, value, sums=None, *, causal):
    """The definition with its T x T matrix."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT
    scores = scores.tril() if causal else scores
    top, bottom = scores @ value, scores.sum(-1, keepdim=True)
    if sums is not None:
        before = query @ sums.repeat_interleave(groups, 1)
        top, bottom = top + before[..., :-1], bottom + before[..., -1:]
    return top / bottom


class TestFeatures:
    """The random features of FAVOR+ against Choromanski et al., 2020, Lemma 2 and Theorem 2."""

    HEAD_DIM, NUM_FEATURES, DRAWS = 8, 16, 20000

    def estimates(self, x, y, projection):
        """One estimate of exp(x . y) from each draw; x and y are what the features scale their arguments to."""
        unscale = self.HEAD_DIM**0.25
        products = favor_features(x * unscale, projection, is_query=False) * favor_features(
            y * unscale, projection, is_query=False
        )
        return products.unflatten(-1, (self.DRAWS, self.NUM_FEATURES)).sum(-1) * self.DRAWS  # each draw has its own F

    def pairs(self):
        for norm, angle in ((0.4, 0.3), (0.8, 1.2), (0.9, 2.5), (0.6, math.pi)):
            x, y = torch.zeros(2, self.HEAD_DIM, dtype=torch.float64)
            x[0], y[0], y[1] = norm, norm * math.cos(angle), norm * math.sin(angle)
            yield x, y

    def test_the_error_is_that_of_lemma_2(self):
        projection = torch.randn(self.DRAWS * self.NUM_FEATURES, self.HEAD_DIM)
        for x, y in self.pairs():
            kernel, length = float((x @ y).exp()), float((x + y).square().sum())
            expected = math.exp(length) * kernel**2 * (1 - math.exp(-length)) / self.NUM_FEATURES
            estimates = self.estimates(x, y, projection)
            assert (estimates - kernel).square().mean().item() == pytest.approx(expected, rel=0.1, abs=1e-12)
            assert estimates.mean().item() == pytest.approx(kernel, abs=4 * math.sqrt(expected / self.DRAWS) + 1e-6)

    def test_orthogonal_directions_err_less_than_independent_ones(self):
        independent = torch.randn(self.DRAWS * self.NUM_FEATURES, self.HEAD_DIM)
        orthogonal = orthogonal_projection(self.DRAWS * self.NUM_FEATURES, self.HEAD_DIM)
        for x, y in list(self.pairs())[:2]:  # nearly opposite vectors are estimated well by any directions
            errors = [
                (self.estimates(x, y, projection) - (x @ y).exp()).square().mean()
                for projection in (orthogonal, independent)
            ]
            assert errors[0] < errors[1]

    def test_directions_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones(self):
        projection = orthogonal_projection(6000, 8)
        assert projection.shape == (6000, 8)
        assert orthogonal_projection(5, 8).shape == (5, 8)
        gram = projection.unflatten(0, (-1, 8)) @ projection.unflatten(0, (-1, 8)).mT
        assert (gram - gram.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 1e-4
        squares = projection.square().sum(1)  # chi-squared with 8 degrees of freedom
        assert squares.mean().item() == pytest.approx(8, rel=0.03)
        assert squares.var().item() == pytest.approx(16, rel=0.1)

    def test_more_features_approach_softmax_attention_as_fast_as_the_paper_says(self):
        query, key, value = (0.5 * torch.randn(1, 1, 256, 16, dtype=torch.float64) for _ in range(3))
        exact, _ = attend(query, key, value)
        errors = []
        for num_features in (16, 64, 256):
            squares = []
            for _ in range(15):
                projection = orthogonal_projection(num_features, 16)
                output, _ = linear_attend(
                    favor_features(query, projection, is_query=True),
                    favor_features(key, projection, is_query=False),
                    value,
                    causal=False,
                )
                squares.append((output - exact).square().mean())
            errors.append(torch.stack(squares).median())
        slope = math.log(errors[2] / errors[0]) / math.log(256 / 16)
        assert -1.3 <= slope <= -0.6

    def test_elu_features_equal_torch_where_float32_can_tell(self):
        x = torch.linspace(-12, 12, 500)
        torch.testing.assert_close(elu_features(x), torch.nn.functional.elu(x) + 1, rtol=0, atol=1e-6)
        assert (elu_features(torch.tensor([-1e30, -50.0])) > 0).all()

    @pytest.mark.parametrize("size", [0.0, 1.0, 4.0, 30.0, 1e4, 1e15])
    def test_no_size_of_queries_and_keys_makes_a_denominator_vanish_or_overflow(self, size):
        for head_dim in (16, 64, 128):
            query, key = (torch.randn(1, 1, 200, head_dim, requires_grad=True) for _ in range(2))
            value = torch.randn(1, 1, 200, 8).abs() + 1
            projection = orthogonal_projection(64, head_dim)
            for features in (
                lambda x, is_query, projection=projection: favor_features(x, projection, is_query=is_query),
                lambda x, is_query: elu_features(x),
            ):
                output, sums = linear_attend(
                    features(size * query, True), features(size * key, False), value, causal=True
                )
                # A mean of values: between the least and the largest of them.
                assert (output >= value.amin(2, keepdim=True) * 0.999).all()
                assert (output <= value.amax(2, keepdim=True) * 1.001).all()
                assert sums.isfinite().all()
                for gradient in torch.autograd.grad(output.sum(), (query, key)):
                    assert gradient.isfinite().all()


class TestLinearAttend:
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
    @pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (3, 4), (4, 4), (13, 4), (13, 1), (150, 128), (0, 4)])
    def test_it_equals_the_dense_definition(self, tokens, chunk, heads, kv_heads, causal):
        query, key, value = featured(tokens, heads=heads, kv_heads=kv_heads)
        sums = torch.rand(2, kv_heads, 20, 7, dtype=torch.float64)
        for past in (None, sums):
            output, total = linear_attend(query, key, value, past, causal=causal, chunk=chunk)
            expected = dense(query, key, value, past if past is None or causal else sums, causal=causal)
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
            ones = torch.ones_like(value[..., :1])
            torch.testing.assert_close(
                total, key.mT @ torch.cat((value, ones), -1) + (0 if past is None else past), rtol=0, atol=1e-10
            )

    def test_no_gradient_reaches_a_later_token(self):
        for chunk in (4, 5, 64):
            query, key, value = (tensor.requires_grad_() for tensor in featured(13, rows=1))
            output, _ = linear_attend(query, key, value, causal=True, chunk=chunk)
            for position in range(13):
                for gradient in torch.autograd.grad(
                    output[:, :, position].sum(), (query, key, value), retain_graph=True
                ):
                    assert (gradient[:, :, position + 1 :] == 0).all()
                    assert (gradient[:, :, position] != 0).any()

    @pytest.mark.parametrize("chunk", [4, 5, 64])
    def test_a_later_token_of_any_size_changes_no_bit_of_an_earlier_output(self, chunk):
        query, key, value = featured(13, dtype=torch.float32)
        before, _ = linear_attend(query, key, value, causal=True, chunk=chunk)
        key[:, :, 9:] *= 1e17
        value[:, :, 9:] *= 1e10
        after, _ = linear_attend(query, key, value, causal=True, chunk=chunk)
        assert torch.equal(before[:, :, :9], after[:, :, :9])
        assert not torch.equal(before[:, :, 9:], after[:, :, 9:])

    @pytest.mark.parametrize("causal", [True, False])
    def test_where_no_key_is_seen_the_output_is_zero(self, causal):
        query, key, value = (tensor.requires_grad_() for tensor in featured(9))
        seen = torch.zeros(9, 1, dtype=torch.float64)
        seen[4:] = float(causal)
        output, _ = linear_attend(query, key * seen, value, causal=causal, chunk=4)
        assert (output[:, :, : 4 if causal else 9] == 0).all()
        output.sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))

    @pytest.mark.parametrize("causal", [True, False])
    def test_gradients_pass_gradcheck(self, causal):
        query, key, value = featured(5, rows=1, num_features=3, width=2)
        sums = torch.rand(1, 2, 3, 3, dtype=torch.float64)
        inputs = [tensor.requires_grad_() for tensor in (query, key, value, sums)]
        assert torch.autograd.gradcheck(lambda *args: linear_attend(*args, causal=causal, chunk=2), inputs)

    def test_gradients_of_features_pass_gradcheck(self):
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        projection = orthogonal_projection(5, 4)
        assert torch.autograd.gradcheck(lambda x: favor_features(x, projection, is_query=False), (x,))
        assert torch.autograd.gradcheck(elu_features, (x,))

        def ratio(x):  # a query's scale is no part of the gradient, since it cancels
            phi = favor_features(x, projection, is_query=True)
            return phi[..., 1:] / phi[..., :1]

        assert torch.autograd.gradcheck(ratio, (x,))


@pytest.fixture(scope="module")
def reference():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import asks torch for deprecated names
        from performer_pytorch import performer_pytorch
    return performer_pytorch


class TestAgainstPerformerPytorch:
    """Parity where it is not causal: its causal keys are scaled by the largest of all, later ones included."""

    def test_bidirectional_attention_is_the_same(self, reference):
        query, key, value = (0.7 * torch.randn(2, 4, 50, 16, dtype=torch.float64) for _ in range(3))
        projection = orthogonal_projection(40, 16).double()
        theirs = reference.linear_attention(
            reference.softmax_kernel(query, projection_matrix=projection, is_query=True, eps=0.0),
            reference.softmax_kernel(key, projection_matrix=projection, is_query=False, eps=0.0),
            value,
        )
        ours, _ = linear_attend(
            favor_features(query, projection, is_query=True),
            favor_features(key, projection, is_query=False),
            value,
            causal=False,
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)

    def test_keys_are_those_without_its_scale_over_time(self, reference):
        key = torch.randn(1, 1, 9, 16, dtype=torch.float64)
        projection = orthogonal_projection(40, 16).double()
        theirs = reference.softmax_kernel(key, projection_matrix=projection, is_query=False, eps=0.0)
        ours = favor_features(key, projection, is_query=False)
        ratio = ours / theirs  # one factor for all tokens: the largest of them all
        torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio), rtol=1e-10, atol=0)


def run_in_chunks(attention, x, sizes):
    past = {"sums": torch.zeros(len(x), *attention.state_specs()[0].shape, dtype=attention.state_specs()[0].dtype)}
    parts, start = [], 0
    for size in sizes:
        new = x[:, start : start + size]
        attended = attention(new, chunk_of(new, start=[start] * len(x)), past)
        parts.append(attended.output)
        past, start = attended.present, start + size
    return torch.cat(parts, 1), past["sums"]


class TestLinearAttention:
    @FEATURES
    @pytest.mark.parametrize("sizes", [[28], [1] * 28, [7, 1, 20], [27, 1], [0, 5, 0, 23]], ids=str)
    def test_any_chunking_with_state_equals_one_pass(self, features, sizes):
        attention, x = layer_of(features), torch.randn(2, 28, 24, dtype=torch.float64)
        output, _ = run_in_chunks(attention, x, sizes)
        torch.testing.assert_close(output, attention(x, chunk_of(x)).output, rtol=0, atol=1e-10)

    @FEATURES
    def test_one_pass_over_many_internal_chunks_equals_step_by_step(self, features):
        attention = layer_of(features, dtype=torch.float32)
        x = torch.randn(1, 2 * linear.CHUNK + 9, 24)
        with torch.no_grad():
            output, _ = run_in_chunks(attention, x, [1] * x.shape[1])
            torch.testing.assert_close(output, attention(x, chunk_of(x)).output, rtol=0, atol=1e-5)

    @FEATURES
    @DTYPES
    @torch.no_grad()
    def test_every_dtype_stays_near_double_precision(self, features, dtype):
        exact = layer_of(features)
        attention = layer_of(features, dtype=dtype)
        attention.load_state_dict(exact.state_dict())
        x = torch.randn(2, 40, 24, dtype=torch.float64)
        output, sums = run_in_chunks(attention, x.to(dtype), [13, 1, 26])
        assert output.dtype == dtype
        assert sums.dtype == torch.promote_types(dtype, torch.float32)
        atol = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(output.double(), exact(x, chunk_of(x)).output, rtol=0, atol=atol)

    @FEATURES
    @pytest.mark.parametrize("seed", range(3))
    @torch.no_grad()
    def test_ragged_rows_with_state_equal_each_row_alone(self, features, seed):
        attention, generator = layer_of(features), torch.Generator().manual_seed(seed)
        x = torch.randn(4, 30, 24, dtype=torch.float64)
        consumed, outputs = [0] * 4, [[] for _ in range(4)]
        past = {"sums": torch.zeros(4, *attention.state_specs()[0].shape, dtype=torch.float64)}
        while min(consumed) < 30:
            width = int(torch.randint(1, 10, (), generator=generator))
            lengths = [min(int(torch.randint(0, width + 1, (), generator=generator)), 30 - n) for n in consumed]
            new = torch.full((4, width, 24), math.nan, dtype=torch.float64)  # padding may hold anything
            for row, (start, length) in enumerate(zip(consumed, lengths, strict=True)):
                new[row, :length] = x[row, start : start + length]
            before = past["sums"]
            attended = attention(new, chunk_of(new, lengths, consumed), past)
            past = attended.present
            for row, length in enumerate(lengths):
                outputs[row].append(attended.output[row, :length])
                consumed[row] += length
                if length == 0:
                    assert torch.equal(past["sums"][row], before[row])
        for row in range(4):
            alone = attention(x[row : row + 1], chunk_of(x[row : row + 1])).output[0]
            torch.testing.assert_close(torch.cat(outputs[row]), alone, rtol=0, atol=1e-10)

    @FEATURES
    @pytest.mark.parametrize("causal", [True, False])
    @torch.no_grad()
    def test_padding_of_any_content_changes_nothing_and_an_empty_row_is_harmless(self, features, causal):
        attention = layer_of(features, causal=causal)
        x = torch.randn(3, 9, 24, dtype=torch.float64)
        lengths = [9, 4, 0]
        for row, length in enumerate(lengths):
            x[row, length:] = math.nan
        output = attention(x, chunk_of(x, lengths)).output
        for row, length in enumerate(lengths[:2]):
            alone = x[row : row + 1, :length]
            expected = attention(alone, chunk_of(alone)).output[0]
            torch.testing.assert_close(output[row, :length], expected, rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_elu_attention_is_the_dense_formula(self):
        attention = LinearAttention(24, 4, features="elu").double()
        x = torch.randn(2, 11, 24, dtype=torch.float64)
        query, key, value = (
            projection(x).unflatten(-1, (4, 6)).transpose(1, 2)
            for projection in (attention.query, attention.key, attention.value)
        )
        phi_query, phi_key = (torch.nn.functional.elu(tensor) + 1 for tensor in (query, key))
        scores = phi_query @ phi_key.mT
        context = scores / scores.sum(-1, keepdim=True) @ value
        expected = attention.output(context.transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x, chunk_of(x)).output, expected, rtol=0, atol=1e-10)

    def test_the_state_is_declared_and_directions_are_kept_with_the_weights(self):
        (spec,) = layer_of(dtype=torch.bfloat16).state_specs()
        assert (spec.name, spec.rule, spec.dtype, spec.shape) == ("sums", StateRule.REPLACE, torch.float32, (2, 20, 7))
        assert layer_of("elu").state_specs()[0].shape == (2, 6, 7)
        assert layer_of(causal=False).state_specs() == ()
        assert "projection" in layer_of().state_dict()
        assert "projection" not in layer_of("elu").state_dict()

    def test_qk_norm_bounds_what_the_features_see(self):
        attention = layer_of(qk_norm=True, dtype=torch.float32)
        x = 1e6 * torch.randn(1, 5, 24)
        norms = attention.keys(x).square().mean(-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))

    def test_misuse_is_refused_with_advice(self):
        x = torch.randn(1, 3, 24, dtype=torch.float64)
        with pytest.raises(ValueError, match="computes no weights; ask a model with attention 'softmax'"):
            layer_of()(x, chunk_of(x), need_weights=True)
        with pytest.raises(ValueError, match="a past needs causal attention"):
            layer_of(causal=False)(x, chunk_of(x), {"sums": x})
        with pytest.raises(ValueError, match=r"is_global marks tokens .* they need attention 'longformer'"):
            layer_of()(x, Chunk.of(x[..., 0], is_global=torch.zeros(1, 3, dtype=torch.bool)))
        with pytest.raises(ValueError, match="features is 'relu'; it must be one of favor, elu"):
            LinearAttention(24, 4, features="relu")
        with pytest.raises(ValueError, match="num_features is 0; it must be at least 1"):
            LinearAttention(24, 4, num_features=0)
