"""Many threads use a device together, or one alone.

CUDA lets no thread of a process allocate, nor wait in some ways, while another one captures a run: whoever does it all
the same fails, and so may the capture. So captures are made alone, each for itself, and everything else is done
together: a bundle that begins to serve holds up the others for milliseconds and breaks nothing of theirs.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Who may use what is shared. Who waits to be alone goes before all who come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()  # threads, and how often each came in
        self._num_lonely = 0  # who are alone, or wait for it

    @contextmanager
    def together(self) -> Iterator[None]:
        """Use it beside others; a thread that does so already, or is alone, just goes on."""
        thread = threading.get_ident()
        with self._changed:
            if thread not in self._inside:
                self._changed.wait_for(lambda: not self._num_lonely)
            self._inside[thread] += 1
        try:
            yield
        finally:
            self._leave(thread)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use it while nobody else does."""
        thread = threading.get_ident()
        with self._changed:
            assert thread not in self._inside, "it would wait for itself"
            self._num_lonely += 1
            self._changed.wait_for(lambda: not self._inside)
            self._inside[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_lonely -= 1
            self._leave(thread)

    def _leave(self, thread: int) -> None:
        with self._changed:
            self._inside[thread] -= 1
            if not self._inside[thread]:
                del self._inside[thread]
            self._changed.notify_all()
