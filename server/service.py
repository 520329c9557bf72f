"""What all routes share: the engine client, the tokenizer, admission to the queue, the way from a body to tokens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.types import Scope

from bench.prices import Price, no_price, parse_price, price_of
from engine.chat import mark_texts
from engine.checkpoint.tokenizer import Tokenizer
from engine.core.client import EngineClient
from engine.errors import RequestError
from engine.messages import EngineInfo
from server.energy import EnergyMeter
from server.errors import ApiError
from server.grammar_check import GrammarCheck
from server.keys import ApiKeys
from server.logs import LogWriter, log_request
from server.long_texts import LongTexts
from server.metrics import Metrics
from server.protocol import ChatCompletionRequest, CompletionRequest, GenerationBody, Message
from server.recent import Recent
from server.settings import ServerSettings
from server.template_process import TemplateProcess
from server.tools import HERMES, Tool, call_grammar, form_of, plain_tools, write_out

if TYPE_CHECKING:
    from server.choice import Choice

T = TypeVar("T")
LAST_WORDS_SECONDS = 2.0  # for aborted replies to be written
LONG_TEXT = 32768  # characters; longer ones are tokenised in a process that runs while nobody else wants its core


class Service:
    """One per server. Everything here runs on the event loop; only `in_thread` leaves it."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        chat_template: str | None,
        settings: ServerSettings,
        model: str,
        keys: ApiKeys,
    ):
        self.keys = keys
        self.client = client
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        special_tokens = tokenizer.special_tokens
        self.templates = None if chat_template is None else TemplateProcess(chat_template, special_tokens)
        self.call_form = form_of(chat_template)  # None: tools and calls are written into the messages
        self.settings = settings
        self.models = tuple(dict.fromkeys(settings.served_model_name)) or (model,)
        self.model = self.models[0]
        self.created = int(time.time())
        self.draining = False
        self.admitted = 0  # completions accepted and not yet answered
        self.choices: set[Choice] = set()  # of these, the ones handed to the engine
        self.grammars = GrammarCheck(settings.engine.model, settings.engine.load_format)
        self.energy = EnergyMeter()
        self.log: LogWriter | None = None
        self.recent = Recent()
        self._price = None if settings.price is None else parse_price(settings.price)
        self.metrics = Metrics(self)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="text")
        self._patient = ThreadPoolExecutor(1, thread_name_prefix="long text")
        self._long_texts = LongTexts(tokenizer, settings.engine.model, settings.engine.load_format)

    async def in_thread(self, function: Callable[[], T], characters: int = 0) -> T:
        """Run CPU-bound work on a text of so many characters off the event loop."""
        threads = self._patient if characters > LONG_TEXT else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, function)

    # Life

    @contextlib.asynccontextmanager
    async def running(self, start: Callable[[], Coroutine[Any, Any, object]]) -> AsyncIterator[None]:
        """`start` the engine in the background (requests get 503 until it is ready); stop it at the end."""
        starting = asyncio.create_task(start())
        self._threads.submit(self.tokenizer.least_tokens, "")  # what it finds out once takes a while
        if self.templates is not None:
            self._threads.submit(self.templates.start)
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await self.client.stop()
            for threads in (self._threads, self._patient):
                threads.shutdown(wait=False, cancel_futures=True)
            self._long_texts.close()
            if self.templates is not None:
                self.templates.close()
            await self.grammars.close()

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, let those in flight finish; after `timeout` seconds they end with "abort"."""
        self.draining = True
        deadline = time.monotonic() + timeout
        while self.admitted and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while self.admitted and time.monotonic() < deadline:
            for choice in list(self.choices):
                await choice.abort()
            await asyncio.sleep(0.02)

    # State

    def answered(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        """A request is over: its line in the log, and its status in the metrics."""
        self.metrics.responses(status).inc()
        log_request(scope, request_id, status, seconds)

    def check_ready(self) -> EngineInfo:
        """-> what runs. Raises ApiError 503 with the reason while loading, draining, restarting or dead."""
        ok, reason = self.client.health()
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=5)
        if not ok or self.client.info is None:
            code = "unresponsive" if self.client.state == "ready" else self.client.state
            raise ApiError(503, reason, code=code, retry_after=2)
        return self.client.info

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.models:
            served = " and ".join(map(repr, self.models))
            raise ApiError(
                404, f"the model {name[:200]!r} does not exist here; this server serves {served}",
                param="model", code="model_not_found",
            )  # fmt: skip

    @property
    def waiting(self) -> int:
        """Completions in the queue. The engine's own count is as old as its last step, hence the upper bound."""
        unstarted = self.admitted - sum(choice.started is not None for choice in self.choices)
        return min(max(self.admitted - self.settings.engine.max_num_seqs, self.client.stats.waiting), unstarted)

    def admit_tokens(self, prompts: list[list[int]], each: int) -> None:
        """Raises ApiError 429 when `each` completions of `prompts` would have too many tokens wait behind others."""
        tokens = each * sum(map(len, prompts))
        queued = sum(len(choice.prompt) for choice in self.choices if choice.started is None)
        if self.waiting > each * len(prompts) and queued + tokens > self.settings.max_queue_tokens:
            self.metrics.refused.inc()
            raise ApiError(
                429, f"the queue is full ({queued} tokens of prompts wait, and this request has {tokens}); try again "
                "shortly", code="queue_full", retry_after=1,
            )  # fmt: skip

    @contextlib.contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold `count` places, in the batch or in the queue. Raises ApiError 429 when they are not free."""
        capacity = self.settings.engine.max_num_seqs + self.settings.max_queue
        if count > capacity:
            raise RequestError(f"this request asks for {count} completions; this server holds at most {capacity}", "n")
        waiting = self.waiting
        if self.admitted + count > capacity or (waiting and waiting + count > self.settings.max_queue):
            self.metrics.refused.inc()
            raise ApiError(
                429, f"the queue is full ({waiting} completions wait); try again shortly",
                code="queue_full", retry_after=1,
            )  # fmt: skip
        self.admitted += count
        try:
            yield
        finally:
            self.admitted -= count

    def price(self) -> tuple[Price | None, str | None]:
        """Of the device, or why it is not known."""
        if self._price is not None:
            return self._price, None
        if self.client.info is None:
            return None, "the device is not known before the engine is ready"
        price = price_of(self.client.info.device)
        return price, no_price(self.client.info.device) if price is None else None

    # Text

    async def encode(self, body: GenerationBody) -> list[list[int]]:
        """-> one list of token ids per prompt."""
        if isinstance(body, ChatCompletionRequest):
            return [await self.encode_messages(body.messages, tools=body.offered)]
        assert isinstance(body, CompletionRequest)
        prompts = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                self.check_size(prompt, "prompt")
                ids = await self.encode_text(prompt, body.add_special_tokens)
                if not ids:
                    raise RequestError("prompt: a prompt must have at least one token", "prompt")
            else:
                ids = prompt
                self.check_ids(ids, "prompt", self.tokenizer.num_embeddings)
            prompts.append(ids)
        return prompts

    async def encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        encode = self._long_texts.encode if len(text) > LONG_TEXT else self.tokenizer.encode
        return await self.in_thread(lambda: encode(text, add_special_tokens), len(text))

    def check_ids(self, ids: list[int], param: str, known: int | None = None) -> None:
        """known: how many of the vocabulary the model has embeddings for."""
        size = min(self.tokenizer.vocab_size, known or self.tokenizer.vocab_size)
        if ids and max(ids) >= size:
            raise RequestError(f"{param}: token id {max(ids)} is outside the vocabulary (0 to {size - 1})", param)

    async def encode_messages(
        self,
        messages: list[Message],
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """Renders the chat template (which writes its own special tokens) and encodes the result.

        Special tokens are those that the template writes; in the messages' own strings their names are text.
        """
        templates = self.templates
        if templates is None:
            raise RequestError("this model has no chat template; use /v1/completions", "messages")
        for message in messages:  # before anything reads them, even where a template would leave some out
            self.check_size(message.content, "messages")
        characters = sum(len(message.content) for message in messages)

        def render() -> list[int]:
            plain, functions = [message.plain() for message in messages], plain_tools(tools)
            if self.call_form is None:
                plain, functions = write_out(plain, functions), []
            marked = [mark_texts(value, self.tokenizer.mark_text) for value in (plain, functions)]
            text = templates.render(marked[0], add_generation_prompt, marked[1] or None)
            self.check_size(text, "messages")
            if len(text) > LONG_TEXT:
                return self._long_texts.encode(text, add_special_tokens, marked=True)
            return self.tokenizer.encode_marked(text, add_special_tokens)

        return await self.in_thread(render, characters)

    def check_size(self, text: str, param: str) -> None:
        """Raises RequestError context_length_exceeded for a text that is too long whatever its tokens are."""
        info = self.client.info
        if info is not None and (least := self.tokenizer.least_tokens(text)) > info.max_model_len:
            raise RequestError(
                f"this model's context is {info.max_model_len} tokens, and {param} of {len(text)} characters make at "
                f"least {least}; shorten the text", param, "context_length_exceeded",
            )  # fmt: skip

    async def constraints(self, body: GenerationBody) -> dict[str, Any]:
        """Fields of SamplingParams that hold an answer to its structure, and to the form of calls."""
        structure, fields = body.structure(), {}
        if isinstance(body, ChatCompletionRequest) and body.offered:
            form = self.call_form or HERMES
            choice, several = body.tool_choice, body.parallel_tool_calls
            structure = call_grammar(form, body.offered, choice, several, structure, self.special_token)
            if form.marker and self.special_token(form.marker) is not None:
                fields["skip_special_tokens"] = False  # the marker has to be seen
        if structure is not None:
            fields["grammar"] = await self.grammars.grammar(structure)
        return fields

    def special_token(self, text: str) -> int | None:
        """The id of the special token that is written so."""
        id = self.tokenizer.token_to_id(text)
        return id if id is not None and self.tokenizer.is_special(id) else None

    def max_tokens(self, body: GenerationBody, prompt_len: int, info: EngineInfo) -> int:
        """How many tokens may follow the prompt. Raises RequestError context_length_exceeded."""
        room = info.max_model_len - prompt_len
        limit = body.limit()
        if limit is None:
            wanted = body.max_tokens if isinstance(body, CompletionRequest) else max(room, 1)
            wanted = min(wanted, max(room, 1))
        else:
            wanted = limit
        if wanted > room:
            name = "prompt" if isinstance(body, CompletionRequest) else "messages"
            raise RequestError(
                f"this model's context is {info.max_model_len} tokens, and this request needs {prompt_len + wanted} "
                f"({prompt_len} in the {name}, {wanted} for the completion); shorten one of them",
                name,
                "context_length_exceeded",
            )
        if body.min_tokens > wanted:
            raise RequestError(f"min_tokens ({body.min_tokens}) is more than max_tokens ({wanted})", "min_tokens")
        return wanted
