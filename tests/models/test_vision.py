"""The Vision Transformer: against an independent one, and what must hold of any model of patches."""

import pytest
import torch
import torch.nn.functional as F

from models import checkpoint
from models.captioner import Captioner
from models.checkpoint import TrainedModel
from models.encoder import StackConfig
from models.vision import (
    ImageEncoder,
    ImageEncoderConfig,
    PatchEmbedding,
    VisionTransformer,
    VisionTransformerConfig,
    split_patches,
)


def stack(**changes):
    return StackConfig(**{"d_model": 24, "num_layers": 2, "num_heads": 3, "d_ff": 40, "norm_eps": 1e-12} | changes)


def encoder_config(**changes):
    sizes = {"height": 12, "width": 8, "num_channels": 3, "patch_size": 4}
    return ImageEncoderConfig(**sizes | {"stack": stack()} | changes)


def classifier(seed=0, **changes):
    torch.manual_seed(seed)
    model = VisionTransformer(VisionTransformerConfig(encoder=encoder_config(**changes), num_classes=5))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and positions that are not zero show what uses them
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(rows=2, seed=1):
    return torch.randn(rows, 3, 12, 8, generator=torch.Generator().manual_seed(seed))


def rearranged(image, order):
    """Return the image with its patches, 3 x 2 of them, in another order."""
    patches = split_patches(image, 4, 4)[:, order]
    return patches.unflatten(1, (3, 2)).permute(0, 3, 1, 4, 2, 5).reshape(image.shape)


def from_huggingface(theirs):
    """Return the weights of transformers' ViTForImageClassification under our names."""
    renamed = {}
    parts = {
        "layernorm_before": "attention_norm",
        "layernorm_after": "feed_forward_norm",
        "attention.q_proj": "attention.query",
        "attention.k_proj": "attention.key",
        "attention.v_proj": "attention.value",
        "attention.o_proj": "attention.output",
        "mlp.fc1": "feed_forward.up",
        "mlp.fc2": "feed_forward.down",
    }
    for name, tensor in theirs.items():
        if name.startswith("vit.layers."):
            _, _, index, rest = name.split(".", 3)
            part, kind = rest.rsplit(".", 1)
            renamed[f"stack.layers.{index}.{parts[part]}.{kind}"] = tensor
    token, positions = theirs["vit.embeddings.cls_token"], theirs["vit.embeddings.position_embeddings"]
    return renamed | {
        "class_token": (token + positions[:, :1]).flatten(),
        "patch_embedding.positions": positions[0, 1:],
        "patch_embedding.projection.weight": theirs["vit.embeddings.patch_embeddings.projection.weight"].flatten(1),
        "patch_embedding.projection.bias": theirs["vit.embeddings.patch_embeddings.projection.bias"],
        "stack.final_norm.weight": theirs["vit.layernorm.weight"],
        "stack.final_norm.bias": theirs["vit.layernorm.bias"],
        "head.weight": theirs["classifier.weight"],
        "head.bias": theirs["classifier.bias"],
    }


def test_logits_and_weights_are_those_of_transformers_vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    theirs = ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=40,
            image_size=(12, 8),
            patch_size=4,
            num_channels=3,
            num_labels=5,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = VisionTransformerConfig(encoder=encoder_config(stack=stack(num_layers=3)), num_classes=5)
    ours = VisionTransformer.from_weights(config, from_huggingface(theirs.state_dict()))
    expected = theirs(images(4), output_attentions=True)
    torch.testing.assert_close(ours(images(4)), expected.logits, rtol=1e-5, atol=1e-5)
    for our_weights, their_weights in zip(ours.attention_weights(images(4)), expected.attentions, strict=True):
        torch.testing.assert_close(our_weights, their_weights, rtol=1e-5, atol=1e-6)


def test_patches_come_in_reading_order_and_embedding_them_is_a_strided_convolution():
    image = images()
    patches = split_patches(image, 4, 4)
    assert patches.shape == (2, 6, 3, 4, 4)
    assert torch.equal(patches[:, 3], image[:, :, 4:8, 4:8])
    embedding = PatchEmbedding(encoder_config(positions="none"))
    kernel = embedding.projection.weight.unflatten(1, (3, 4, 4))
    expected = F.conv2d(image, kernel, embedding.projection.bias, stride=4).flatten(2).mT
    torch.testing.assert_close(embedding(image), expected, rtol=1e-5, atol=1e-6)


