"""Threads for text: rendering and tokenising take milliseconds that the event loop does not have."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.errors import QueueFull

T = TypeVar("T")


class TextWorkers:
    """A few threads behind a bounded queue.

    Args:
        threads: how many jobs run at once.
        max_waiting: how many more may wait before they are refused.
        what: the jobs, in words.
    """

    def __init__(self, threads: int, max_waiting: int, what: str = "texts") -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=what)
        self._what = what
        self._limit = threads + max_waiting
        self._pending = 0

    async def run(self, job: Callable[[], T], *, accepted: bool = False) -> T:
        """Run a job in a thread and return what it returns.

        Args:
            job: the job.
            accepted: it belongs to a request that runs already, and waits however many others do.

        Raises:
            QueueFull: too many jobs wait.
        """
        if self._pending >= self._limit and not accepted:
            raise QueueFull(
                f"{self._pending} {self._what} wait for a thread, the limit is {self._limit}",
                0.1,
                {"waiting": str(self._pending), "max_waiting": str(self._limit)},
            )
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, job)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Take no more jobs; those that run are left to end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)
