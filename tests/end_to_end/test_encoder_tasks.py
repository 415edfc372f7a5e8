"""Classifying, tagging, filling gaps and reranking through a real server, against PyTorch."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from attendant import Client, Pixels
from attendant.v1 import classification_pb2, fill_mask_pb2, generation_pb2, image_pb2, scoring_pb2, tagging_pb2
from export.bundle import Target, export_bundle
from export.text import QUALITY
from models import checkpoint
from models.classifier import Classifier, ClassifierConfig, Tagger
from models.masked_lm import MaskedLanguageModel
from models.training.digits import read_digits

LABELS = ("bad", "good", "neither", "both")
MASK_ID = 1  # [UNK] is as good a mask as any


@pytest.fixture(scope="module")
def trained(tiny_encoder):
    """Random models on the encoder of other tests' sizes, and two trained ones, by the names of their bundles."""
    config = tiny_encoder.module.config
    torch.manual_seed(5)
    modules = {
        "classes": Classifier(ClassifierConfig(encoder=config, num_classes=len(LABELS))),
        "questions": Classifier(ClassifierConfig(encoder=config, num_classes=len(LABELS), multi_label=True)),
        "relevance": Classifier(ClassifierConfig(encoder=config, num_classes=1)),
        "tags": Tagger(ClassifierConfig(encoder=config, num_classes=len(LABELS))),
        "gaps": MaskedLanguageModel(config),
    }
    for module in modules.values():
        for parameter in module.eval().parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    tokenizer = replace(tiny_encoder.tokenizer, mask_token_id=MASK_ID)
    models = {
        name: replace(tiny_encoder, module=module, tokenizer=tokenizer, embedding=None, labels=LABELS)
        for name, module in modules.items()
    }
    models["relevance"] = replace(models["relevance"], labels=None)
    models["digits"] = checkpoint.load("models/checkpoints/digits")
    models["clutter"] = checkpoint.load("models/checkpoints/digits-hard")
    return models


@pytest.fixture(scope="module")
def server(module_start, trained, tmp_path_factory):
    repository = tmp_path_factory.mktemp("tasks")
    for name, model in trained.items():
        target = Target(repository=repository, name=name, version=1)
        export_bundle(model, target, precision="fp32", explain=False, report=lambda line: None)
    target = Target(repository=repository, name="classes-int8", version=1)
    export_bundle(trained["classes"], target, precision="int8", explain=False, report=lambda line: None)
    server = module_start(repository=repository).wait_ready()
    assert not [line for line in server.lines if line.startswith("REFUSED")]
    return server


