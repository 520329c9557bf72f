"""Chat templates: equal to transformers' rendering, and harmless whatever they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.chat import render_chat
from engine.checkpoint import Tokenizer, open_checkpoint
from engine.errors import CheckpointError, FenError, RequestError

USER = [{"role": "user", "content": "Hi there"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>&amp; 日本 🙂</b>"},
    {"role": "assistant", "content": "Hello\n"},
    {"role": "user", "content": "  Bye "},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": "é<"}}}]


class Bare:
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}  # noqa: RUF012


def test_smollm2(smollm2: Path) -> None:
    checkpoint = open_checkpoint(str(smollm2))
    text = render_chat(checkpoint.chat_template, USER, checkpoint.tokenizer)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    )
    no_prompt = render_chat(checkpoint.chat_template, TALK, checkpoint.tokenizer, add_generation_prompt=False)
    assert no_prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n") and no_prompt.endswith("Bye <|im_end|>\n")
    tokenizer: Tokenizer = checkpoint.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[0] == tokenizer.token_to_id("<|im_start|>") and tokenizer.decode(ids, False) == text


TEMPLATES = {
    "blocks are trimmed": """
{{ bos_token }}
{%- for message in messages %}
    {% if message['role'] == 'system' %}
    [{{ message.content | trim }}]
    {% else %}
  {{ message['role'] }}: {{ message['content'] }}{{ eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
assistant:
{% endif %}
""",
    "tools as JSON": "{% if tools %}{{ tools | tojson }}|{{ tools[0] | tojson(indent=2) }}{% endif %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }},{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "undefined is false": "{% if documents %}x{% endif %}{{ missing }}{{ messages[0]['name'] is defined }}",
    "slices and filters": "{{ messages[1:] | map(attribute='content') | join('|') }}{{ messages[0].role[:2] | upper }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name: str) -> None:
    from transformers.utils import chat_template_utils as reference

    for messages in (USER, TALK):
        for tools in (None, TOOLS):
            expected, _ = reference.render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=TEMPLATES[name],
                add_generation_prompt=True,
                **Bare.special_tokens,
            )
            assert render_chat(TEMPLATES[name], messages, Bare(), tools=tools) == expected[0]


def test_tojson_is_json_and_not_html() -> None:
    assert json.loads(render_chat("{{ messages | tojson }}", TALK, Bare())) == TALK
    assert "&amp; 日本" in render_chat("{{ messages | tojson }}", TALK, Bare())


def test_strftime_now() -> None:
    assert render_chat("{{ strftime_now('%Y') }}", USER, Bare()).isdigit()


def test_no_template_names_the_way_out() -> None:
    with pytest.raises(RequestError, match=r"no chat template.*/v1/completions") as error:
        render_chat(None, USER, Bare())
    assert error.value.param == "messages"


def test_the_template_may_refuse_messages() -> None:
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate") as error:
        render_chat("{{ raise_exception('roles must alternate') }}", USER, Bare())
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ (messages | map(attribute='role')).gi_frame }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% set f = ''['__class__'] %}{{ f }}",
    ],
)
def test_a_template_that_reaches_for_python(template: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
    with pytest.raises(FenError) as error:
        print(render_chat(template, messages, Bare()))
    assert isinstance(error.value, CheckpointError), error.value
    assert "reaches for Python" in str(error.value)
    assert messages == [{"role": "user", "content": "x"}]
    assert render_chat("{{ messages[0].content }}", messages, Bare()) == "x"  # and the next one is answered


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for %}", "line 1 of the checkpoint's chat template is not valid"),
        ("\n{{ x | no_such_filter }}", "line 2 of .* No filter named 'no_such_filter'"),
        ("{% include '/etc/passwd' %}", "chat template"),
    ],
)
def test_a_bad_template(template: str, sentence: str) -> None:
    with pytest.raises(FenError, match=sentence):
        render_chat(template, USER, Bare())


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[5].content.x }}", "{{ messages[0].content + 1 }}"])
def test_a_template_that_fails_on_the_messages(template: str) -> None:
    with pytest.raises(RequestError, match="cannot render these messages") as error:
        render_chat(template, USER, Bare())
    assert len(str(error.value)) < 500