def test_patches_need_not_be_square():
    assert torch.equal(split_patches(images(), 6, 2)[:, 5], images()[:, :, 6:, 2:4])


def test_without_positions_rearranged_patches_are_encoded_alike_and_classified_alike():
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.manual_seed(0)
    encoder = ImageEncoder(encoder_config(positions="none")).eval()
    torch.testing.assert_close(encoder(rearranged(images(), order)), encoder(images())[:, order])
    model = classifier(positions="none")
    torch.testing.assert_close(model(rearranged(images(), order)), model(images()))
    model = classifier(positions="learned")
    assert (model(rearranged(images(), order)) - model(images())).abs().max() > 1e-2


def test_an_image_is_classified_alike_alone_and_in_a_batch():
    model = classifier()
    together = model(images(5))
    for row in range(5):
        torch.testing.assert_close(model(images(5)[row : row + 1])[0], together[row], rtol=1e-5, atol=1e-5)
    assert model(images(0)).shape == (0, 5)


def test_what_pads_an_image_at_the_bottom_changes_nothing():
    torch.manual_seed(0)
    encoder = ImageEncoder(encoder_config()).eval()
    image, padded = images(), images().clone()
    padded[0, :, 8:] = float("nan")
    lengths = torch.tensor([4, 6])
    other = images(seed=2)
    other[:, :, :8] = image[:, :, :8]
    other[1] = image[1]
    memory = encoder(padded, lengths)
    torch.testing.assert_close(memory[0, :4], encoder(other, lengths)[0, :4])
    torch.testing.assert_close(memory[1], encoder(image)[1])
    for weights in encoder.attention_weights(other, lengths):
        assert weights[0, :, :, 4:].abs().max() == 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 6))


def test_weights_are_of_the_class_token_and_all_patches():
    weights = classifier().attention_weights(images())
    assert [layer.shape for layer in weights] == [(2, 3, 7, 7)] * 2
    for layer in weights:
        torch.testing.assert_close(layer.sum(-1), torch.ones(2, 3, 7))


def test_the_ablation_attends_to_everything_alike():
    for layer in classifier(stack=stack(attention="mean")).attention_weights(images()):
        torch.testing.assert_close(layer, torch.full_like(layer, 1 / 7))


def test_every_parameter_learns():
    model = classifier().train()
    F.cross_entropy(model(images()), torch.tensor([0, 3])).backward()
    # Keys have a bias that softmax does not see: it moves all scores of a query alike.
    silent = {name for name, parameter in model.named_parameters() if parameter.grad.abs().max() < 1e-7}
    assert silent <= {f"stack.layers.{index}.attention.key.bias" for index in range(2)}


def test_a_checkpoint_brings_the_classifier_back(tmp_path):
    trained = TrainedModel(
        module=classifier(), tokenizer=None, source="a test", licence="Apache-2.0", labels=("a", "b", "c", "d", "e")
    )
    checkpoint.save(trained, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert (loaded.labels, loaded.module.config) == (trained.labels, trained.module.config)
    assert torch.equal(loaded.module(images()), trained.module(images()))
    assert not isinstance(loaded.module, Captioner)


def test_an_exported_classifier_takes_any_number_of_images():
    model = classifier()
    exported = torch.export.export(model, (images(3),), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    torch.testing.assert_close(exported(images(5)), model(images(5)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 10}, "height is 10; it must be a multiple of patch_size, 4"),
        ({"width": 9}, "width is 9; it must be a multiple of patch_size, 4"),
        ({"patch_size": 0}, "patch_size is 0; it must be an integer of at least 1"),
        ({"num_channels": 1.5}, r"num_channels is 1\.5; it must be an integer of at least 1"),
        ({"positions": "rotary"}, "positions is 'rotary'; it must be one of none, learned"),
    ],
)
def test_a_wrong_configuration_names_field_value_and_limit(changes, message):
    with pytest.raises(ValueError, match=message):
        encoder_config(**changes)


def test_a_classifier_needs_classes():
    with pytest.raises(ValueError, match="num_classes is 0"):
        VisionTransformerConfig(encoder=encoder_config(), num_classes=0)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 12, 8), (2, 3, 8, 12)])
def test_an_image_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"image has shape .*; the model takes .* with \(3, 12, 8\) after the rows"):
        classifier()(torch.zeros(shape))


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"image is \(12, 8\); it must be a multiple of the patch, \(5, 4\)"):
        split_patches(images(), 5, 4)
