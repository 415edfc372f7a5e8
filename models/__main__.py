"""Command line of this room: train a recipe, import pretrained weights, show a checkpoint."""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

from models import checkpoint
from models.readers import gguf, huggingface
from models.recipes import run

READERS = {"gguf": gguf.read, "huggingface": huggingface.read}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; an expected failure is one line on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a recipe into a checkpoint")
    train.add_argument("recipe", choices=run.RECIPES)
    train.add_argument("--config", type=Path, metavar="FILE.toml", help="default: the recipe's own in models/recipes")
    train.add_argument("--out", type=Path, metavar="DIR", help="directory of the run; default: build/models/RECIPE")
    train.add_argument("--resume", action="store_true", help="continue the run in DIR")
    train.add_argument("--seed", type=int, help="in place of the configuration's")
    train.set_defaults(command=_train)

    importer = commands.add_parser("import", help="turn pretrained weights into a checkpoint")
    importer.add_argument("format", choices=sorted(READERS))
    importer.add_argument("source", type=Path, help="a GGUF file, or a Hugging Face directory")
    importer.add_argument("directory", type=Path, metavar="DIR", help="where the checkpoint is written")
    importer.add_argument("--licence", help="where the source names none: its SPDX identifier")
    importer.set_defaults(command=_import)

    show = commands.add_parser("show", help="print a checkpoint's configuration, size and states")
    show.add_argument("directory", type=Path, metavar="DIR")
    show.set_defaults(command=_show)
    return parser


def _train(arguments: argparse.Namespace) -> None:
    directory = arguments.out or Path("build/models") / arguments.recipe
    run.train(
        arguments.recipe,
        directory=directory,
        config_file=arguments.config,
        seed=arguments.seed,
        resume=arguments.resume,
    )
    print(f"checkpoint: {directory / 'checkpoint'}")


def _import(arguments: argparse.Namespace) -> None:
    model = READERS[arguments.format](arguments.source)
    if arguments.licence is not None:
        model = replace(model, licence=arguments.licence)
    checkpoint.save(model, arguments.directory)
    print(f"checkpoint: {arguments.directory}")


def _show(arguments: argparse.Namespace) -> None:
    model = checkpoint.load(arguments.directory)
    for name in ("source", "licence", "recipe", "data"):
        if (value := getattr(model, name)) is not None:
            print(f"{name:<16}{value}")
    for name, value in asdict(model.module.config).items():
        print(f"{name:<16}{value}")
    print(f"{'parameters':<16}{sum(parameter.numel() for parameter in model.module.parameters()):,}")
    specs = model.module.state_specs()
    for spec in specs:
        print(f"state {spec.name:<10}{spec.rule:<8} {spec.dtype} {list(spec.shape)}")
    print(f"{'states':<16}{sum(spec.bytes_per_token for spec in specs):,} bytes for each token")


if __name__ == "__main__":
    sys.exit(main())
