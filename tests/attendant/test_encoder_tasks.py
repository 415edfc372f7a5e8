"""Classifying, tagging, filling gaps and reranking: what is sent and what is handed out."""

import pytest

from attendant import AsyncClient, Client, Pixels


@pytest.fixture
def client(address):
    with Client(address) as client:
        yield client


def test_every_kind_of_input_is_sent_as_what_it_is(client, script):
    inputs = ["a", ("a", "b"), b"\x89PNG", Pixels((1, 2), [0.5, 1]), [5, 6]]
    found = client.classify(inputs, model="m", top_k=2, logits=True, truncate=True, resize=True)
    (request,) = script.requests
    assert [item.WhichOneof("input") for item in request.inputs] == ["text", "pair", "image", "image", "token_ids"]
    assert (request.inputs[1].pair.first, request.inputs[1].pair.second) == ("a", "b")
    assert request.inputs[2].image.encoded == b"\x89PNG"
    assert (list(request.inputs[3].image.tensor.shape), list(request.inputs[3].image.tensor.values)) == (
        [1, 2],
        [0.5, 1],
    )
    assert (request.top_k, request.logits, request.truncate, request.resize) == (2, True, True, True)
    assert [each.label for each in found] == ["good"] * 5
    assert [(each.label, each.logit) for each in found.classifications[0].classes] == [("good", 0.5), ("bad", -1.5)]


@pytest.mark.parametrize("alone", ["a", ("a", "b"), b"\x89PNG", Pixels((1, 1), [1])])
def test_a_single_input_is_a_list_of_one_and_silence_stays_silence(client, script, alone):
    assert client.classify(alone, model="m").classifications[0].classes[0].logit is None
    (request,) = script.requests
    assert len(request.inputs) == 1 and not request.HasField("top_k") and not request.logits


def test_what_cannot_be_sent_is_named(client):
    with pytest.raises(TypeError, match=r"inputs\[1\]"):
        client.classify(["a", [1.5]], model="m")
    with pytest.raises(TypeError, match="unknown option 'topk'; known: truncate, priority, latency_budget, top_k, "):
        client.classify("a", model="m", topk=3)
    with pytest.raises(TypeError, match="unknown option 'resize'; known: truncate, priority, latency_budget, top_k"):
        client.fill_mask("a", model="m", resize=True)
    with pytest.raises(TypeError, match="texts"):
        client.rerank("a", [3], model="m")


def test_tags_gaps_and_scores_are_handed_out_in_order(client, script):
    tagging = client.tag("Ada", model="m", truncate=True).taggings[0]
    assert [(t.token, t.label, t.start, t.end) for t in tagging.tokens] == [("Ada", "person", 0, 3)]
    assert (tagging.num_tokens, tagging.truncated) == (3, True)
    (text,) = client.fill_mask(["a [MASK]"], model="m", top_k=1)
    assert (text.masks[0].position, text.masks[0].candidates[0].token) == (2, "cat")
    ranking = client.rerank("q", ["a", "ccc", "bb"], model="m")
    assert (ranking.order, [score.score for score in ranking.scores]) == ((1, 2, 0), [1, 3, 2])
    assert script.requests[-1].relevance.query == "q" and ranking.model == "relevance/1"


async def test_the_asyncio_client_answers_as_the_synchronous_one(client, address):
    async with AsyncClient(address) as other:
        assert await other.classify("a", model="m") == client.classify("a", model="m")
        assert await other.tag("a", model="m") == client.tag("a", model="m")
        assert await other.fill_mask("a", model="m") == client.fill_mask("a", model="m")
        assert await other.rerank("a", ["b"], model="m") == client.rerank("a", ["b"], model="m")


def test_every_task_says_how_urgent_it_is(client, script):
    urgent = {"priority": 7, "latency_budget": 1.5, "truncate": True}
    client.embed("a", model="m", **urgent)
    client.classify("a", model="m", **urgent)
    client.tag("a", model="m", **urgent)
    client.fill_mask("a", model="m", **urgent)
    client.rerank("q", ["a"], model="m", **urgent)
    assert len(script.requests) == 5
    for request in script.requests:
        assert (request.priority, request.latency_budget.ToMilliseconds(), request.truncate) == (7, 1500, True)
