"""`python -m service --repository DIR ...`: serve a repository of bundles over gRPC; `simulate`: as if it did."""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from service.settings import SettingsError, load_settings
from service.simulation.command import main as simulate

USAGE_ERROR = 2
START_ERROR = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal, or simulate; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["simulate"]:
        return simulate(given[1:])
    try:
        settings = load_settings(given)
    except SettingsError as error:
        print(f"{error}\n`python -m service --help` lists the settings", file=sys.stderr)
        return USAGE_ERROR
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # ONNX Runtime would report its use to its makers; it asks once, when it is loaded.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # Loading the runtime takes a second that wrong settings need not wait for.
    from service.app import StartError, serve  # noqa: PLC0415

    try:
        asyncio.run(serve(settings, _announce))
    except StartError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return START_ERROR
    return 0


def _announce(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
