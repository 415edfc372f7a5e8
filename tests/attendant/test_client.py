"""The synchronous client against a real server: answers, cancellation, errors, retries."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

import attendant
from attendant import Client, Delta, Finished, Started
from attendant.v1 import model_service_pb2

PATIENCE = 20  # seconds
Code = grpc.StatusCode


@pytest.fixture
def client(address):
    with Client(address) as client:
        yield client


def test_iterating_gives_the_text_and_afterwards_everything_is_known(client):
    stream = client.generate("hi", model="tiny")
    assert list(stream) == ["Hel", "lo"]
    assert stream.text == "Hello"
    assert stream.started == Started(request_id="r1", model="tiny/1", prompt_tokens=3, seed=2**64 - 1)
    assert stream.finished.finish_reason == "eos"
    assert stream.finished.usage == attendant.Usage(prompt_tokens=3, cached_tokens=1, output_tokens=3)
    assert stream.finished.timings.queue_seconds == pytest.approx(1e-3)
    assert stream.finished.timings.total_seconds == 1


def test_events_come_in_order_and_the_result_is_their_sum(client, script, make_answer):
    script.generate = lambda request, context: iter(make_answer("a", "b", logprobs=True))
    stream = client.generate(token_ids=[1], model="tiny")
    kinds = [type(event) for event in stream.events()]
    assert kinds == [Started, Delta, Delta, Finished]
    result = stream.result()
    assert (result.text, result.token_ids, result.finish_reason) == ("ab", (0, 1), "eos")
    assert result.logprobs[1] == attendant.TokenLogprob(1, -0.5, (attendant.TopLogprob(9, -1.0),))
    assert result.usage.output_tokens == 2


def test_a_result_includes_what_was_read_before(client):
    stream = client.chat([("user", "hi")], model="tiny")
    for event in (events := stream.events()):
        if isinstance(event, Delta):
            break
    for _ in events:
        pass
    assert stream.result().text == "Hello"


@pytest.mark.parametrize("leave", ["break", "with", "cancel", "close"])
def test_leaving_a_stream_cancels_it_on_the_server(address, script, leave):
    script.hang("Hel", "lo")
    client = Client(address)
    stream = client.generate("hi", model="tiny")
    if leave == "break":
        for _ in stream:
            break
    elif leave == "with":
        with stream:
            next(iter(stream))
    elif leave == "cancel":
        with pytest.raises(attendant.Cancelled):
            for _ in stream:
                stream.cancel()
    else:
        next(stream.events())
        client.close()
    assert script.cancelled.wait(PATIENCE)
    client.close()


def test_an_answer_that_breaks_off_is_an_error(client, script, make_answer):
    script.generate = lambda request, context: iter(make_answer("a")[:-1])
    stream = client.generate("hi", model="tiny")
    with pytest.raises(attendant.ServerError, match="broke off"):
        stream.result()
    assert stream.text == "a"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.INVALID_ARGUMENT, attendant.InvalidRequest),
        (Code.UNIMPLEMENTED, attendant.InvalidRequest),
        (Code.NOT_FOUND, attendant.ModelNotFound),
        (Code.RESOURCE_EXHAUSTED, attendant.Overloaded),
        (Code.UNAVAILABLE, attendant.Unavailable),
        (Code.DEADLINE_EXCEEDED, attendant.DeadlineExceeded),
        (Code.INTERNAL, attendant.ServerError),
        (Code.PERMISSION_DENIED, attendant.AttendantError),
    ],
)
@pytest.mark.parametrize("after", [0, 2])
def test_each_status_is_an_error_of_its_class_before_and_after_the_first_token(
    client, script, refusal, code, kind, after
):
    info = error_details_pb2.ErrorInfo(reason="SOME_REASON", domain="attendant", metadata={"limit": "3"})
    script.fail(refusal(code, "no, because", info), after=after)
    with pytest.raises(attendant.AttendantError, match=f"{code.name}: no, because") as failed:
        client.generate("hi", model="tiny").result()
    error = failed.value
    assert type(error) is kind
    assert (error.code, error.reason, error.metadata) == (code, "SOME_REASON", {"limit": "3"})


def test_details_of_a_refusal_are_parsed(client, script, refusal):
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="in (0, 1]")
    script.fail(
        refusal(
            Code.INVALID_ARGUMENT,
            "sampling.top_p is 2.0: in (0, 1]",
            error_details_pb2.BadRequest(field_violations=[violation]),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=250_000_000)),
        )
    )
    with pytest.raises(attendant.InvalidRequest) as failed:
        client.generate("hi", model="tiny", top_p=2.0).result()
    assert failed.value.field_violations == (attendant.FieldViolation("sampling.top_p", "in (0, 1]"),)
    assert failed.value.retry_after == 1.25


def test_a_status_that_contradicts_its_details_still_tells_its_code(client, script):
    def generate(request, context):
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(Code.INTERNAL, "garbled")
        yield

    script.generate = generate
    with pytest.raises(attendant.ServerError, match="garbled") as failed:
        client.generate("hi", model="tiny").result()
    assert failed.value.reason == ""


def test_an_unavailable_server_is_tried_again_and_an_overloaded_one_is_not(client, script, refusal):
    script.fail(refusal(Code.UNAVAILABLE, "draining"), times=2)
    assert client.generate("hi", model="tiny").result().text == "Hello"
    assert len(script.requests) == 3
    script.requests.clear()
    script.fail(refusal(Code.RESOURCE_EXHAUSTED, "full"))
    with pytest.raises(attendant.Overloaded):
        client.generate("hi", model="tiny").result()
    assert len(script.requests) == 1


def test_an_answer_that_has_begun_is_never_tried_again(client, script, refusal):
    script.fail(refusal(Code.UNAVAILABLE, "draining"), times=1, after=2)
    with pytest.raises(attendant.Unavailable):
        client.generate("hi", model="tiny").result()
    assert len(script.requests) == 1


def test_a_timeout_ends_the_call_on_both_sides(client, script):
    script.hang("Hel")
    stream = client.generate("hi", model="tiny", timeout=0.2)
    with pytest.raises(attendant.DeadlineExceeded):
        stream.result()
    assert stream.text == "Hel"
    assert script.cancelled.wait(PATIENCE)


def test_without_a_server_the_call_is_unavailable(free_port):
    with Client(f"127.0.0.1:{free_port}") as client, pytest.raises(attendant.Unavailable):
        client.models(timeout=5)


def test_embed_asks_what_it_was_told_and_gives_vectors_in_order(client, script):
    found = client.embed(["a", [5, 6, 7]], model="encoder", pooling="cls", normalize=False, dimensions=2, truncate=True)
    (request,) = script.requests
    assert (request.inputs[0].text, list(request.inputs[1].token_ids.ids)) == ("a", [5, 6, 7])
    assert (request.pooling, request.normalize, request.dimensions, request.truncate) == (2, False, 2, True)
    assert list(found) == [(0.5, 1.0), (0.5, 3.0)]
    assert (len(found), found[1], found.embeddings[1].truncated) == (2, (0.5, 3.0), True)
    assert (found.model, found.usage.prompt_tokens) == ("encoder/1", 4)


def test_a_single_text_is_a_list_of_one_and_silence_stays_silence(client, script):
    assert len(client.embed("abc", model="encoder")) == 1
    (request,) = script.requests
    assert [item.text for item in request.inputs] == ["abc"]
    assert (request.pooling, request.HasField("normalize"), request.HasField("dimensions")) == (0, False, False)


def test_an_input_that_cannot_be_sent_is_named(client):
    with pytest.raises(TypeError, match=r"inputs\[1\]"):
        client.embed(["a", [1.5]], model="encoder")
    with pytest.raises(ValueError, match="pooling"):
        client.embed("a", model="encoder", pooling="median")


def test_tokenize_and_detokenize_ask_what_they_were_told(client, script):
    tokens = client.tokenize("a b", model="tiny", add_special_tokens=False)
    assert tokens == attendant.Tokens(token_ids=(1, 2), tokens=("a", "Ġb"), text="rendered")
    assert client.detokenize(iter([1, 2]), model="tiny") == "a b"
    client.tokenize(messages=[("user", "a")], model="tiny")
    asked_text, asked_ids, asked_messages = script.requests
    assert asked_text.HasField("add_special_tokens") and not asked_text.add_special_tokens
    assert list(asked_ids.token_ids) == [1, 2] and not asked_ids.HasField("skip_special_tokens")
    assert asked_messages.WhichOneof("input") == "messages" and not asked_messages.HasField("add_special_tokens")
    with pytest.raises(ValueError, match="exactly one of text and messages"):
        client.tokenize(model="tiny")


def test_all_pages_of_models_are_read(client, script):
    script.page_size = 2
    script.models = [model_service_pb2.Model(name="tiny", version=version) for version in range(1, 6)]
    assert [model.key for model in client.models()] == [f"tiny/{version}" for version in range(1, 6)]


def test_one_model_is_described_with_its_certificate_and_a_missing_one_is_not_found(client):
    model = client.model("tiny")
    assert (model.key, model.state, model.precision, model.tasks) == ("tiny/1", "ready", "int8", ("generate",))
    assert model.checks == (attendant.Check(name="parity", measured=1e-6, bound=1e-4, grid="1-64"),)
    with pytest.raises(attendant.ModelNotFound) as failed:
        client.model("huge")
    assert failed.value.reason == "MODEL_NOT_FOUND"


def test_a_newer_servers_values_do_not_break_the_client(client, script):
    script.models[0].state = 99
    assert client.model("tiny").state == "unspecified"
