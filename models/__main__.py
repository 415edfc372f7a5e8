"""Command line of this room: train a recipe, import pretrained weights, show a checkpoint, write a test picture."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from attendant.heatmap import entropy_table, render_html, render_terminal, takes_colours, write_pngs
from models import checkpoint, show
from models.examples import PICTURES, Example, picture, png
from models.readers import gguf, huggingface
from models.recipes import run
from models.training.loop import CHECKPOINT

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

    evaluator = commands.add_parser("evaluate", help="print what a recipe's checkpoint achieves on held-out data")
    evaluator.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint")
    evaluator.set_defaults(command=_evaluate)

    halver = commands.add_parser("halve", help="store a checkpoint's weights in half precision, in half the space")
    halver.add_argument("source", type=Path, metavar="CHECKPOINT")
    halver.add_argument("directory", type=Path, metavar="DIR", help="where the smaller checkpoint is written")
    halver.set_defaults(command=_halve)

    importer = commands.add_parser("import", help="turn pretrained weights into a checkpoint")
    importer.add_argument("format", choices=sorted(READERS))
    importer.add_argument("source", type=Path, help="a GGUF file, or a Hugging Face directory")
    importer.add_argument("directory", type=Path, metavar="DIR", help="where the checkpoint is written")
    importer.add_argument("--licence", help="where the source names none: its SPDX identifier")
    importer.set_defaults(command=_import)

    shower = commands.add_parser("show", help="print a checkpoint's configuration, or where it looks in an example")
    shower.add_argument("directory", type=Path, metavar="DIR")
    shower.add_argument("--text", help="what the model reads; prints the entropy of every head")
    shower.add_argument("--image", type=int, metavar="INDEX", help="which test picture it reads instead")
    shower.add_argument("--target", metavar="TEXT", help="what it writes about that; default: its own answer")
    shower.add_argument(
        "--layer", type=int, action="append", metavar="N", help="only the Nth layer, from 0; may be repeated"
    )
    shower.add_argument("--terminal", action="store_true", help="print heat maps as well")
    shower.add_argument("--png", type=Path, metavar="DIR", help="write one heat map for each layer into DIR")
    shower.add_argument("--html", type=Path, metavar="FILE", help="write all heat maps as one page")
    shower.set_defaults(command=_show)

    painter = commands.add_parser("picture", help="write a test picture as PNG, to ask a served model about")
    painter.add_argument("kind", choices=sorted(PICTURES), help="a digit, a digit in clutter, or a scene of digits")
    painter.add_argument("index", type=int, metavar="INDEX", help="which of the test pictures")
    painter.add_argument("file", type=Path, metavar="FILE.png")
    painter.set_defaults(command=_picture)
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
    print(f"checkpoint: {directory / CHECKPOINT}")


def _evaluate(arguments: argparse.Namespace) -> None:
    for name, value in run.evaluate(arguments.directory).items():
        print(f"{name:<32}{value:.4f}")


def _halve(arguments: argparse.Namespace) -> None:
    checkpoint.save(checkpoint.load(arguments.source), arguments.directory, half=True)
    print(f"checkpoint: {arguments.directory}")


def _import(arguments: argparse.Namespace) -> None:
    model = READERS[arguments.format](arguments.source)
    if arguments.licence is not None:
        model = replace(model, licence=arguments.licence)
    checkpoint.save(model, arguments.directory)
    print(f"checkpoint: {arguments.directory}")


def _show(arguments: argparse.Namespace) -> None:
    example = Example(text=arguments.text, image=arguments.image, target=arguments.target)
    if example.text is None and example.image is None:
        for name in ("target", "layer", "terminal", "png", "html"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} is about an example; give one with --text or --image")
        print("\n".join(show.description(checkpoint.load(arguments.directory))))
        return
    sheet = show.attention(checkpoint.load(arguments.directory), example)
    if arguments.layer:
        sheet = show.only(sheet, arguments.layer)
    print(entropy_table(sheet))
    if arguments.terminal:
        print(f"\n{render_terminal(sheet, colours=takes_colours(sys.stdout))}")
    if arguments.png is not None:
        for path in write_pngs(sheet, arguments.png):
            print(path)
    if arguments.html is not None:
        arguments.html.write_text(render_html(sheet), encoding="utf-8")
        print(arguments.html)


def _picture(arguments: argparse.Namespace) -> None:
    arguments.file.write_bytes(png(picture(arguments.index, *PICTURES[arguments.kind])))
    print(arguments.file)


if __name__ == "__main__":
    sys.exit(main())
