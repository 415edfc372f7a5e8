"""Hard attention: frequencies of choices, unbiased gradients, and learning where to look."""

import math
from functools import partial

import pytest
import torch

from models.attention.functional import attend
from models.attention.hard import (
    MovingBaseline,
    gumbel_straight_through,
    most_likely,
    reinforce_loss,
    sample,
    take,
)
from models.attention.normalizers import masked_softmax, sparsemax


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def all_choices(weights):
    """Every place with the noise that leads to it: the middle of the interval that it has in [0, 1)."""
    ends = weights.detach().cumsum(-1)
    return ends - weights.detach() / 2


class TestSample:
    def test_places_come_as_often_as_their_weights_say(self):
        weights = torch.tensor([0.05, 0.0, 0.6, 0.35])
        count = 40_000
        index = sample(weights.expand(count, 4), generator=torch.Generator().manual_seed(1)).index
        shares = index.bincount(minlength=4) / count
        errors = (weights * (1 - weights) / count).sqrt()
        assert ((shares - weights).abs() <= 4 * errors).all()
        assert shares[1] == 0

    def test_noise_decides_and_the_same_noise_decides_alike(self):
        weights = torch.randn(2, 3, 5).softmax(-1)
        for place, uniform in enumerate(all_choices(weights).unbind(-1)):
            assert (sample(weights, uniform=uniform).index == place).all()
        one, two = (sample(weights, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(one.index, two.index)
        assert one.index.shape == (2, 3)

    def test_the_ends_of_the_noise_never_lead_to_a_place_of_no_weight(self):
        below_one = math.nextafter(1.0, 0.0)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            weights = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=dtype)
            assert sample(weights, uniform=torch.tensor(0.0)).index == 1
            assert sample(weights, uniform=torch.tensor(below_one, dtype=torch.float64)).index == 3
        many = torch.rand(2000, 7).pow(20)
        many = many / many.sum(-1, keepdim=True)
        choice = sample(many, uniform=torch.full((2000,), below_one, dtype=torch.float64))
        assert (take(many, choice.index) > 0).all()

    def test_a_choice_tells_its_weights_probability_and_entropy(self):
        weights = torch.randn(4, 6, dtype=torch.float64).softmax(-1)
        choice = sample(weights)
        assert torch.equal(choice.weights.argmax(-1), choice.index)
        assert torch.equal(choice.weights.sum(-1), torch.ones(4, dtype=torch.float64))
        expected = torch.distributions.Categorical(weights)
        torch.testing.assert_close(choice.log_prob, expected.log_prob(choice.index))
        torch.testing.assert_close(choice.entropy, expected.entropy())

    def test_where_nothing_is_allowed_nothing_is_chosen(self):
        scores = torch.randn(3, 4, requires_grad=True)
        mask = torch.tensor([[True] * 4, [False] * 4, [False, False, True, False]])
        for choose in (sample, most_likely):
            choice = choose(masked_softmax(scores, mask))
            assert choice.index[1] == 0
            assert choice.index[2] == 2
            assert (choice.weights[1] == 0).all()
            assert choice.log_prob[1:].tolist() == [0.0, 0.0]
            assert choice.entropy[1:].tolist() == [0.0, 0.0]
            scores.grad = None
            (choice.log_prob.sum() + choice.entropy.sum()).backward()
            assert scores.grad.isfinite().all()
            assert (scores.grad[1:] == 0).all()
            assert (scores.grad[0] != 0).all()

    def test_entropy_is_in_nats_and_its_gradient_finite_where_weights_are_zero(self):
        assert sample(torch.full((8,), 1 / 8)).entropy.item() == pytest.approx(2.0794415)
        assert sample(torch.tensor([0.0, 1.0, 0.0])).entropy.item() == 0.0
        scores = torch.tensor([3.0, 2.8, -4.0, 2.9], requires_grad=True)
        weights = sparsemax(scores)
        assert (weights == 0).any()
        sample(weights).entropy.backward()
        assert scores.grad.isfinite().all()

    def test_misuse_is_refused(self):
        with pytest.raises(ValueError, match=r"shape \(2, 0\); there is no place to choose"):
            sample(torch.zeros(2, 0))
        with pytest.raises(ValueError, match=r"uniform has shape \(3,\); the weights need \(2,\)"):
            sample(torch.ones(2, 4), uniform=torch.rand(3))


def test_at_inference_the_most_likely_place_is_chosen():
    weights = torch.randn(5, 6).softmax(-1)
    choice = most_likely(weights)
    assert torch.equal(choice.index, weights.argmax(-1))
    torch.testing.assert_close(choice.log_prob, weights.amax(-1).log())
    assert most_likely(torch.tensor([0.4, 0.4, 0.2])).index == 0


def test_taking_reads_the_chosen_place_and_no_other():
    values = torch.randn(3, 4, 2, 5)
    index = torch.tensor([3, 0, 2])
    expected = torch.stack([values[row, place] for row, place in enumerate(index)])
    hidden = torch.ones(3, 4, dtype=torch.bool)
    hidden[torch.arange(3), index] = False
    assert torch.equal(take(values.masked_fill(hidden[..., None, None], math.nan), index), expected)


class TestReinforce:
    """A choice among five places, whose log-likelihoods depend on a parameter too."""

    @staticmethod
    def problem():
        return torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(
            5, dtype=torch.float64, requires_grad=True
        )

    @staticmethod
    def exact(scores, likelihoods):
        expected_loss = -(scores.softmax(-1) * likelihoods).sum()
        return torch.autograd.grad(expected_loss, (scores, likelihoods))

    @pytest.mark.parametrize("baseline", [0.0, -3.0, 10.0])
    def test_the_gradient_is_unbiased_whatever_the_baseline(self, baseline):
        scores, likelihoods = self.problem()
        weights = scores.softmax(-1)
        estimates = [torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)]
        for place, uniform in enumerate(all_choices(weights)):
            choice = sample(scores.softmax(-1), uniform=uniform)
            assert choice.index == place
            loss = reinforce_loss(likelihoods[choice.index], choice.log_prob, choice.entropy, baseline=baseline)
            for estimate, gradient in zip(estimates, torch.autograd.grad(loss, (scores, likelihoods)), strict=True):
                estimate.add_(weights[place].detach() * gradient)
        for estimate, expected in zip(estimates, self.exact(scores, likelihoods), strict=True):
            torch.testing.assert_close(estimate, expected, rtol=0, atol=1e-12)

    def test_the_mean_over_samples_is_within_its_standard_error(self):
        scores, likelihoods = self.problem()
        count = 20_000
        many = scores.detach().expand(count, 5).clone().requires_grad_()
        choice = sample(many.softmax(-1), generator=torch.Generator().manual_seed(3))
        loss = reinforce_loss(likelihoods.detach()[choice.index], choice.log_prob, choice.entropy, baseline=-0.2)
        gradients = torch.autograd.grad(loss, many)[0] * count
        errors = gradients.std(0) / math.sqrt(count)
        expected, _ = self.exact(scores, likelihoods)
        assert ((gradients.mean(0) - expected).abs() <= 4 * errors).all()

    def test_a_baseline_near_the_mean_reward_lowers_the_variance(self):
        scores, likelihoods = self.problem()
        likelihoods = likelihoods.detach() - 5.0
        spreads = []
        for baseline in (0.0, (scores.softmax(-1) * likelihoods).sum().item()):
            many = scores.detach().expand(5000, 5).clone().requires_grad_()
            choice = sample(many.softmax(-1), generator=torch.Generator().manual_seed(3))
            loss = reinforce_loss(likelihoods[choice.index], choice.log_prob, choice.entropy, baseline=baseline)
            spreads.append(torch.autograd.grad(loss, many)[0].std(0).sum().item())
        assert spreads[1] < spreads[0] / 3

    def test_the_entropy_term_rewards_indecision(self):
        scores = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
        nothing = torch.zeros((), dtype=torch.float64)
        choice = sample(scores.softmax(-1))
        loss = reinforce_loss(nothing, choice.log_prob, choice.entropy, entropy_weight=0.5)
        gradient = torch.autograd.grad(loss, scores)[0]
        after = (scores - 0.1 * gradient).softmax(-1)
        assert sample(after).entropy > choice.entropy
        expected = torch.autograd.grad(-0.5 * torch.distributions.Categorical(logits=scores).entropy(), scores)[0]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)

    def test_the_baseline_is_that_of_earlier_batches(self):
        baseline = MovingBaseline()
        assert baseline(torch.tensor([1.0, 3.0])) == 0.0
        assert baseline(torch.tensor([2.0])).item() == pytest.approx(0.2)
        assert baseline.value.item() == pytest.approx(0.9 * 0.2 + 0.1 * 2.0)
        baseline.eval()
        value = baseline(torch.tensor([100.0]))
        assert torch.equal(baseline(torch.tensor([100.0])), value)
        restored = MovingBaseline()
        restored.load_state_dict(baseline.state_dict())
        assert torch.equal(restored.value, baseline.value)
        with pytest.raises(ValueError, match=r"decay is 1\.0; it must lie in \[0, 1\)"):
            MovingBaseline(1.0)

    def test_it_learns_where_to_look(self):
        scores = torch.zeros(6, requires_grad=True)
        optimiser, baseline = torch.optim.SGD([scores], lr=1.0), MovingBaseline()
        likelihoods = torch.tensor([-2.0, -2.0, -0.1, -2.0, -2.0, -2.0])
        for _ in range(100):
            choice = sample(scores.softmax(-1).expand(32, 6))
            reward = likelihoods[choice.index]
            loss = reinforce_loss(
                reward, choice.log_prob, choice.entropy, baseline=baseline(reward), entropy_weight=0.01
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert most_likely(scores.softmax(-1)).index == 2
        assert scores.softmax(-1)[2] > 0.9


class TestGumbelStraightThrough:
    def test_it_is_exactly_one_hot_and_as_frequent_as_softmax_says(self):
        scores = torch.tensor([0.5, -1.0, 2.0, 0.0])
        generator = torch.Generator().manual_seed(2)
        weights = gumbel_straight_through(scores.expand(20_000, 4), temperature=0.5, generator=generator)
        assert set(weights.unique().tolist()) == {0.0, 1.0}
        assert (weights.sum(-1) == 1).all()
        expected = scores.softmax(-1)
        errors = (expected * (1 - expected) / 20_000).sqrt()
        assert ((weights.mean(0) - expected).abs() <= 4 * errors).all()

    def test_its_gradient_is_that_of_the_relaxation(self):
        scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        uniform, values = torch.rand(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
        hard = gumbel_straight_through(scores, temperature=0.7, uniform=uniform) @ values
        soft = ((scores - (-uniform.log()).log()) / 0.7).softmax(-1) @ values
        gradient, expected = (torch.autograd.grad(one.sum(), scores)[0] for one in (hard, soft))
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)

    def test_masks_hide_and_rows_of_nothing_are_zero(self):
        scores = torch.randn(4, 5, dtype=torch.float64)
        mask = torch.tensor([[True, False, True, False, True]] * 3 + [[False] * 5])
        dirty = scores.masked_fill(~mask, math.nan).requires_grad_()
        for _ in range(20):
            weights = gumbel_straight_through(dirty, mask)
            assert (weights[~mask] == 0).all()
            assert weights.sum(-1).tolist() == [1.0, 1.0, 1.0, 0.0]
        (weights * torch.randn(5, dtype=torch.float64)).sum().backward()
        assert dirty.grad.isfinite().all()
        assert (dirty.grad[3] == 0).all()

    @pytest.mark.parametrize("noise", [0.0, math.nextafter(1.0, 0.0)])
    def test_the_ends_of_the_noise_are_harmless(self, noise):
        weights = gumbel_straight_through(torch.zeros(2, 3), uniform=torch.full((2, 3), noise, dtype=torch.float64))
        assert weights.tolist() == [[1.0, 0.0, 0.0]] * 2

    def test_attention_takes_it_as_a_normaliser(self):
        query, key, value = (torch.randn(2, 3, 4, 8) for _ in range(3))
        normalize = partial(gumbel_straight_through, temperature=0.5)
        output, weights = attend(query, key, value, normalizer=normalize, need_weights=True)
        assert (weights.amax(-1) == 1).all()
        chosen = value.gather(2, weights.argmax(-1)[..., None].expand(-1, -1, -1, 8))
        torch.testing.assert_close(output, chosen)

    def test_half_precision_keeps_its_type(self):
        assert gumbel_straight_through(torch.randn(3, 4, dtype=torch.float16)).dtype == torch.float16

    def test_misuse_is_refused(self):
        with pytest.raises(ValueError, match="temperature is 0; it must be above 0"):
            gumbel_straight_through(torch.zeros(3), temperature=0)
        with pytest.raises(ValueError, match=r"uniform has shape \(2,\); the scores need \(3,\)"):
            gumbel_straight_through(torch.zeros(3), uniform=torch.rand(2))