@pytest.fixture(scope="module")
def client(server):
    with Client(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture(scope="module")
def texts():
    words, numbers = QUALITY.read_text("utf-8").split(), random.Random(0)
    return [" ".join(words[start : start + 1 + start % 60]) for start in (numbers.randrange(5000) for _ in range(24))]


def encoded(model, text, pair=None):
    encoding = Tokenizer.from_str(model.tokenizer.json).encode(text, pair)
    return torch.tensor([encoding.ids]), torch.tensor([encoding.type_ids])


@torch.no_grad()
def test_classes_of_texts_and_pairs_are_those_of_pytorch(client, trained, texts):
    model = trained["classes"]
    pairs = list(zip(texts, reversed(texts), strict=True))
    found = [*client.classify(texts, model="classes", logits=True)]
    found += client.classify(pairs, model="classes", logits=True)
    for item, classification in zip([*((text, None) for text in texts), *pairs], found, strict=True):
        token_ids, segment_ids = encoded(model, *item)
        logits = model.module(token_ids, segment_ids=segment_ids)[0]
        assert [each.index for each in classification.classes] == logits.argsort(descending=True).tolist()
        assert classification.tokens == token_ids.shape[1]
        for each in classification.classes:
            assert each.label == LABELS[each.index]
            assert abs(each.logit - logits[each.index]) < 1e-4
            assert abs(each.probability - logits.softmax(0)[each.index]) < 1e-5


@torch.no_grad()
def test_several_labels_are_judged_one_by_one(client, trained, texts):
    for text, found in zip(texts, client.classify(texts, model="questions", top_k=2), strict=True):
        probability = trained["questions"].module(encoded(trained["questions"], text)[0])[0].sigmoid()
        assert [each.logit for each in found.classes] == [None, None]
        for each, best in zip(found.classes, probability.topk(2).indices.tolist(), strict=True):
            assert each.index == best and abs(each.probability - probability[best]) < 1e-5


@torch.no_grad()
def test_tokens_are_tagged_where_they_stand(client, trained, texts):
    model = trained["tags"]
    tokenizer = Tokenizer.from_str(model.tokenizer.json)
    for text, tagging in zip(texts, client.tag(texts, model="tags"), strict=True):
        encoding = tokenizer.encode(text)
        probabilities = model.module(torch.tensor([encoding.ids]))[0].softmax(-1)[1:-1]
        assert tagging.num_tokens == len(encoding.ids)
        assert [(t.token_id, t.token, (t.start, t.end)) for t in tagging.tokens] == list(
            zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
        )[1:-1]
        for token, probability in zip(tagging.tokens, probabilities, strict=True):
            assert token.label == LABELS[probability.argmax()]
            assert abs(token.probability - probability.max()) < 1e-5
    ids = tokenizer.encode(texts[0]).ids
    assert [token.start for token in client.tag([ids], model="tags").taggings[0].tokens] == [0] * len(ids)


@torch.no_grad()
def test_gaps_are_filled_as_pytorch_would(client, trained, texts):
    gapped = [f"{text[:20]} [UNK] {text[20:]} [UNK]" for text in texts]
    for text, found in zip(gapped, client.fill_mask(gapped, model="gaps", top_k=3), strict=True):
        token_ids, _ = encoded(trained["gaps"], text)
        places = (token_ids[0] == MASK_ID).nonzero()[:, 0].tolist()
        probabilities = trained["gaps"].module(token_ids)[0, places].softmax(-1)
        assert [mask.position for mask in found.masks] == places
        for mask, probability in zip(found.masks, probabilities, strict=True):
            best = probability.topk(3)
            assert [each.token_id for each in mask.candidates] == best.indices.tolist()
            assert np.allclose([each.probability for each in mask.candidates], best.values, atol=1e-5)


@torch.no_grad()
def test_texts_are_put_in_order_of_relevance(client, trained, texts):
    found = client.rerank("what is it", texts, model="relevance")
    for text, score in zip(texts, found.scores, strict=True):
        token_ids, segment_ids = encoded(trained["relevance"], "what is it", text)
        expected = trained["relevance"].module(token_ids, segment_ids=segment_ids)[0, 0]
        assert abs(score.score - expected) < 1e-4 and abs(score.probability - expected.sigmoid()) < 1e-4
    scores = [score.score for score in found.scores]
    assert list(found.order) == sorted(range(len(texts)), key=lambda index: -scores[index])


@torch.no_grad()
def test_digits_are_read_as_by_the_trained_model(client, trained):
    digits = read_digits("test")
    images, files = digits.images.numpy(), []
    for image in images:
        file = BytesIO()
        Image.fromarray((image[0] * 255).round().astype(np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    expected = trained["digits"].module(digits.images).argmax(1)
    pixels = [Pixels((1, 8, 8), image.ravel().tolist()) for image in images]
    for inputs in (pixels, files):
        found = [
            each.classes[0] for start in (0, 256) for each in client.classify(inputs[start:][:256], model="digits")
        ]
        named = torch.tensor([each.index for each in found])
        assert (named == digits.labels).float().mean() == (expected == digits.labels).float().mean()
        assert found[0].label == checkpoint.load("models/checkpoints/digits").labels[named[0]]


@torch.no_grad()
def test_hard_attention_reads_what_it_reads_in_pytorch(client, trained):
    images = torch.rand(20, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    logits = trained["clutter"].module(images)
    inputs = [Pixels((24, 24), image.ravel().tolist()) for image in images]
    for classification, expected in zip(client.classify(inputs, model="clutter", logits=True), logits, strict=True):
        for each in classification.classes:
            assert abs(each.logit - expected[each.index]) < 1e-4


@pytest.mark.parametrize("task", ["classes", "classes-int8", "tags", "gaps", "relevance", "digits"])
def test_bits_are_the_same_alone_and_among_those_of_many_clients(client, texts, task):
    images = [Pixels((8, 8), [random.Random(seed).random() for _ in range(64)]) for seed in range(len(texts))]
    calls = {
        "tags": lambda chosen: [*client.tag(chosen, model=task)],
        "gaps": lambda chosen: [*client.fill_mask([f"[UNK] {text}" for text in chosen], model=task)],
        "relevance": lambda chosen: client.rerank("who", chosen, model=task).scores,
    }
    call = calls.get(task, lambda chosen: [*client.classify(chosen, model=task, logits=True)])
    items = images if task == "digits" else texts
    alone = [call([item])[0] for item in items]

    def shuffled(seed):
        order = random.Random(seed).sample(range(len(items)), len(items))
        found = call([items[index] for index in order])
        return [found[order.index(index)] for index in range(len(items))]

    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(shuffled, range(4)):
            assert together == alone


def test_long_inputs_are_refused_or_cut_the_longer_text_first(client, server, refusal_of, trained):
    long, short = "the " * 400, "a b c"
    for call in (
        lambda: server.inference.Classify(classify("classes", text=long)),
        lambda: server.inference.Classify(
            classify("classes", pair=classification_pb2.TextPair(first=short, second=long))
        ),
        lambda: server.inference.TagTokens(
            tagging_pb2.TagTokensRequest(model="tags", inputs=[tagging_pb2.TagInput(text=long)])
        ),
        lambda: server.inference.Score(
            scoring_pb2.ScoreRequest(model="relevance", relevance=scoring_pb2.Relevance(query="a", texts=[long]))
        ),
    ):
        refusal = refusal_of(call)
        assert refusal.reason == "CONTEXT_LENGTH_EXCEEDED"
        assert "has 4" in refusal.message and "more than max_model_len of 288" in refusal.message
    for pair in ((short, long), (long, short), (long, long)):
        cut = client.classify(pair, model="classes", truncate=True, logits=True).classifications[0]
        tokenizer = Tokenizer.from_str(trained["classes"].tokenizer.json)
        tokenizer.enable_truncation(288, strategy="longest_first")
        encoding = tokenizer.encode(*pair)
        assert (cut.tokens, cut.truncated, len(encoding.ids)) == (288, True, 288)
        with torch.no_grad():
            logits = trained["classes"].module(
                torch.tensor([encoding.ids]), segment_ids=torch.tensor([encoding.type_ids])
            )[0]
        assert all(abs(each.logit - logits[each.index]) < 1e-4 for each in cut.classes)
    assert client.tag(long, model="tags", truncate=True).taggings[0].truncated
    assert client.rerank("a", [long, short], model="relevance", truncate=True).scores[0].tokens == 288


def classify(model, fields=None, **item):
    return classification_pb2.ClassifyRequest(
        model=model, inputs=[classification_pb2.ClassifyInput(**item)], **(fields or {})
    )


def image(**fields):
    return image_pb2.Image(**fields)


def png(width, height, mode="L"):
    file = BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


TENSOR = image_pb2.ImageTensor
IDS = generation_pb2.TokenIds


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (classification_pb2.ClassifyRequest(model="classes"), "inputs is '0 inputs': 1 to 256 are needed"),
        (classify("classes"), "inputs[0].input is None: one of text, pair, token_ids is needed"),
        (classify("classes", image=image(encoded=b"x")), "inputs[0].input is 'image': one of text, pair, token_ids"),
        (classify("classes", text=""), "inputs[0].text is '': must not be empty"),
        (classify("classes", pair=classification_pb2.TextPair(first="a")), "inputs[0].pair.second is ''"),
        (classify("classes", token_ids=IDS(ids=[10**6])), "inputs[0].token_ids.ids[0] is 1000000: token ids go from 0"),
        (classify("classes", {"top_k": 5}, text="a"), "top_k is 5: must be in [1, 4], the number of classes"),
        (classify("classes", {"top_k": 0}, text="a"), "top_k is 0: must be in [1, 4]"),
        (classify("digits", text="a"), "inputs[0].input is 'text': one of image is needed"),
        (classify("digits", image=image()), "inputs[0].image.image is None: one of encoded, tensor"),
        (classify("digits", image=image(encoded=b"GIF89a")), "must be a PNG or JPEG file"),
        (classify("digits", image=image(encoded=png(8, 8)[:44])), "cannot be decoded"),
        (
            classify("digits", image=image(encoded=png(9, 7))),
            "inputs[0].image.encoded is '9 x 7 pixels': must be 8 x 8; scale it, or set resize",
        ),
        (
            classify("digits", {"resize": True}, image=image(encoded=png(8192, 8192, "1"))),
            "is '8192 x 8192 pixels': at most 16777216 pixels can be resized",
        ),
        (classify("digits", image=image(tensor=TENSOR(shape=[8, 9]))), "tensor.shape is [8, 9]: must be [1, 8, 8]"),
        (classify("digits", image=image(tensor=TENSOR(shape=[8, 8], values=[0.0]))), "'1 values': 64 are needed"),
        (
            classify("digits", image=image(tensor=TENSOR(shape=[8, 8], values=[float("nan")] * 64))),
            "tensor.values is 'values that are not finite'",
        ),
    ],
)
def test_what_cannot_be_classified_is_named_with_its_limit(server, refusal_of, request_, message):
    refusal = refusal_of(lambda: server.inference.Classify(request_, timeout=30))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in refusal.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": []}, "inputs is '0 inputs'"),
        ({"inputs": ["no gap"]}, "has 0 mask tokens among the"),
        ({"inputs": ["[UNK] " * 65]}, "has 65 mask tokens"),
        (
            {"inputs": ["the " * 400 + "[UNK]"], "truncate": True},
            "has 0 mask tokens among the 288 tokens that are left",
        ),
        ({"inputs": ["[UNK]"], "top_k": 101}, "top_k is 101: must be in [1, 100]"),
        ({"inputs": ["[UNK]"], "top_k": 0}, "top_k is 0"),
    ],
)
def test_gaps_that_cannot_be_filled_are_named_with_their_limit(server, refusal_of, fields, message):
    items = [fill_mask_pb2.FillMaskInput(text=text) for text in fields["inputs"]]
    request = fill_mask_pb2.FillMaskRequest(model="gaps", **(fields | {"inputs": items}))
    refusal = refusal_of(lambda: server.inference.FillMask(request, timeout=30))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in refusal.message


