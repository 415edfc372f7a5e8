"""The tokenizer of a Hugging Face directory: tokenizer.json as it is, and the special ids around it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from models.checkpoint import TokenizerInfo
from models.readers.errors import ReadError
from models.readers.json_file import read_json

_MASKS = ("[MASK]", "<mask>")


def read_tokenizer(directory: Path, config: Mapping[str, Any], *, continues: bool = True) -> TokenizerInfo:
    """Read the tokenizer with its special ids; those of generation_config.json win over `config`, the model's own.

    Args:
        directory: where the files lie.
        config: the contents of config.json.
        continues: whether the model continues what it reads, so that nothing may be added at a prompt's end. What an
            encoder's tokenizer adds around a text stays in its file.

    Raises:
        ReadError: there is no tokenizer.json, it is malformed, has more tokens than the model's vocabulary, or adds
            more to a prompt that is continued than a first token.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ReadError("tokenizer.json is missing; save the tokenizer in the fast format first")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare exceptions
        raise ReadError(f"tokenizer.json is malformed: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise ReadError(f"tokenizer.json has {tokenizer.get_vocab_size()} tokens, the model {config['vocab_size']}")
    settings = _read_if_there(directory / "tokenizer_config.json")
    generation = _read_if_there(directory / "generation_config.json")
    bos_token_id, eos, pad = (
        config.get(name) if generation.get(name) is None else generation[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    )
    return TokenizerInfo(
        json=tokenizer.to_str(),
        bos_token_id=bos_token_id,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=pad,
        add_bos=continues and _adds_bos(tokenizer, settings, bos_token_id),
        chat_template=_chat_template(directory, settings),
        mask_token_id=_mask_token_id(tokenizer, settings),
    )


def _mask_token_id(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> int | None:
    """Return the id of the token that hides another: by its setting, or by the names it usually has."""
    named = settings.get("mask_token")
    if named is not None:
        return tokenizer.token_to_id(named["content"] if isinstance(named, dict) else named)
    found = (tokenizer.token_to_id(name) for name in _MASKS)
    return next((token_id for token_id in found if token_id is not None), None)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _adds_bos(tokenizer: Tokenizer, settings: Mapping[str, Any], bos_token_id: int | None) -> bool:
    """Return whether prompts begin with the bos token: by its setting, or by what the post-processor does."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    if whole not in (bare, [bos_token_id, *bare]):
        raise ReadError(f"tokenizer.json makes {whole} of {bare}; only a first token {bos_token_id} may be added")
    setting = settings.get("add_bos_token")
    return whole != bare if setting is None else bool(setting)


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
