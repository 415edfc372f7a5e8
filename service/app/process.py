"""A server as a process: signals, and a watchdog over its end."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable

from service.app.server import App
from service.app.start_error import StartError
from service.settings import Settings

WATCHDOG_SECONDS = 15.0


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the draining.

    Raises:
        StartError: the server cannot start.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    app = App(settings, announce)
    try:
        await app.start()
        await _until_loaded(app, stop)
        await stop.wait()
    except StartError:
        hurry.set()
        raise
    finally:
        _start_watchdog(settings.drain_delay_seconds + settings.drain_seconds + WATCHDOG_SECONDS)
        await app.stop(hurry)


async def _until_loaded(app: App, stop: asyncio.Event) -> None:
    loaded, stopped = asyncio.create_task(app.wait_loaded()), asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait([loaded, stopped], return_when=asyncio.FIRST_COMPLETED)
    for waiter in (loaded, stopped):
        waiter.cancel()
    if loaded in done:
        loaded.result()


def _start_watchdog(seconds: float) -> None:
    """End the process hard if draining hangs: a container that does not leave is killed without a word."""
    watchdog = threading.Timer(seconds, os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
