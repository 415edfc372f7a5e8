"""The BERT reader against transformers, on directories that transformers has written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from models import checkpoint
from models.classifier import Classifier, Tagger
from models.encoder import Encoder
from models.masked_lm import MaskedLanguageModel
from models.readers import huggingface
from models.readers.errors import ReadError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "##d", "e"]


def config(**changes):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    return BertConfig(vocab_size=len(WORDS), max_position_embeddings=20, **(sizes | changes))


def albert(**changes):
    sizes = {"hidden_size": 24, "embedding_size": 8, "num_hidden_layers": 3, "num_attention_heads": 3}
    return AlbertConfig(vocab_size=len(WORDS), max_position_embeddings=20, intermediate_size=40, **(sizes | changes))


@pytest.fixture
def write(tmp_path):
    """Save a model with random weights that are far from their initial ones, and a tokenizer."""

    def write(model_class, **changes):
        torch.manual_seed(0)
        model = model_class(config(**changes) if model_class.config_class is BertConfig else albert(**changes)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(tmp_path)
        tokenizer = Tokenizer(models.WordPiece(dict(zip(WORDS, range(len(WORDS)), strict=True)), unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return model, tmp_path

    return write


def batch():
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(5, len(WORDS), (3, 12), generator=generator)
    return token_ids, torch.tensor([12, 7, 1]), torch.randint(2, (3, 12), generator=generator)


def assert_same_where_real(ours, theirs, lengths):
    for row, length in enumerate(lengths):
        difference = (ours[row, :length] - theirs[row, :length]).abs().max()
        assert difference <= 1e-5 * theirs[row, :length].abs().max()


@torch.no_grad()
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_the_encoder_is_that_of_transformers(write, hidden_act):
    reference, directory = write(BertModel, hidden_act=hidden_act)
    trained = huggingface.read(directory)
    assert isinstance(trained.module, Encoder)
    token_ids, lengths, segment_ids = batch()
    attends = (torch.arange(12) < lengths[:, None]).long()
    expected = reference(token_ids, attends, token_type_ids=segment_ids).last_hidden_state
    assert_same_where_real(trained.module(token_ids, lengths, segment_ids=segment_ids), expected, lengths)


@torch.no_grad()
def test_the_masked_language_model_is_that_of_transformers(write):
    reference, directory = write(BertForMaskedLM)
    trained = huggingface.read(directory)
    assert isinstance(trained.module, MaskedLanguageModel)
    token_ids, lengths, _ = batch()
    expected = reference(token_ids, (torch.arange(12) < lengths[:, None]).long()).logits
    assert_same_where_real(trained.module(token_ids, lengths), expected, lengths)


LABELS = {"id2label": {0: "bad", 1: "good", 2: "neither"}, "label2id": {"bad": 0, "good": 1, "neither": 2}}


@torch.no_grad()
@pytest.mark.parametrize("model_class", [BertForSequenceClassification, AlbertForSequenceClassification])
@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_a_classifier_of_pairs_is_that_of_transformers(write, model_class, problem_type):
    reference, directory = write(model_class, problem_type=problem_type, **LABELS)
    trained = huggingface.read(directory)
    assert isinstance(trained.module, Classifier)
    assert trained.labels == ("bad", "good", "neither")
    assert trained.module.config.multi_label == (problem_type is not None)
    token_ids, lengths, segment_ids = batch()
    expected = reference(token_ids, (torch.arange(12) < lengths[:, None]).long(), token_type_ids=segment_ids).logits
    torch.testing.assert_close(trained.module(token_ids, lengths, segment_ids=segment_ids), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_tagger_is_that_of_transformers(write):
    reference, directory = write(BertForTokenClassification, **LABELS)
    trained = huggingface.read(directory)
    assert isinstance(trained.module, Tagger) and trained.labels == ("bad", "good", "neither")
    token_ids, lengths, _ = batch()
    expected = reference(token_ids, (torch.arange(12) < lengths[:, None]).long()).logits
    assert_same_where_real(trained.module(token_ids, lengths), expected, lengths)


@torch.no_grad()
def test_albert_fills_gaps_as_in_transformers(write):
    reference, directory = write(AlbertForMaskedLM)
    trained = huggingface.read(directory)
    assert isinstance(trained.module, MaskedLanguageModel)
    assert len(trained.module.encoder.stack.layers) == 1 and trained.tokenizer.mask_token_id == WORDS.index("[MASK]")
    token_ids, lengths, _ = batch()
    expected = reference(token_ids, (torch.arange(12) < lengths[:, None]).long()).logits
    assert_same_where_real(trained.module(token_ids, lengths), expected, lengths)


def test_what_the_tokenizer_adds_around_a_text_stays(write):
    _, directory = write(BertModel)
    tokenizer = Tokenizer.from_str(huggingface.read(directory).tokenizer.json)
    assert tokenizer.encode("a bd").tokens == ["[CLS]", "a", "b", "##d", "[SEP]"]


def sentence_transformer(directory, **settings):
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24} | settings))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')


@torch.no_grad()
def test_what_sentence_transformers_says_is_kept_through_a_checkpoint(write, tmp_path_factory):
    reference, directory = write(BertModel)
    sentence_transformer(directory, pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
    saved = tmp_path_factory.mktemp("saved") / "bert"
    checkpoint.save(huggingface.read(directory), saved)
    trained = checkpoint.load(saved)
    assert (trained.embedding.pooling, trained.embedding.normalize) == ("mean", True)
    assert trained.module.config.max_source_len == 16
    token_ids = batch()[0]
    expected = reference(token_ids).last_hidden_state
    assert_same_where_real(trained.module(token_ids), expected, [12, 12, 12])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "pooling is absent"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "exactly one of"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "pooling is pooling_mode_mean_sqrt_len_tokens"),
    ],
)
def test_a_pooling_that_is_not_ours_is_refused(write, settings, message):
    _, directory = write(BertModel)
    sentence_transformer(directory, **settings)
    with pytest.raises(ReadError, match=message):
        huggingface.read(directory)


@pytest.mark.parametrize(("name", "value"), [("position_embedding_type", "relative_key"), ("hidden_act", "swish")])
def test_a_feature_that_is_not_ours_is_refused_by_name(write, name, value):
    _, directory = write(BertModel)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ReadError, match=f"{name} is '{value}'"):
        huggingface.read(directory)


def test_a_tensor_that_is_not_known_is_named(write):
    _, directory = write(BertModel)
    path = directory / "model.safetensors"
    save_file(load_file(path) | {"encoder.layer.0.adapter.weight": torch.zeros(2)}, path)
    with pytest.raises(ReadError, match=r"surplus tensors: encoder\.layer\.0\.adapter\.weight"):
        huggingface.read(directory)
