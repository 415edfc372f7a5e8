"""Command line of this room: `python -m export SOURCE REPOSITORY --name NAME`."""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import torch
from pydantic import ValidationError

from attendant.bundle import SamplingDefaults
from export import own_model
from export.bundle import CPU_PRECISIONS, CUDA_PRECISIONS, ExportRefused, Target, export_bundle
from export.half import HALF_TYPES
from models import checkpoint, synthetic
from models.checkpoint import TrainedModel
from models.readers import gguf, huggingface
from models.readers.packaged import MINILM, SMOLLM2, PackagedWeights

PRETRAINED: dict[str, tuple[PackagedWeights, SamplingDefaults | None]] = {
    "all-minilm-l6-v2": (MINILM, None),
    "smollm2-135m": (SMOLLM2, SamplingDefaults(temperature=0.2, top_p=0.9)),
}


def main(argv: list[str] | None = None) -> int:
    """Export one bundle and return the exit status; an expected failure is one line on standard error."""
    given = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the half-written bundle is removed, as on Ctrl-C
    started = time.monotonic()

    def report(line: str) -> None:
        print(f"{given.name}  {time.monotonic() - started:5.1f} s  {line}", flush=True)

    try:
        target = Target(repository=given.repository, name=given.name, version=given.version)
        asked = _sampling_defaults(given.sampling_default)
        report(f"{target.name}/{target.version} in {given.precision}: reading weights")
        model, advised = _read(given)
        export_bundle(
            model,
            target,
            precision=given.precision,
            max_model_len=given.max_model_len,
            sampling_defaults=asked or advised,
            explain=given.explain,
            force=given.force,
            report=report,
        )
    except (ExportRefused, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description="Write a certified bundle.")
    parser.add_argument("source", nargs="?", type=Path, help="a checkpoint, a GGUF file or a Hugging Face directory")
    parser.add_argument("--pretrained", choices=sorted(PRETRAINED), help="weights of an installed package, not SOURCE")
    parser.add_argument(
        "--synthetic", choices=sorted(synthetic.SHAPES), help="random weights of this shape for sizing, not SOURCE"
    )
    parser.add_argument(
        "--module",
        metavar="FILE.py:FUNCTION",
        help="a model of your own, not SOURCE: FUNCTION() returns a models.checkpoint.TrainedModel",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="with --module: its weights, a safetensors file or a directory with one"
    )
    parser.add_argument("repository", type=Path, help="the bundle becomes REPOSITORY/NAME/VERSION")
    parser.add_argument("--name", required=True, help="what callers ask for")
    parser.add_argument("--version", type=int, default=1, help="a positive number (default: 1)")
    parser.add_argument(
        "--precision",
        choices=(*CPU_PRECISIONS, *CUDA_PRECISIONS),
        default="fp32",
        help="fp32 (default) and int8 are for the CPU, fp16 and bf16 for CUDA",
    )
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest sequence (default: the model's)")
    parser.add_argument(
        "--sampling-default",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"what to advise where a request is silent: {', '.join(SamplingDefaults.model_fields)}",
    )
    parser.add_argument(
        "--explain",
        action=argparse.BooleanOptionalAction,
        help="add a graph that shows attention weights (default: if it adds at most 256 MiB to the bundle)",
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle of the same name and version")
    return parser


def _read(given: argparse.Namespace) -> tuple[TrainedModel, SamplingDefaults | None]:
    """Return the model, and what its authors advise for sampling if that is known."""
    source: Path | None = given.source
    if [source, given.pretrained, given.synthetic, given.module].count(None) != 3:
        raise ValueError("name one of SOURCE, --pretrained, --synthetic and --module")
    if given.checkpoint is not None and given.module is None:
        raise ValueError("--checkpoint holds the weights of a --module; name a checkpoint of ours as SOURCE")
    if given.module is not None:
        return own_model.read(given.module, given.checkpoint), None
    if given.synthetic is not None:
        return synthetic.draw(given.synthetic, HALF_TYPES.get(given.precision, torch.float32)), None
    if source is None:
        weights, advised = PRETRAINED[given.pretrained]
        return weights.read(), advised
    if source.is_file():
        return gguf.read(source), None
    # Both kinds of directory have a config.json; ours says what it is.
    if checkpoint.FORMAT in (source / checkpoint.CONFIG).read_text("utf-8"):
        return checkpoint.load(source), None
    return huggingface.read(source), None


def _sampling_defaults(pairs: list[str]) -> SamplingDefaults | None:
    """Return the advised fields of FIELD=VALUE pairs, or None without any."""
    fields = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"--sampling-default {pair}: {value!r} is not a number") from None
    try:
        return SamplingDefaults(**fields) if fields else None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        allowed = ", ".join(SamplingDefaults.model_fields)
        raise ValueError(f"--sampling-default {first['loc'][0]}: {first['msg']}; fields are {allowed}") from None


if __name__ == "__main__":
    sys.exit(main())
