"""What a good request gets, over a real socket, from a real bundle."""

import itertools

import pytest
from google.protobuf.duration_pb2 import Duration

from attendant.v1 import generation_pb2 as pb
from attendant.v1 import inference_service_pb2 as service_pb

PROMPT = "We the people — grüße"
CHAT = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hello there")])


def text_of(events: list[pb.GenerateResponse]) -> str:
    return "".join(event.delta.text for event in events)


def ids_of(events: list[pb.GenerateResponse]) -> list[int]:
    return [token_id for event in events for token_id in event.delta.token_ids]


def greedy(max_tokens: int, **fields: object) -> dict[str, object]:
    sampling = pb.SamplingParams(max_tokens=max_tokens, temperature=0, **fields)
    return {"sampling": sampling, "stop": pb.StopConditions(ignore_eos=True)}


def test_an_answer_is_started_then_deltas_then_finished(server) -> None:
    events = list(server.generate(prompt=PROMPT, request_id="mine", **greedy(12)))
    assert [event.WhichOneof("event") for event in events][:1] == ["started"]
    assert {event.WhichOneof("event") for event in events[1:-1]} == {"delta"}
    started, finished = events[0].started, events[-1].finished
    assert (started.request_id, started.model) == ("mine", "tiny-fp32/1")
    assert finished.finish_reason == pb.FINISH_REASON_LENGTH
    assert finished.usage == pb.Usage(prompt_tokens=started.prompt_tokens, output_tokens=12)
    assert len(ids_of(events)) == 12


def test_the_parts_of_the_time_add_up_to_less_than_all_of_it(server) -> None:
    timings = list(server.generate(prompt=PROMPT, **greedy(12)))[-1].finished.timings
    parts = [part.ToNanoseconds() for part in (timings.queue, timings.tokenise, timings.prefill, timings.decode)]
    assert all(part > 0 for part in parts), parts
    assert abs(sum(parts) - timings.total.ToNanoseconds()) < 1000


def test_text_tokens_and_tokenise_agree(server) -> None:
    events = list(server.generate(prompt=PROMPT, **greedy(40)))
    detokenised = server.inference.Detokenize(service_pb.DetokenizeRequest(model="tiny-fp32", token_ids=ids_of(events)))
    assert detokenised.text == text_of(events)
    tokens = server.inference.Tokenize(service_pb.TokenizeRequest(model="tiny-fp32", text=PROMPT))
    assert len(tokens.token_ids) == len(tokens.tokens) == events[0].started.prompt_tokens
    again = list(server.generate(token_ids=pb.TokenIds(ids=tokens.token_ids), **greedy(40)))
    assert ids_of(again) == ids_of(events)


def test_messages_are_rendered_with_the_bundles_template(server) -> None:
    tokens = server.inference.Tokenize(service_pb.TokenizeRequest(model="tiny-fp32", messages=CHAT))
    assert tokens.text == "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    from_messages = list(server.generate(messages=CHAT, **greedy(10)))
    from_text = list(server.generate(prompt=tokens.text, **greedy(10)))
    assert ids_of(from_messages) == ids_of(from_text)


@pytest.mark.parametrize("kind", ["prompt", "messages", "token_ids"])
def test_echo_begins_the_answer_with_the_prompt(server, kind: str) -> None:
    tokens = server.inference.Tokenize(service_pb.TokenizeRequest(model="tiny-fp32", text=PROMPT)).token_ids
    given = {"prompt": PROMPT, "messages": CHAT, "token_ids": pb.TokenIds(ids=tokens)}[kind]
    expected = "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n" if kind == "messages" else PROMPT
    plain = list(server.generate(**{kind: given}, **greedy(5)))
    echoed = list(server.generate(**{kind: given}, output=pb.OutputOptions(echo=True), **greedy(5)))
    assert text_of(echoed) == expected + text_of(plain)
    assert ids_of(echoed) == ids_of(plain), "the prompt's tokens are not the answer's"


def test_a_seed_repeats_an_answer_and_a_drawn_one_is_reported(server) -> None:
    def sampled(**fields: object) -> list[pb.GenerateResponse]:
        sampling = pb.SamplingParams(max_tokens=24, temperature=1.5, **fields)
        return list(server.generate(prompt=PROMPT, sampling=sampling, stop=pb.StopConditions(ignore_eos=True)))

    drawn = sampled()
    assert ids_of(sampled(seed=drawn[0].started.seed)) == ids_of(drawn)
    assert ids_of(sampled(seed=drawn[0].started.seed ^ 1)) != ids_of(drawn)


