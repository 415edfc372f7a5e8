"""The loop of `attendant top`: scrape, draw, wait; through restarts and absences of the server until Ctrl-C."""

import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from textwrap import wrap

from attendant._terminal import visible
from attendant._top import frame
from attendant.telemetry import Scrape, duration, is_restarted, loads, parse, samples, since

EVERY_SECONDS = 2.0
"""Between two frames, unless said otherwise."""

_TIMEOUT_SECONDS = 10.0
_NO_TERMINAL = (1000, 1000)  # a pipe takes lines of any length
_OPEN = "\x1b[?1049h\x1b[?25l"  # a screen of its own, without a cursor
_CLOSE = "\x1b[?25h\x1b[?1049l"
_HOME, _TO_LINE_END, _TO_SCREEN_END = "\x1b[H", "\x1b[K", "\x1b[J"


class NoAnswer(Exception):
    """The metrics cannot be read; the text says why."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One scrape.

    Args:
        scrape: what it says.
        taken: when, on this machine's monotonic clock.
        server_time: when, on the server's own clock, in seconds since the epoch; None if it does not say.
    """

    scrape: Scrape
    taken: float = field(default_factory=time.monotonic)
    server_time: float | None = None

    @property
    def uptime(self) -> float | None:
        """Seconds for which the server has run."""
        started = self.scrape.get("process_start_time_seconds")
        return None if started is None or self.server_time is None else self.server_time - started


def fetch(url: str, timeout: float = _TIMEOUT_SECONDS) -> tuple[str, str | None]:
    """Return what a metrics endpoint answers, and its clock's Date.

    Raises:
        NoAnswer: it cannot be read.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return response.read().decode("utf-8", errors="replace"), response.headers["Date"]
    except (OSError, ValueError, HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise NoAnswer(f"cannot read {url}: {reason}") from error


def read(url: str) -> Reading:
    """Scrape once.

    Raises:
        NoAnswer: nobody answers, or somebody else.
    """
    text, date = fetch(url)
    scrape = parse(text)
    if not any(series.startswith("attendant_") for series in scrape):
        raise NoAnswer(f"{url} shows no metrics of Attendant")
    return Reading(scrape, server_time=None if date is None else parsedate_to_datetime(date).timestamp())


def show_once(url: str, model: str | None, over: float | None) -> list[str]:
    """Return one frame: of everything since the server started, or of the seconds `over` which to look.

    Raises:
        NoAnswer: nobody answers.
    """
    first = read(url)
    if over is None:
        return _page(*_draw(url, model, None, first))
    time.sleep(over)
    return _page(*_draw(url, model, first, read(url)))


def watch(url: str, model: str | None, every: float) -> None:
    """Show a new frame every so many seconds until interrupted; where output is no terminal, one below the other.

    Raises:
        KeyboardInterrupt: Ctrl-C; the terminal is as it was.
    """
    with _screen() as show:
        last: Reading | None = None
        body: list[str] = []
        while True:
            try:
                reading = read(url)
            except NoAnswer as error:
                gone = f"; last answer {duration(time.monotonic() - last.taken)} ago" if last else ""
                heading = f"{error}{gone}; trying again every {duration(every)}"
            else:
                heading, body = _draw(url, model, last, reading)
                last = reading
            show(_page(heading, body))
            time.sleep(every)


def _draw(url: str, model: str | None, last: Reading | None, reading: Reading) -> tuple[str, list[str]]:
    """Return what a frame is about, and its lines."""
    if last is None or is_restarted(reading.scrape, last.scrape):
        scrape, seconds = reading.scrape, reading.uptime
        period = "since the server started" + (f", {duration(seconds)} ago" if seconds else "")
    else:
        scrape, seconds = since(reading.scrape, last.scrape), reading.taken - last.taken
        period = f"the last {duration(seconds)}"
    found = [load for load in loads(samples(scrape)) if load.is_called(model)]
    return f"{url}: {period}", frame(found, seconds, width=_width())


def _page(heading: str, body: list[str]) -> list[str]:
    return [*wrap(visible(heading), _width()), "", *body]


def _width() -> int:
    return shutil.get_terminal_size(_NO_TERMINAL).columns


@contextmanager
def _screen() -> Iterator[Callable[[list[str]], None]]:
    """Give what shows a frame: in place on a terminal, cut to its size, and else one after the other."""
    if not sys.stdout.isatty():
        yield lambda lines: print(*lines, "", sep="\n", flush=True)
        return

    def show(lines: list[str]) -> None:
        columns, rows = shutil.get_terminal_size()
        cut = [line[:columns] + _TO_LINE_END for line in lines[:rows]]
        sys.stdout.write(_HOME + "\n".join(cut) + _TO_SCREEN_END)
        sys.stdout.flush()

    sys.stdout.write(_OPEN)
    try:
        yield show
    finally:
        sys.stdout.write(_CLOSE)
        sys.stdout.flush()
