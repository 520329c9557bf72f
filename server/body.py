"""The base of every request body, and the fields that are refused or without effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from engine.errors import RequestError

MAX_IGNORED = 1024  # characters of x-ignored-params

# Known, meaningful, not implemented: refused unless given with a value that changes nothing. Declaring a field on a
# model takes it off this list.
REFUSED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
# Accepted and without effect, as OpenAI's API allows.
WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)


def _allow_null(schema: dict[str, Any]) -> None:
    """For /openapi.json: what need not be given may be null."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            kinds = field.get("anyOf", [field])
            null = {"type": "null"}
            schema["properties"][name] = {"anyOf": [*kinds, *([] if null in kinds else [null])], **about}


class Body(BaseModel):
    """A JSON object."""  # with strict types and no NaN; null is absent, unknown fields are collected

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, json_schema_extra=_allow_null)
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value is not None}
        for name in (cls.refused.keys() & data.keys()) - cls.model_fields.keys():
            if not any(data[name] == neutral for neutral in cls.refused[name]):
                raise RequestError(f"{name} is not supported by this server; leave it out", param=name)
        return data

    def ignored(self) -> list[str]:
        """Names of fields that nobody here knows, also those of bodies in this one: `messages[0].zebra`."""
        known = WITHOUT_EFFECT | self.refused.keys() if self.refused else frozenset()
        names = sorted((self.model_extra or {}).keys() - known)
        for field in type(self).model_fields:
            value = getattr(self, field)
            inner = {field: value} if isinstance(value, Body) else {}
            if isinstance(value, list):
                inner = {f"{field}[{i}]": item for i, item in enumerate(value) if isinstance(item, Body)}
            names += [f"{at}.{name}" for at, item in inner.items() for name in item.ignored()]
        return names

    def ignored_header(self) -> dict[str, str]:
        names = ",".join(self.ignored())[:MAX_IGNORED]
        text = names.encode("unicode_escape").decode().replace(" ", r"\x20")  # a name may be anything, a header may not
        text = text[:MAX_IGNORED]
        return {"x-ignored-params": text} if text else {}
