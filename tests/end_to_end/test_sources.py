"""Trained models that write about a text or an image, served as `make bundles` exports them, against PyTorch."""

import asyncio
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import grpc
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from attendant import AsyncClient, Cancelled, Client, Generation, InvalidRequest
from attendant.v1 import generation_pb2 as pb
from models import checkpoint
from models.beam import BeamSearch, search
from models.checkpoint import TrainedModel
from models.recipes import caption, dates, g2p
from models.training.dates import written_dates
from models.training.digits import read_digits, scenes

CHECKPOINTS = Path(__file__).parents[2] / "models" / "checkpoints"
MODELS = ("g2p", "dates-bahdanau", "dates-luong", "caption-digits")
DATES = written_dates("test", 64)
WORDS = g2p.read_words("test")


@pytest.fixture(scope="module")
def server(module_start, smollm2_repository):
    return module_start(
        "--models", ",".join(MODELS), "--kv-memory", "256MiB", repository=smollm2_repository
    ).wait_ready()


@pytest.fixture(scope="module")
def address(server) -> str:
    return f"127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def client(address):
    with Client(address) as client:
        yield client


def trained(name: str) -> TrainedModel:
    return checkpoint.load(CHECKPOINTS / name)


async def answers(address: str, model: str, sources: Sequence[str | bytes], **options: object) -> list[Generation]:
    """Ask for all of them at once."""
    async with AsyncClient(address) as client:
        streams = [
            client.generate(image=source, model=model, **options)
            if isinstance(source, bytes)
            else client.generate(source, model=model, **options)
            for source in sources
        ]
        return await asyncio.gather(*(stream.result() for stream in streams))


def pictures(number: int) -> tuple[list[bytes], torch.Tensor]:
    """Scenes of test digits as PNG files, and what these hold, [B, 1, Y, X] from 0 to 1."""
    drawn = scenes(read_digits("test"), number, torch.Generator().manual_seed(0)).images
    pixels = (drawn / drawn.max() * 255).round().to(torch.uint8)
    files = []
    for picture in pixels[:, 0]:
        file = BytesIO()
        Image.fromarray(picture.numpy()).save(file, "PNG")
        files.append(file.getvalue())
    return files, pixels.float() / 255


@pytest.mark.parametrize("name", ["dates-bahdanau", "dates-luong"])
async def test_dates_are_rewritten_as_pytorch_does_and_rightly(address, name):
    texts = [date.text for date in DATES]
    found = await answers(address, name, texts, temperature=0.0)
    assert [answer.text for answer in found] == dates.rewrite(trained(name), texts)
    assert sum(answer.text == date.iso for answer, date in zip(found, DATES, strict=True)) >= 0.98 * len(DATES)
    assert {answer.finish_reason for answer in found} == {"eos"}


async def test_words_are_pronounced_as_a_beam_search_in_pytorch_does(address):
    spellings = [word.spelling for word in WORDS[:40]]
    found = await answers(address, "g2p", spellings, beam_width=5)
    assert [answer.text.split() for answer in found] == g2p.pronounce(trained("g2p"), spellings, 5)


async def test_all_answers_of_a_beam_search_have_the_scores_that_pytorch_gives_them(address):
    model = trained("g2p")
    letters = Tokenizer.from_str(model.source_tokenizer.json)
    spellings = [word.spelling for word in WORDS[40:48]]
    found = await answers(address, "g2p", spellings, beam_width=4, n=4, length_penalty=0.6, max_tokens=20)
    for spelling, answer in zip(spellings, found, strict=True):
        options = BeamSearch(width=4, max_tokens=20, start_token_id=1, end_token_id=2, length_penalty=0.6)
        (expected,) = search(model.module, torch.tensor([letters.encode(spelling).ids]), None, options)
        ours = [answer, *answer.others]
        assert [tuple(i for i in each.token_ids if i != 2) for each in ours] == [each.token_ids for each in expected]
        assert [each.finished.index for each in ours] == [0, 1, 2, 3]
        for each, theirs in zip(ours, expected, strict=True):
            assert each.finished.score == pytest.approx(theirs.score, rel=1e-4)
            assert each.finished.log_likelihood == pytest.approx(theirs.log_likelihood, rel=1e-4)


async def test_scenes_are_described_as_pytorch_does(address):
    files, images = pictures(40)
    found = await answers(address, "caption-digits", files, temperature=0.0)
    assert [answer.text for answer in found] == caption.write(trained("caption"), images)


@pytest.mark.parametrize("name", ["g2p", "dates-bahdanau", "dates-luong"])
async def test_an_answer_is_the_same_to_the_bit_alone_and_among_others(address, client, name):
    """Others of every length come and go meanwhile, some of them searching."""
    texts = [word.spelling for word in WORDS[100:140]] if name == "g2p" else [date.text for date in DATES[:40]]
    sampled = {"temperature": 0.9, "seed": 5, "logprobs": True, "top_logprobs": 3}
    together, _ = await asyncio.gather(
        answers(address, name, texts, **sampled), answers(address, name, texts[::3], beam_width=3)
    )
    for text, answer in zip(texts[::7], together[::7], strict=True):
        alone = client.generate(text, model=name, **sampled).result()
        assert alone.token_ids == answer.token_ids
        assert alone.logprobs == answer.logprobs


