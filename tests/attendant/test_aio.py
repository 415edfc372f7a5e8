"""The asyncio client: what differs from the synchronous one, and that nothing else does."""

import asyncio
import inspect

import grpc
import pytest

import attendant
from attendant import AsyncClient, Client, Delta

PATIENCE = 20  # seconds


@pytest.fixture
async def client(address):
    async with AsyncClient(address) as client:
        yield client


async def cancelled(script) -> bool:
    return await asyncio.to_thread(script.cancelled.wait, PATIENCE)


async def test_an_answer_is_the_same_as_the_synchronous_clients(client, address):
    stream = client.generate("hi", model="tiny")
    assert [text async for text in stream] == ["Hel", "lo"]

    def synchronous():
        with Client(address) as other:
            return other.generate("hi", model="tiny").result()

    assert await stream.result() == await asyncio.to_thread(synchronous)


async def test_unary_calls_answer_as_the_synchronous_clients(client):
    assert (await client.models())[0] == await client.model("tiny/1")
    assert (await client.tokenize("a", model="tiny")).token_ids == (1, 2)
    assert await client.detokenize([1], model="tiny") == "a b"
    assert list(await client.embed(["a", "b c"], model="tiny")) == [(0.5, 1.0), (0.5, 3.0)]
    with pytest.raises(attendant.ModelNotFound):
        await client.model("huge")


async def test_many_answers_run_at_once(client):
    results = await asyncio.gather(*(client.generate("hi", model="tiny").result() for _ in range(20)))
    assert {result.text for result in results} == {"Hello"}


async def test_breaking_off_cancels_on_the_server(client, script):
    script.hang("Hel")
    async for _ in client.generate("hi", model="tiny"):
        break
    assert await cancelled(script)


async def test_cancelling_the_task_cancels_on_the_server(client, script):
    script.hang("Hel")
    began = asyncio.Event()

    async def read():
        async for event in client.generate("hi", model="tiny").events():
            if isinstance(event, Delta):
                began.set()

    task = asyncio.create_task(read())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await cancelled(script)


async def test_cancelling_the_stream_is_an_error_of_the_reader_and_not_of_its_task(client, script):
    script.hang("Hel")
    stream = client.generate("hi", model="tiny")
    with pytest.raises(attendant.Cancelled):
        async for _ in stream:
            stream.cancel()
    assert await cancelled(script)


async def test_the_end_of_a_with_block_cancels(client, script):
    script.hang("Hel")
    async with client.generate("hi", model="tiny") as stream:
        assert await anext(aiter(stream)) == "Hel"
    assert await cancelled(script)


async def test_errors_carry_the_servers_details(client, script, refusal):
    script.fail(refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"))
    with pytest.raises(attendant.Overloaded, match="full"):
        await client.generate("hi", model="tiny").result()


@pytest.mark.parametrize(
    ("synchronous", "asynchronous"),
    [(Client, AsyncClient), (attendant.GenerateStream, attendant.AsyncGenerateStream)],
)
def test_both_clients_have_the_same_methods_with_the_same_arguments(synchronous, asynchronous):
    def methods(kind):
        members = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(f).parameters for name, f in members if not name.startswith("_")}

    assert methods(synchronous) == methods(asynchronous)
