"""The command line of `attendant`: its words, their help and their types, but not what they do."""

import argparse
import os
from collections.abc import Callable
from math import inf
from typing import Final, cast

from attendant._encoding import EncodeOptions
from attendant._messages import GenerateOptions

Run = Callable[[argparse.Namespace], int]

_SAMPLING: Final[dict[str, tuple[type, str]]] = {
    "max_tokens": (int, "most tokens to generate (default: 256, or what fits)"),
    "min_tokens": (int, "do not stop before this many tokens"),
    "temperature": (float, "0 always takes the most likely token (default: the model's, or 1)"),
    "top_k": (int, "choose among the K most likely tokens"),
    "top_p": (float, "choose among the most likely tokens whose probabilities reach this sum"),
    "min_p": (float, "drop tokens less likely than this share of the most likely one"),
    "repetition_penalty": (float, "over 1: repeat less of prompt and answer"),
    "presence_penalty": (float, "subtracted from tokens already generated"),
    "frequency_penalty": (float, "subtracted for each time a token was generated"),
    "seed": (int, "makes the same answer come again"),
    "priority": (int, "more urgent if larger, -100 to 100"),
    "latency_budget": (float, "seconds within which the whole answer is wanted"),
    "beam_width": (int, "search for the most likely answers, pursuing this many"),
    "length_penalty": (float, "of a search: prefer longer answers the larger it is (default: 1)"),
    "n": (int, "of a search: how many answers, one a line (default: 1)"),
    "top_logprobs": (int, "report this many alternatives for each token (with --logprobs and --json)"),
}
_SWITCHES: Final[dict[str, str]] = {
    "ignore_eos": "go on past the model's own end",
    "logprobs": "report the log-probability of each token (with --json)",
    "echo": "begin the answer with the prompt",
    "alignment": "report where in the source each token comes from (with --json)",
}


