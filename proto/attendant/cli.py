"""The command `attendant`: generate, chat, embed, classify, explain and more; models, health and latency of a server.

Text appears as it is generated. Ctrl-C cancels the request on the server; in a conversation it only ends the
answer.
"""

import argparse
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from time import perf_counter

from attendant import _options
from attendant._encoding_types import Classifiable, Classifications, FilledTexts, Taggings
from attendant._errors import AttendantError, InvalidRequest, Unavailable
from attendant._latency import latency_table
from attendant._sheet import sheet_of
from attendant._terminal import table, visible
from attendant._types import Delta, Finished, Message, Started
from attendant._watch import EVERY_SECONDS, NoAnswer, fetch, show_once, watch
from attendant.client import Client, GenerateStream
from attendant.heatmap import Sheet, entropy_table, render_html, render_terminal, takes_colours, write_pngs
from attendant.telemetry import duration

MAX_INPUTS = 256  # texts of one call
MAX_MAPS = 4  # that are drawn without being asked for
FAILED, MISUSED, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


class UsageError(Exception):
    """What the user asked for cannot be asked of a server."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = _options.parser(
        generate=generate,
        chat=chat,
        embed=embed,
        classify=classify,
        tag=tag,
        fill=fill,
        rerank=rerank,
        explain=explain,
        models=models,
        health=health,
        tokenize=tokenize,
        latency=latency,
        top=top,
    ).parse_args(arguments)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has left, and needs no word of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except AttendantError as error:
        return _complain(_explain(error, args), MISUSED if isinstance(error, InvalidRequest) else FAILED)
    except NoAnswer as error:
        return _complain(str(error), FAILED)
    except (UsageError, ValueError) as error:  # ValueError: an option does not fit its field
        return _complain(str(error), MISUSED)


def generate(args: argparse.Namespace) -> int:
    """Continue a prompt, or write about a text or an image."""
    is_alone = args.prompt is None and (args.image is not None or args.encoder_text is not None)
    prompt = None if is_alone else _text(args.prompt, "a prompt")
    image = None if args.image is None else _file(args.image)
    with Client(args.server) as client:
        model = _model(client, args, task="generate")
        options = _options.generate_options(args)
        _print_answer(client.generate(prompt, image=image, model=model, timeout=args.timeout, **options), args)
    return 0


def chat(args: argparse.Namespace) -> int:
    """Answer one message, or hold a conversation."""
    turns = [Message("system", args.system)] if args.system is not None else []
    with Client(args.server) as client:
        model = _model(client, args, task="generate")
        if args.message is not None or not sys.stdin.isatty():
            turns.append(Message("user", _text(args.message, "a message")))
            options = _options.generate_options(args)
            _print_answer(client.chat(turns, model=model, timeout=args.timeout, **options), args)
        else:
            _converse(client, model, turns, args)
    return 0


def _converse(client: Client, model: str, turns: list[Message], args: argparse.Namespace) -> None:
    with suppress(ImportError):  # gives input() its editing and history, where the platform has it
        import_module("readline")
    print(f"{model}: Ctrl-C ends an answer, Ctrl-D the conversation.", file=sys.stderr)
    while True:
        try:
            said = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if not said.strip():
            continue
        question = Message("user", said)
        stream = client.chat([*turns, question], model=model, timeout=args.timeout, **_options.generate_options(args))
        try:
            _print_answer(stream, args)
        except KeyboardInterrupt:
            stream.cancel()
            print()
        except AttendantError as error:
            _complain(_explain(error, args), FAILED)
        if stream.text:  # what was said so far belongs to the conversation, even if it was broken off
            turns += [question, Message("assistant", stream.text)]


def embed(args: argparse.Namespace) -> int:
    """Print one vector for each text."""
    texts = args.texts or _text(None, "texts").splitlines()
    with Client(args.server) as client:
        model = _model(client, args, task="embed")
        for start in range(0, len(texts), MAX_INPUTS):
            vectors = client.embed(
                texts[start : start + MAX_INPUTS],
                model=model,
                pooling=args.pooling,
                dimensions=args.dimensions,
                timeout=args.timeout,
                **_options.encode_options(args),
            )
            for vector in vectors:
                print(json.dumps([float(f"{value:.7g}") for value in vector]))
    return 0


def classify(args: argparse.Namespace) -> int:
    """Show the classes of texts or images."""
    inputs: list[Classifiable] = [_file(name) for name in args.image or ()]
    names = list(args.image or ())
    if not inputs:
        names = args.texts or _text(None, "texts").splitlines()
        inputs = [name if args.pair is None else (name, args.pair) for name in names]
    with Client(args.server) as client:
        found = client.classify(
            inputs,
            model=_model(client, args, task="classify"),
            top_k=args.top_k,
            resize=args.resize,
            timeout=args.timeout,
            **_options.encode_options(args),
        )
    if args.json:
        _print_json(found)
        return 0
    rows = [
        (visible(name), each.label, f"{each.probability:.4f}")
        for name, classification in zip(names, found, strict=True)
        for each in classification.classes
    ]
    print(table(("INPUT", "CLASS", "PROBABILITY"), rows, right=("PROBABILITY",)))
    return 0


def tag(args: argparse.Namespace) -> int:
    """Show the label of every token of a text."""
    with Client(args.server) as client:
        model = _model(client, args, task="tag")
        options = _options.encode_options(args)
        found = client.tag(_text(args.text, "a text"), model=model, timeout=args.timeout, **options)
    if args.json:
        _print_json(found)
        return 0
    tokens = found.taggings[0].tokens
    rows = [(visible(each.token), each.label, f"{each.probability:.4f}", f"{each.start}-{each.end}") for each in tokens]
    print(table(("TOKEN", "LABEL", "PROBABILITY", "CHARACTERS"), rows, right=("PROBABILITY",)))
    return 0


def fill(args: argparse.Namespace) -> int:
    """Show what might stand in the gaps of a text."""
    with Client(args.server) as client:
        found = client.fill_mask(
            _text(args.text, "a text"),
            model=_model(client, args, task="fill_mask"),
            top_k=args.top_k,
            timeout=args.timeout,
            **_options.encode_options(args),
        )
    if args.json:
        _print_json(found)
        return 0
    rows = [
        (str(mask.position), visible(each.token), f"{each.probability:.4f}")
        for mask in found.texts[0].masks
        for each in mask.candidates
    ]
    print(table(("POSITION", "TOKEN", "PROBABILITY"), rows, right=("POSITION", "PROBABILITY")))
    return 0


def rerank(args: argparse.Namespace) -> int:
    """Show texts in order of relevance to a query."""
    texts = args.texts or _text(None, "texts").splitlines()
    with Client(args.server) as client:
        model = _model(client, args, task="score")
        options = _options.encode_options(args)
        found = client.rerank(args.query, texts, model=model, timeout=args.timeout, **options)
    if args.json:
        print(json.dumps(asdict(found)))
        return 0
    rows = [(f"{found.scores[index].score:.4f}", visible(texts[index])) for index in found.order]
    print(table(("SCORE", "TEXT"), rows, right=("SCORE",)))
    return 0


def explain(args: argparse.Namespace) -> int:
    """Show the entropy of every head, and heat maps."""
    image = None if args.image is None else _file(args.image)
    text = _text(args.text, "a text") if image is None else args.text
    with Client(args.server) as client:
        found = client.explain(
            text,
            model=_model(client, args, task="explain"),
            image=image,
            target=args.target,
            kinds=args.kind,
            layers=args.layer,
            heads=args.head,
            timeout=args.timeout,
        )
    if args.json:
        print(json.dumps(asdict(found), ensure_ascii=False))
        return 0
    _draw(sheet_of(found, f"{found.model}: {args.image or text}"), args)
    return 0


def _draw(sheet: Sheet, args: argparse.Namespace) -> None:
    """Print the entropies, and the maps wherever they are wanted; on the terminal if they are few."""
    print(entropy_table(sheet))
    if args.png is not None:
        for path in write_pngs(sheet, Path(args.png)):
            print(path)
    if args.html is not None:
        Path(args.html).write_text(render_html(sheet), encoding="utf-8")
        print(args.html)
    num_maps = sum(len(layer.heads) for layer in sheet.layers)
    if args.terminal or (num_maps <= MAX_MAPS and args.png is None and args.html is None):
        print(f"\n{render_terminal(sheet, colours=takes_colours(sys.stdout))}")
    elif args.png is None and args.html is None:
        print(f"{num_maps} heat maps: choose with --layer and --head, or draw all with --terminal", file=sys.stderr)


def models(args: argparse.Namespace) -> int:
    """List the models of the server, the refused ones with the reason."""
    with Client(args.server) as client:
        found = client.models(timeout=args.timeout)
    if args.json:
        for model in found:
            print(json.dumps(asdict(model)))
        return 0
    header = ("MODEL", "STATE", "PRECISION", "READS", "CONTEXT", "TASKS", "REASON")
    rows = [
        (
            model.key,
            model.state,
            model.precision,
            model.reads,
            str(model.max_model_len or ""),
            ",".join(model.tasks),
            visible(" ".join(model.reason.split())),
        )
        for model in found
    ]
    print(table(header, rows, right=("CONTEXT",)) if rows else "The server's repository holds no model.")
    return 0


def health(args: argparse.Namespace) -> int:
    """Say whether a server, or one of its models, is ready for requests; exit status 0 means yes, anything else no."""
    name = f"model/{args.model}" if args.model else args.name
    with Client(args.server) as client:
        is_serving = client.is_serving(name, timeout=args.timeout)
    print(f"{name}: {'serving' if is_serving else 'not serving'}")
    return 0 if is_serving else FAILED


def tokenize(args: argparse.Namespace) -> int:
    """Show the tokens of a text."""
    text = _text(args.text, "a text")
    with Client(args.server) as client:
        tokens = client.tokenize(text, model=_model(client, args), timeout=args.timeout)
    if args.json:
        print(json.dumps(asdict(tokens), ensure_ascii=False))
    else:
        rows = [(str(i), visible(token)) for i, token in zip(tokens.token_ids, tokens.tokens, strict=True)]
        print(table(("ID", "TOKEN"), rows, right=("ID",)))
    return 0


def latency(args: argparse.Namespace) -> int:
    """Show latency by sequence length."""
    text, _ = fetch(args.metrics)
    print(latency_table(text, model=args.model) or "Nothing has been measured yet.")
    return 0


def top(args: argparse.Namespace) -> int:
    """Show what the server does now, until Ctrl-C."""
    if args.once:
        print(*show_once(args.metrics, args.model, over=args.every), sep="\n")
        return 0
    with suppress(KeyboardInterrupt):
        watch(args.metrics, args.model, every=args.every or EVERY_SECONDS)
    return 0


def _print_answer(stream: GenerateStream, args: argparse.Namespace) -> None:
    begin, first = perf_counter(), None
    shows_escapes = not sys.stdout.isatty()
    with stream:
        for event in stream.events():
            if args.json:
                print(json.dumps({"event": type(event).__name__.lower(), **asdict(event)}), flush=True)
            elif isinstance(event, Delta):
                if event.index > 0:
                    sys.stdout.write("\n")
                sys.stdout.write(event.text if shows_escapes else visible(event.text))
                sys.stdout.flush()
            if isinstance(event, Delta) and first is None:
                first = perf_counter() - begin
    if not args.json:
        print(flush=True)
    if args.stats and stream.started and stream.finished:
        print(_stats(stream.started, stream.finished, first or 0.0), file=sys.stderr)


def _stats(started: Started, finished: Finished, first: float) -> str:
    usage, timings = finished.usage, finished.timings
    rate = (usage.output_tokens - 1) / timings.decode_seconds if timings.decode_seconds > 0 else 0.0
    return (
        f"{started.model}: {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
        f"{usage.output_tokens} generated, ended by {finished.finish_reason}; seed {started.seed}\n"
        f"first token after {duration(first)}, then {rate:.0f} tokens/s; on the server: "
        f"queue {duration(timings.queue_seconds)}, tokenise {duration(timings.tokenise_seconds)}, "
        f"prefill {duration(timings.prefill_seconds)}, decode {duration(timings.decode_seconds)}, "
        f"total {duration(timings.total_seconds)}"
    )


def _print_json(found: Classifications | Taggings | FilledTexts) -> None:
    for each in found:
        print(json.dumps(asdict(each), ensure_ascii=False))


def _text(given: str | None, what: str) -> str:
    """Return what was given as an argument, or else standard input."""
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise UsageError(f"give {what} as an argument or on standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8: {error}") from None


def _file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def _model(client: Client, args: argparse.Namespace, *, task: str | None = None) -> str:
    """Return the model that was asked for, or the only one there is for a task (None: of all)."""
    if args.model:
        return str(args.model)
    ready = [model for model in client.models(timeout=args.timeout) if model.state == "ready"]
    names = sorted({model.name for model in ready if task is None or task in model.tasks})
    if len(names) == 1:
        return names[0]
    if not names:
        what = f" that can {task}" if task else ""
        raise UsageError(f"the server has no model ready{what}; `attendant models` says why")
    raise UsageError(f"choose a model with --model: {', '.join(names)}")


def _explain(error: AttendantError, args: argparse.Namespace) -> str:
    """Return one line about an error."""
    text = " ".join(error.message.split()) or "no reason given"
    if isinstance(error, Unavailable) and not error.reason:
        text = f"no server answers at {args.server} ({text})"
    if error.retry_after is not None:
        text += f"; worth trying again in {duration(error.retry_after)}"
    return f"{text} [{error.reason or error.code.name}]"


def _complain(text: str, status: int) -> int:
    print(f"attendant: {visible(text)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