def test_a_stop_string_ends_the_answer_and_frees_its_slot(server, eventually) -> None:
    whole = text_of(list(server.generate(prompt=PROMPT, **greedy(60))))
    stop = next(whole[i : i + 3] for i in range(10, 40) if whole[i : i + 3].isprintable())
    request = greedy(60) | {"stop": pb.StopConditions(strings=[stop], ignore_eos=True)}
    events = list(server.generate(prompt=PROMPT, **request))
    assert text_of(events) == whole[: whole.index(stop)]
    finished = events[-1].finished
    assert finished.finish_reason == pb.FINISH_REASON_STOP
    assert finished.usage.output_tokens == len(ids_of(events)) < 60
    assert finished.timings.prefill.ToNanoseconds() > 0
    eventually(lambda: server.value("attendant_requests_running", model="tiny-fp32/1") == 0)


def test_a_stop_token_ends_the_answer_without_its_text(server) -> None:
    ids = ids_of(list(server.generate(prompt=PROMPT, **greedy(30))))
    at = next(i for i in range(3, 30) if ids[i] not in ids[:i])
    stop = pb.StopConditions(token_ids=[ids[at]], ignore_eos=True)
    events = list(server.generate(prompt=PROMPT, **(greedy(30) | {"stop": stop})))
    assert ids_of(events) == ids[: at + 1]
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_STOP
    decoded = server.inference.Detokenize(service_pb.DetokenizeRequest(model="tiny-fp32", token_ids=ids[:at]))
    assert text_of(events) == decoded.text


def test_an_end_of_sequence_token_ends_the_answer_unless_ignored(server) -> None:
    def forced(ignore: bool, **fields: object) -> list[pb.GenerateResponse]:
        sampling = pb.SamplingParams(max_tokens=6, temperature=0, logit_bias={2: 100.0}, **fields)
        return list(server.generate(sampling=sampling, stop=pb.StopConditions(ignore_eos=ignore)))

    events = forced(ignore=False)
    assert (ids_of(events), text_of(events)) == ([2], "")
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_EOS
    assert ids_of(forced(ignore=True)) == [2] * 6
    assert len(ids_of(forced(ignore=False, min_tokens=4))) == 5


def test_logprobs_are_those_of_the_model_most_likely_first(server) -> None:
    output = pb.OutputOptions(logprobs=True, top_logprobs=5)
    events = list(server.generate(prompt=PROMPT, output=output, **greedy(8)))
    logprobs = [logprob for event in events for logprob in event.delta.logprobs]
    assert [logprob.token_id for logprob in logprobs] == ids_of(events)
    for logprob in logprobs:
        top = [alternative.logprob for alternative in logprob.top]
        assert len(top) == 5
        assert all(high >= low for high, low in itertools.pairwise(top))
        assert logprob.top[0].token_id == logprob.token_id, "greedy takes the most likely"
        assert logprob.logprob == logprob.top[0].logprob <= 0


def test_the_same_name_for_two_requests_at_once_is_nobodys_problem(server) -> None:
    calls = [server.long_answer(100, request_id="same") for _ in range(4)]
    answers = [list(call) for call in calls]
    assert all(answer[0].started.request_id == "same" for answer in answers)
    assert all(ids_of(answer) == ids_of(answers[0]) for answer in answers)


@pytest.mark.parametrize("model", ["tiny-int8", "tiny-int8/1"])
def test_a_model_is_named_with_or_without_its_version(server, model: str) -> None:
    events = list(server.generate(model, prompt=PROMPT, **greedy(3)))
    assert events[0].started.model == "tiny-int8/1"


def test_detokenise_shows_special_tokens_if_asked(server) -> None:
    def text(**fields: bool) -> str:
        request = service_pb.DetokenizeRequest(model="tiny-fp32", token_ids=[1, 2], **fields)
        return str(server.inference.Detokenize(request).text)

    assert text() == ""
    assert text(skip_special_tokens=False) == "<|im_start|><|im_end|>"


def test_a_prompt_that_begins_as_an_earlier_one_is_computed_from_where_they_part(server) -> None:
    ids = [40 + i % 50 for i in range(120)]
    first = list(server.long_answer(8, token_ids=pb.TokenIds(ids=ids)))[-1].finished.usage
    before = server.value("attendant_tokens_total", model="tiny-fp32/1", kind="prompt_cached")
    again = list(server.long_answer(8, token_ids=pb.TokenIds(ids=[*ids, 7, 8, 9])))[-1].finished.usage
    assert (first.cached_tokens, again.prompt_tokens, again.cached_tokens) == (0, 123, 120)
    assert server.value("attendant_tokens_total", model="tiny-fp32/1", kind="prompt_cached") == before + 120


def test_a_latency_budget_ends_an_answer_with_what_it_had_come_to(server, refusal_of) -> None:
    budget = Duration(nanos=30_000_000)
    refusal = refusal_of(lambda: list(server.long_answer(250, latency_budget=budget)))
    assert (refusal.code.name, refusal.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
    assert list(server.long_answer(5, latency_budget=Duration(seconds=50)))[-1].finished.usage.output_tokens == 5
