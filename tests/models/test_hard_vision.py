"""Hard attention over patches: it reads one patch and no other, and its gradient is what REINFORCE promises."""

import pytest
import torch
import torch.nn.functional as F

from models import checkpoint
from models.attention.hard import reinforce_loss, sample
from models.checkpoint import TrainedModel
from models.encoder import StackConfig
from models.hard_vision import HardVision, HardVisionConfig
from models.training.digits import join_cells
from models.vision import ImageEncoderConfig, VisionTransformerConfig, split_patches

ROWS, COLUMNS = 2, 3


def config(**changes):
    stack = StackConfig(d_model=16, num_layers=1, num_heads=2, d_ff=24)
    encoder = ImageEncoderConfig(height=4, width=8, num_channels=2, patch_size=4, stack=stack)
    patch = VisionTransformerConfig(encoder=encoder, num_classes=3)
    fields = {"rows": ROWS, "columns": COLUMNS, "glance_size": 2, "d_glance": 8, "patch": patch}
    return HardVisionConfig(**fields | changes)


def model_of(**changes):
    torch.manual_seed(0)
    return HardVision(config(**changes)).eval()


def images(rows=4):
    return torch.randn(rows, 2, ROWS * 4, COLUMNS * 8, generator=torch.Generator().manual_seed(1))


def test_weights_are_a_distribution_over_patches():
    weights = model_of().attention_weights(images())
    assert weights.shape == (4, 6)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert weights.std() > 1e-3


def test_the_patch_of_the_largest_weight_is_read():
    model = model_of()
    best = model.attention_weights(images()).argmax(1)
    crops = split_patches(images(), 4, 8)[torch.arange(4), best]
    assert torch.equal(model(images()), model.patch(crops))


@pytest.mark.parametrize(("attention", "encoded"), [("hard", 4), ("soft", 4 * 6), ("mean", 4 * 6)])
def test_hard_attention_encodes_one_patch_of_each_image_and_soft_attention_all(attention, encoded):
    model, seen = model_of(attention=attention), []
    model.patch.patch_embedding.register_forward_hook(lambda module, arguments, _: seen.append(arguments[0].shape))
    model(images())
    assert seen == [(encoded, 2, 4, 8)]


def test_a_look_depends_on_no_other_patch():
    model, index = model_of(), torch.tensor([0, 5, 2, 3])
    image = images().requires_grad_()
    logits = model.look(image, index)
    logits.sum().backward()
    touched = split_patches(image.grad, 4, 8).abs().amax((2, 3, 4)) > 0
    assert torch.equal(touched, F.one_hot(index, 6).bool())
    poisoned = split_patches(images(), 4, 8).masked_fill(~touched[..., None, None, None], float("nan"))
    assert torch.equal(model.look(join_cells(poisoned, (ROWS, COLUMNS)), index), logits)


def test_soft_attention_is_the_expectation_of_what_hard_attention_reads():
    model = model_of(attention="soft")
    weights, patches = model.attention_weights(images()), split_patches(images(), 4, 8)
    features = sum(weights[:, place, None] * model.patch.features(patches[:, place]) for place in range(6))
    torch.testing.assert_close(model(images()), model.patch.head(features), rtol=1e-5, atol=1e-5)


def test_the_ablation_reads_all_patches_alike():
    model = model_of(attention="mean")
    assert torch.equal(model.attention_weights(images()), torch.full((4, 6), 1 / 6))
    features = model.patch.features(split_patches(images(), 4, 8).flatten(0, 1)).unflatten(0, (4, 6))
    torch.testing.assert_close(model(images()), model.patch.head(features.mean(1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["hard", "soft", "mean"])
def test_where_a_patch_lies_plays_no_part(attention):
    model, order = model_of(attention=attention), torch.tensor([3, 1, 5, 0, 4, 2])
    moved = join_cells(split_patches(images(), 4, 8)[:, order], (ROWS, COLUMNS))
    torch.testing.assert_close(model.attention_weights(moved), model.attention_weights(images())[:, order])
    torch.testing.assert_close(model(moved), model(images()), rtol=1e-5, atol=1e-5)


def test_an_image_is_read_alike_alone_and_in_a_batch():
    model = model_of()
    for row in range(4):
        torch.testing.assert_close(model(images()[row : row + 1])[0], model(images())[row], rtol=1e-5, atol=1e-5)


def test_the_mean_gradient_of_all_looks_is_that_of_the_expected_loss():
    model = model_of().double()
    image, label = images(1).double(), torch.tensor([2])

    def log_likelihood(place):
        return -F.cross_entropy(model.look(image, torch.tensor([place])), label, reduction="none")

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)

    weights = model.attention_weights(image)
    expected = gradients(-sum(weights[:, place] * log_likelihood(place) for place in range(6)).sum())
    estimate = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for place in range(6):
        weights = model.attention_weights(image)
        # Noise in the middle of the place's share of [0, 1) makes it the one that is drawn.
        noise = weights.detach().cumsum(1)[:, place] - weights.detach()[:, place] / 2
        choice = sample(weights, uniform=noise)
        assert choice.index.item() == place
        loss = reinforce_loss(log_likelihood(place), choice.log_prob, choice.entropy, baseline=-1.3)
        for total, gradient in zip(estimate, gradients(loss), strict=True):
            total.add_(weights[0, place].detach() * gradient)
    for ours, theirs in zip(estimate, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert expected[0].abs().max() > 0  # the glance is taught


def test_an_exported_model_takes_any_number_of_images():
    model = model_of()
    exported = torch.export.export(model, (images(3),), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    torch.testing.assert_close(exported(images(5)), model(images(5)), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_brings_the_model_back(tmp_path):
    trained = TrainedModel(
        module=model_of(), tokenizer=None, source="a test", licence="Apache-2.0", labels=("a", "b", "c")
    )
    checkpoint.save(trained, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model").module
    assert loaded.config == trained.module.config
    assert torch.equal(loaded(images()), trained.module(images()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows is 0; it must be an integer of at least 1"),
        ({"glance_size": 3}, "glance_size is 3; it must divide the patch's height, 4"),
        ({"glance_size": 8}, "glance_size is 8; it must divide the patch's height, 4"),
        ({"attention": "softmax"}, "attention is 'softmax'; it must be one of hard, soft, mean"),
    ],
)
def test_a_wrong_configuration_names_field_value_and_limit(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_an_image_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"image has shape \(1, 2, 8, 16\); .* \(2, 8, 24\) after the rows"):
        model_of()(torch.zeros(1, 2, 8, 16))
