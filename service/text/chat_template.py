"""Chat templates: a conversation to the one text that a model was trained to continue.

Templates are written for the Jinja environment of Hugging Face transformers; this is that environment,
sandboxed: a template sees the values below and nothing of the process.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from attendant.bundle import BundleError
from service.errors import InvalidField


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a plain class attribute)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template and the special tokens it may write.

    Args:
        source: Jinja source over `messages`, `add_generation_prompt` and the special tokens.
        special_tokens: values of `bos_token`, `eos_token` and the like, by those names.

    Raises:
        BundleError: the source does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise BundleError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return the text of a conversation, up to where the assistant is to go on.

        Raises:
            InvalidField: the template cannot render these messages, or says that they are not in order.
        """
        try:
            return self._template.render(
                **self._special_tokens,
                messages=[{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
            )
        # A template is a program: on messages that its author did not think of, it may fail like any other.
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            roles = [role for role, _ in messages]
            raise InvalidField("messages", roles, f"the chat template refuses it: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
