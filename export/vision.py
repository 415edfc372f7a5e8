"""A classifier of images becomes the parts of a bundle: its own PyTorch code, traced, with a certificate.

B images, C channels, Y height, X width. Images are small and models too: one fp32 graph, exact in every batch.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from attendant.bundle import (
    ROWS,
    Certificate,
    Check,
    DType,
    Golden,
    GraphKind,
    GraphSpec,
    ImageInput,
    Limits,
    Role,
    TensorSpec,
)
from attendant.processor import processor_features
from export.certificate import PARITY_BOUND, relative_error, run_checks
from export.encode_runner import EncodeRunner
from export.encoder_task import classes_of
from export.errors import ExportRefused
from export.golden import BOUND as GOLDEN_BOUND
from export.golden import FILE as GOLDEN_FILE
from export.onnx_export import trace
from export.parts import Parts, Report
from models.checkpoint import TrainedModel
from models.hard_vision import HardVision
from models.vision import VisionTransformer

GRAPH_FILE = "encode.onnx"
_BATCHES = (1, 2, 5, 8, 32)
_NUM_IMAGES = 64
_NUM_GOLDEN = 8

Images = NDArray[np.float32]


def export_vision(
    directory: Path, model: TrainedModel, precision: str, max_model_len: int, text: object, report: Report
) -> Parts:
    """Write graph and golden run into `directory`, and return what the manifest says of them.

    Args:
        directory: where the bundle is being made.
        model: with a `VisionTransformer` or `HardVision`.
        precision: "fp32".
        max_model_len: the places that an image becomes.
        text: of no use.
        report: takes one line for every stage and check.

    Raises:
        ExportRefused: the model cannot be exported, or a check failed.
    """
    if precision != "fp32":
        raise ExportRefused(f"precision is {precision!r}: export knows models of images with 'fp32' only")
    module = model.module
    assert isinstance(module, VisionTransformer | HardVision)
    image = image_of(module)
    num_classes = (module.config.patch if isinstance(module, HardVision) else module.config).num_classes
    images = np.random.default_rng(0).random((_NUM_IMAGES, image.channels, image.height, image.width), np.float32)
    report("tracing and writing the fp32 graph")
    example, rows = torch.from_numpy(images[:2]), torch.export.Dim("rows", min=1)
    program = trace(module, (example,), ({0: rows},), inputs=["image"], outputs=["logits"])
    program.save(directory / GRAPH_FILE, external_data=True)
    graph = EncodeRunner(directory / GRAPH_FILE)
    report("checking the graph against the model")
    certificate = Certificate(checks=run_checks(_checks(graph, module, images), report))
    golden = images[:_NUM_GOLDEN]
    alone = np.concatenate([graph.images(each[None]) for each in golden])
    np.savez(directory / GOLDEN_FILE, image=golden, logits=alone)
    return Parts(
        family="hard-attention" if isinstance(module, HardVision) else "vision-transformer",
        tasks=("classify",),
        limits=Limits(max_model_len=max_model_len),
        graphs=(_spec(image, num_classes),),
        golden=Golden(file=GOLDEN_FILE, bound=GOLDEN_BOUND, bitwise=False, bitwise_on=processor_features()),
        certificate=certificate,
        image=image,
        classes=classes_of(model, num_classes),
    )


def num_places(module: VisionTransformer | HardVision) -> int:
    """Return how many places an image becomes: patches and a class token, and what hard attention chooses among."""
    if isinstance(module, HardVision):
        return module.config.rows * module.config.columns + num_places(module.patch)
    return module.config.encoder.num_patches + 1


def image_of(module: VisionTransformer | HardVision) -> ImageInput:
    """Describe the images that a model takes: with values from 0 to 1, as the recipes train."""
    rows = columns = 1
    encoder = module.config.patch.encoder if isinstance(module, HardVision) else module.config.encoder
    if isinstance(module, HardVision):
        rows, columns = module.config.rows, module.config.columns
    return ImageInput(
        height=rows * encoder.height,
        width=columns * encoder.width,
        channels=encoder.num_channels,
        mean=(0.0,) * encoder.num_channels,
        std=(1.0,) * encoder.num_channels,
    )


def _checks(graph: EncodeRunner, module: VisionTransformer | HardVision, images: Images) -> Iterator[Check]:
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    alone = np.concatenate([graph.images(image[None]) for image in images])
    yield Check(
        name="logits of one image",
        measured=relative_error(alone, expected),
        bound=PARITY_BOUND,
        grid=f"{len(images)} images of noise",
    )
    differing = 0
    for size in _BATCHES:
        together = np.concatenate([graph.images(images[start : start + size]) for start in range(0, len(images), size)])
        differing += int((together != alone).sum())
    yield Check(
        name="values that depend on neighbours",
        measured=float(differing),
        bound=0,
        grid=f"{len(images)} images in batches of {list(_BATCHES)}",
    )


def _spec(image: ImageInput, num_classes: int) -> GraphSpec:
    size = (ROWS, image.channels, image.height, image.width)
    return GraphSpec(
        kind=GraphKind.ENCODE,
        file=GRAPH_FILE,
        data=f"{GRAPH_FILE}.data",
        inputs=(TensorSpec(name="image", role=Role.IMAGE, dtype=DType.FLOAT32, axes=size),),
        outputs=(TensorSpec(name="logits", role=Role.LOGITS, dtype=DType.FLOAT32, axes=(ROWS, num_classes)),),
    )