def parser(
    *,
    generate: Run,
    chat: Run,
    embed: Run,
    classify: Run,
    tag: Run,
    fill: Run,
    rerank: Run,
    explain: Run,
    models: Run,
    health: Run,
    tokenize: Run,
    latency: Run,
    top: Run,
) -> argparse.ArgumentParser:
    """Return the parser; each command's namespace carries the function that runs it as `run`."""
    root = argparse.ArgumentParser(
        prog="attendant",
        description="Talk to an Attendant server.",
        epilog="ATTENDANT_SERVER, ATTENDANT_MODEL and ATTENDANT_METRICS stand in for --server, --model and --metrics. "
        "Exit status: 0 done, 1 the call failed, 2 the request was wrong, 130 interrupted.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _command(commands, "generate", generate, "continue a prompt")
    command.add_argument("prompt", nargs="?", help="the prompt; read from standard input if absent or -")
    command.add_argument("--image", metavar="FILE", help="a PNG or JPEG file to write about, instead of a prompt")
    command.add_argument(
        "--encoder-text", metavar="TEXT", help="what to write about, where the prompt is the beginning"
    )
    _add_generation(command)

    command = _command(commands, "chat", chat, "talk with a model")
    command.add_argument("message", nargs="?", help="one message; without it, a conversation until Ctrl-D")
    command.add_argument("--system", metavar="TEXT", help="what the system says first")
    _add_generation(command)

    command = _command(commands, "embed", embed, "turn texts into vectors, one JSON array a line")
    command.add_argument("texts", nargs="*", help="the texts; the lines of standard input if there are none")
    _add_model(command)
    command.add_argument("--pooling", choices=("mean", "cls", "max", "last"), help="default: the model's")
    command.add_argument("--dimensions", type=int, metavar="N", help="keep so many leading components")
    _add_encode_options(command)

    command = _command(commands, "classify", classify, "say which classes texts or images belong to")
    command.add_argument("texts", nargs="*", help="the texts; the lines of standard input if there are none")
    command.add_argument("--image", action="append", metavar="FILE", help="a PNG or JPEG file (repeatable)")
    command.add_argument("--pair", metavar="TEXT", help="the second text of a pair, the same for all texts")
    command.add_argument("--resize", action="store_true", help="bring images to the model's size, instead of failing")
    command.add_argument("--top-k", type=int, metavar="K", help="show so many classes (default: all)")
    _add_encoding(command)

    command = _command(commands, "tag", tag, "label every token of a text")
    command.add_argument("text", nargs="?", help="the text; read from standard input if absent or -")
    _add_encoding(command)

    command = _command(commands, "fill", fill, "say what might stand in the gaps of a text")
    command.add_argument("text", nargs="?", help="text with the model's mask token; standard input if absent or -")
    command.add_argument("--top-k", type=int, metavar="K", help="show so many tokens for each gap (default: 5)")
    _add_encoding(command)

    command = _command(commands, "rerank", rerank, "put texts in order of relevance to a query")
    command.add_argument("query", help="what is asked")
    command.add_argument("texts", nargs="*", help="the texts; the lines of standard input if there are none")
    _add_encoding(command)

    _add_explain(_command(commands, "explain", explain, "show where a model looks"))

    command = _command(commands, "models", models, "list the models of the server")
    command.add_argument("--json", action="store_true", help="one JSON object a line")

    _add_health(_command(commands, "health", health, "say whether a server is ready; its exit status says so too"))

    command = _command(commands, "tokenize", tokenize, "show the tokens of a text")
    command.add_argument("text", nargs="?", help="the text; read from standard input if absent or -")
    _add_model(command)
    command.add_argument("--json", action="store_true", help="one JSON object")

    _add_metrics(commands, "latency", latency, "show latency by sequence length")

    command = _add_metrics(commands, "top", top, "show what the server does, until Ctrl-C")
    command.add_argument(
        "--every",
        type=_positive,
        metavar="SECONDS",
        help="between two frames (default: 2); with --once, how long to look",
    )
    command.add_argument(
        "--once",
        action="store_true",
        help="print one frame and end: of everything since the server started, or of the next --every seconds",
    )
    return root


def _add_encoding(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    _add_encode_options(command)
    command.add_argument("--json", action="store_true", help="one JSON object a line")


def _add_encode_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--truncate", action="store_true", help="cut texts that are too long, instead of failing")
    for name in ("priority", "latency_budget"):
        kind, text = _SAMPLING[name]
        metavar = "N" if kind is int else "X"
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def encode_options(args: argparse.Namespace) -> EncodeOptions:
    """Return the options that all tasks of encoders have, as they were given."""
    return {"truncate": args.truncate, "priority": args.priority, "latency_budget": args.latency_budget}


def _add_health(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "name", nargs="?", default="readiness", help="startup, readiness, liveness or model/NAME (default: %(default)s)"
    )
    command.add_argument("--model", metavar="NAME", help='"name" or "name/version": whether that one is served')
    command.set_defaults(timeout=5.0)


def _add_explain(command: argparse.ArgumentParser) -> None:
    command.add_argument("text", nargs="?", help="what the model reads; from standard input if absent or -")
    _add_model(command)
    command.add_argument("--image", metavar="FILE", help="a PNG or JPEG file that it reads instead")
    command.add_argument("--target", metavar="TEXT", help="what it writes about that (default: its own answer)")
    command.add_argument("--kind", action="append", metavar="NAME", default=[], help="only this kind (repeatable)")
    command.add_argument("--layer", action="append", type=int, metavar="N", default=[], help="only this layer, from 0")
    command.add_argument("--head", action="append", type=int, metavar="N", default=[], help="only this head, from 0")
    command.add_argument("--terminal", action="store_true", help="draw the maps here, however many there are")
    command.add_argument("--png", metavar="DIR", help="write one picture for each layer into DIR")
    command.add_argument("--html", metavar="FILE", help="write all maps as one page")
    command.add_argument("--json", action="store_true", help="one JSON object")


def _described(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: Run, text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    return command


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: Run, text: str
) -> argparse.ArgumentParser:
    command = _described(commands, name, run, text)
    command.add_argument(
        "--server",
        metavar="HOST:PORT",
        default=os.environ.get("ATTENDANT_SERVER", "localhost:8001"),
        help="where the server listens (default: %(default)s)",
    )
    command.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this time")
    return command


def _add_metrics(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: Run, text: str
) -> argparse.ArgumentParser:
    command = _described(commands, name, run, text)
    command.add_argument(
        "--metrics",
        metavar="URL",
        default=os.environ.get("ATTENDANT_METRICS", "http://localhost:8002/metrics"),
        help="the server's metrics (default: %(default)s)",
    )
    _add_model(command, default="all")
    return command


def _positive(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < inf:
        raise argparse.ArgumentTypeError(f"{text} is no time that passes; give a number of seconds over 0")
    return seconds


def _add_model(command: argparse.ArgumentParser, default: str = "the only one served") -> None:
    command.add_argument(
        "--model",
        metavar="NAME",
        default=os.environ.get("ATTENDANT_MODEL"),
        help=f'"name" or "name/version" (default: {default})',
    )


def _add_generation(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    for name, (kind, text) in _SAMPLING.items():
        metavar = "N" if kind is int else "X"
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    command.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text (repeatable)")
    for name, text in _SWITCHES.items():
        command.add_argument(f"--{name.replace('_', '-')}", action="store_true", default=None, help=text)
    command.add_argument("--json", action="store_true", help="one JSON object a line for each event")
    command.add_argument("--stats", action="store_true", help="print counts and timings to standard error")


def generate_options(args: argparse.Namespace) -> GenerateOptions:
    """Return the options of generation that were given."""
    given = {name: getattr(args, name) for name in ("stop", *_SAMPLING, *_SWITCHES)}
    if getattr(args, "encoder_text", None) is not None:
        given["encoder_text"] = args.encoder_text
    return cast(GenerateOptions, given)
