import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 300


@pytest.fixture(scope="session")
def byte_tokenizer_json():
    """A small byte-level BPE tokenizer of 300 tokens, trained on one sentence; ids 0 and 1 are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the cat sat on the mat and the dog sat on the log and that cat saw the dog in the fog 1234 1999"
    tokenizer.train_from_iterator([text], trainer)
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    return tokenizer.to_str()