@pytest.mark.parametrize(
    ("relevance", "message"),
    [
        (None, "input is None: relevance is needed"),
        (scoring_pb2.Relevance(texts=["a"]), "relevance.query is ''"),
        (scoring_pb2.Relevance(query="a"), "relevance.texts is '0 texts': 1 to 256 are needed"),
        (scoring_pb2.Relevance(query="a", texts=["b"] * 257), "'257 texts'"),
        (scoring_pb2.Relevance(query="a", texts=["b", ""]), "relevance.texts[1] is ''"),
        (scoring_pb2.Relevance(query="a" * 2000, texts=["b"] * 200), "at most 262144 bytes of text"),
    ],
)
def test_scores_that_cannot_be_given_are_named_with_their_limit(server, refusal_of, relevance, message):
    request = scoring_pb2.ScoreRequest(model="relevance", relevance=relevance)
    refusal = refusal_of(lambda: server.inference.Score(request, timeout=30))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in refusal.message


def test_a_model_is_not_asked_for_what_it_cannot_do(server, refusal_of):
    calls = {
        "does not classify; its tasks: tag": lambda: server.inference.Classify(classify("tags", text="a")),
        "does not score texts; its tasks: classify": lambda: server.inference.Score(
            scoring_pb2.ScoreRequest(model="classes", relevance=scoring_pb2.Relevance(query="a", texts=["b"]))
        ),
        "does not fill masks; its tasks: classify": lambda: server.inference.FillMask(
            fill_mask_pb2.FillMaskRequest(model="digits")
        ),
        "does not tag tokens; its tasks: fill_mask": lambda: server.inference.TagTokens(
            tagging_pb2.TagTokensRequest(model="gaps")
        ),
    }
    for message, call in calls.items():
        refusal = refusal_of(call)
        assert refusal.code is grpc.StatusCode.UNIMPLEMENTED and message in refusal.message


