"""Text is worked on in threads, behind a bounded queue."""

import asyncio
import threading

import pytest

from service.errors import QueueFull
from service.rpc.workers import TextWorkers


async def test_what_does_not_fit_into_the_queue_is_refused_at_once() -> None:
    workers = TextWorkers(threads=1, max_waiting=2)
    release = threading.Event()
    running = [asyncio.create_task(workers.run(release.wait)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull) as full:
        await workers.run(release.wait)
    assert full.value.retry_after_seconds > 0
    release.set()
    assert await asyncio.gather(*running) == [True] * 3
    assert await workers.run(lambda: 7) == 7, "and afterwards there is room"
    workers.close()


async def test_a_job_that_is_given_up_gives_back_its_place_and_errors_come_out() -> None:
    workers = TextWorkers(threads=1, max_waiting=0)
    release = threading.Event()
    job = asyncio.create_task(workers.run(release.wait))
    await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    release.set()
    with pytest.raises(ZeroDivisionError):
        await workers.run(lambda: 1 / 0)
    workers.close()


async def test_a_job_of_a_request_that_runs_already_waits_however_many_do() -> None:
    workers = TextWorkers(threads=1, max_waiting=0)
    release = threading.Event()
    first = asyncio.create_task(workers.run(release.wait))
    await asyncio.sleep(0)
    second = asyncio.create_task(workers.run(lambda: 7, accepted=True))
    await asyncio.sleep(0)
    release.set()
    assert await asyncio.gather(first, second) == [True, 7]
    workers.close()