async def test_a_picture_is_described_by_the_same_bits_alone_and_among_others(address, client):
    files, _ = pictures(12)
    together = await answers(address, "caption-digits", files, temperature=0.0, logprobs=True)
    alone = client.generate(image=files[7], model="caption-digits", temperature=0.0, logprobs=True).result()
    assert alone.logprobs == together[7].logprobs


def test_an_answer_goes_on_from_its_beginning(client):
    whole = client.generate("attention", model="g2p", temperature=0.0).result()
    begun = client.generate("AH T", encoder_text="attention", model="g2p", temperature=0.0).result()
    assert begun.text.startswith("EH N") and whole.text == f"AH T {begun.text}"
    assert begun.usage.prompt_tokens == whole.usage.prompt_tokens + 2
    alone = client.generate(encoder_text="attention", model="g2p", temperature=0.0).result()
    assert alone.token_ids == whole.token_ids
    dated = client.generate("19", encoder_text="3 may 1998", model="dates-bahdanau", temperature=0.0).result()
    assert dated.text == "98-05-03"


def test_a_search_of_width_one_is_greedy(client):
    found = client.generate("attention", model="g2p", beam_width=1).result()
    assert found.token_ids == client.generate("attention", model="g2p", temperature=0.0).result().token_ids


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": "a" * 65, "model": "g2p"}, "prompt has 65 tokens, more than max_source_len of 64"),
        ({"encoder_text": "a" * 65, "model": "g2p"}, "encoder_text has 65 tokens"),
        ({"token_ids": [40], "model": "g2p"}, "token_ids.ids\\[0\\] is 40: token ids go from 0 to 31"),
        ({"image": b"x", "model": "g2p"}, "image is '1 bytes': model g2p/1 needs encoder_text"),
        ({"prompt": "x", "model": "caption-digits"}, "needs image"),
        ({"image": b"x", "model": "caption-digits"}, "must be a PNG or JPEG file"),
        ({"messages": [("user", "x")], "model": "g2p"}, "needs encoder_text"),
        ({"prompt": "a", "model": "g2p", "beam_width": 33}, "beam.width is 33"),
        ({"prompt": "a", "model": "g2p", "beam_width": 2, "temperature": 0.0}, "sampling.temperature"),
        ({"prompt": "a", "model": "g2p", "max_tokens": 64}, "exceed max_model_len of 64"),
    ],
)
def test_what_cannot_be_written_about_is_refused_by_name(client, arguments, said):
    with pytest.raises(InvalidRequest, match=said):
        client.generate(**arguments).result()


def test_a_picture_of_another_size_is_refused_with_both_sizes(client):
    file = BytesIO()
    Image.new("L", (9, 16)).save(file, "PNG")
    with pytest.raises(InvalidRequest, match=r"9 x 16 pixels.*16 x 16"):
        client.generate(image=file.getvalue(), model="caption-digits").result()


def test_cancelled_requests_leave_their_slots(server, client, eventually):
    stream = client.generate("attention", model="g2p", ignore_eos=True, max_tokens=60)
    next(stream.events())
    stream.cancel()
    with pytest.raises(Cancelled):
        stream.result()
    searched = server.inference.Generate(pb.GenerateRequest(model="g2p", prompt="a", beam=pb.BeamSearch(width=32)))
    searched.cancel()
    assert client.generate("a", model="g2p", beam_width=32).result().text, "which takes every slot"
    eventually(lambda: server.value("attendant_requests_running", model="g2p/1") == 0)


def test_a_deadline_ends_a_request(server):
    call = server.inference.Generate(
        pb.GenerateRequest(model="g2p", prompt="attention", stop=pb.StopConditions(ignore_eos=True)), timeout=1e-4
    )
    with pytest.raises(grpc.RpcError) as ended:
        list(call)
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_metrics_tell_reading_from_writing(server, client, eventually):
    eventually(lambda: server.value("attendant_requests_running", model="g2p/1") == 0)
    before = server.value("attendant_step_seconds_count", model="g2p/1", phase="encode")
    client.generate("attention", model="g2p", temperature=0.0).result()
    assert server.value("attendant_step_seconds_count", model="g2p/1", phase="encode") == before + 1
    assert server.value("attendant_step_seconds_count", model="g2p/1", phase="decode") > 0
    bucket = {"model": "g2p/1", "seq_bucket": "64"}
    assert server.value("attendant_time_to_first_token_seconds_count", **bucket) > 0
    assert server.value("attendant_kv_cache_usage_ratio", model="g2p/1") == 0


@pytest.mark.slow
async def test_the_dictionary_is_pronounced_with_the_trained_error_rate(address):
    wrong = 0
    for start in range(0, len(WORDS), 512):
        words = WORDS[start : start + 512]
        found = []
        for part in range(0, len(words), 128):
            spellings = [word.spelling for word in words[part : part + 128]]
            found += await answers(address, "g2p", spellings, beam_width=5)
        wrong += sum(answer.text not in word.pronunciations for answer, word in zip(found, words, strict=True))
    assert wrong / len(WORDS) < 0.28


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dates-bahdanau", "dates-luong"])
async def test_dates_are_rewritten_with_the_trained_accuracy(address, name):
    asked = written_dates("test", 1000)
    right = 0
    for start in range(0, len(asked), 200):
        part = asked[start : start + 200]
        found = await answers(address, name, [date.text for date in part], temperature=0.0)
        right += sum(answer.text == date.iso for answer, date in zip(found, part, strict=True))
    assert right / len(asked) >= (1.0 if name == "dates-bahdanau" else 0.99)
