"""Chat messages -> prompt, by the checkpoint's Jinja template in a sandbox. Imports no torch."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import CheckpointError, RequestError


class SpecialTokens(Protocol):
    """What rendering needs of engine.checkpoint.tokenizer.Tokenizer."""

    @property
    def special_tokens(self) -> dict[str, str]: ...


class ChatTokenizer(SpecialTokens, Protocol):
    """What else encoding needs of it."""

    def mark_text(self, text: str) -> str: ...
    def encode_marked(self, text: str) -> list[int]: ...


def encode_chat(template: str | None, messages: Sequence[Mapping[str, Any]], tokenizer: ChatTokenizer) -> list[int]:
    """The prompt for an answer to `messages` as token ids; see `render_chat` and `mark_texts`."""
    return tokenizer.encode_marked(render_chat(template, mark_texts(messages, tokenizer.mark_text), tokenizer))


def mark_texts(value: Any, mark: Callable[[str], str]) -> Any:
    """Messages or tools with every string in them marked: who writes "<|im_end|>" there ends no turn with it."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        return {mark_texts(key, mark): mark_texts(item, mark) for key, item in value.items()}
    return [mark_texts(item, mark) for item in value] if isinstance(value, list | tuple) else value


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: SpecialTokens,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The prompt's text, special tokens written out (encode it with `encode_marked`).

    Raises RequestError when there is no template or it refuses these messages, CheckpointError when the template itself
    is bad. Conventions are Hugging Face's: trim_blocks, lstrip_blocks, `raise_exception`, `strftime_now`, `tojson`,
    `{% generation %}`.
    """
    if template is None:
        raise RequestError(
            "this checkpoint has no chat template, so it cannot take messages: send a prompt of your own to "
            "/v1/completions (or LLM.generate) instead",
            param="messages",
        )
    try:
        return _compiled(template).render(
            messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **tokenizer.special_tokens
        )
    except _Refusal as error:
        raise RequestError(f"the chat template refuses these messages: {_short(error)}", param="messages") from None
    except SecurityError as error:
        raise CheckpointError(
            f"the checkpoint's chat template reaches for Python, which is not allowed: {_short(error)}"
        ) from None
    except CheckpointError:
        raise
    except MemoryError:
        raise RequestError("the chat template needs too much memory for these messages", param="messages") from None
    except Exception as error:  # a template is a program of somebody else's: anything may come out of it
        raise RequestError(
            f"the chat template cannot render these messages: {_short(error) or type(error).__name__}", param="messages"
        ) from None


class _Refusal(Exception):
    """The template called raise_exception."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own sandbox prints a forbidden attribute as nothing; here reaching for one is an error."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__}")


def _raise_exception(message: object) -> None:
    raise _Refusal(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"line {error.lineno} of the checkpoint's chat template is not valid: {error.message}"
        ) from None
    except Exception as error:  # e.g. RecursionError
        reason = _short(error) or type(error).__name__
        raise CheckpointError(f"the checkpoint's chat template does not compile: {reason}") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