def test_an_image_of_any_size_and_kind_is_read_if_that_is_asked_for(client):
    picture = Image.effect_noise((40, 32), 80).convert("RGB")
    files = []
    for kind in ("PNG", "JPEG"):
        file = BytesIO()
        picture.save(file, kind, **({"quality": 100} if kind == "JPEG" else {}))
        files.append(file.getvalue())
    one, other = client.classify(files, model="digits", resize=True)
    assert one.label == other.label


def test_metrics_count_each_task_by_length(server, client, texts):
    before = server.value("attendant_request_duration_seconds_count", task="tag")
    client.tag(texts, model="tags")
    assert server.value("attendant_request_duration_seconds_count", task="tag") == before + len(texts)
    assert server.value("attendant_requests_total", task="tag", code="OK", model="tags/1") >= 1
    assert server.value("attendant_step_seconds_count", phase="encode", model="tags/1") >= 1


def test_a_deadline_that_has_passed_is_counted_and_harms_nobody(server, client, texts, eventually):
    items = [classification_pb2.ClassifyInput(text=" ".join(texts)[:500]) for _ in range(256)]
    request = classification_pb2.ClassifyRequest(model="classes", inputs=items)
    with pytest.raises(grpc.RpcError) as error:
        server.inference.Classify(request, timeout=0.05)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(server.is_idle)
    assert len([*client.classify(texts, model="classes")]) == len(texts)
