"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.detokenizer import Detokenizer, TextDelta
from server.choice import Choice
from server.generation import Generation, Json
from server.json_route import JsonRoute
from server.logprobs import completion_logprobs
from server.openapi import reply_or_events
from server.protocol import CompletionRequest
from server.replies import Completion, CompletionChunk
from server.service import Service

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/completions", operation_id="create_completion", responses=reply_or_events(Completion, CompletionChunk)
)
@router.post("/completions", include_in_schema=False)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue a text, or several."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    return Generation(service, body, CompletionShape(service, body), len(body.prompt))


class CompletionShape:
    """OpenAI's legacy completion: text, and logprobs as parallel lists. `echo` puts the prompt in front."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, service: Service, body: CompletionRequest):
        self.service = service
        self.body = body
        self.shift: dict[int, int] = {}  # by choice: characters of the echoed prompt

    def opening(self, choice: Choice) -> Json | None:
        if not self.body.echo:
            return None
        text, offsets = self._prompt_text(choice)
        self.shift[choice.index] = len(text)
        logprobs = None
        if self.body.logprobs is not None:
            known = choice.prompt_logprobs or [None] * len(choice.prompt)
            logprobs = completion_logprobs(self.service.tokenizer, choice.prompt, known, offsets)
        return self._choice(choice.index, text, logprobs)

    def chunk(self, choice: Choice, delta: TextDelta) -> Json | None:
        logprobs = None
        if self.body.logprobs is not None and delta.logprobs:
            shift = self.shift.get(choice.index, 0)
            offsets = [shift + offset for offset in delta.offsets]
            logprobs = completion_logprobs(self.service.tokenizer, delta.tokens, delta.logprobs, offsets)
        if not delta.text and logprobs is None and delta.finish_reason is None:
            return None
        return self._choice(choice.index, delta.text, logprobs, delta.finish_reason, delta.stop_reason)

    def whole(self, choice: Choice, deltas: list[TextDelta]) -> Json:
        parts = [self.opening(choice), *(self.chunk(choice, delta) for delta in deltas)]
        reply = self._choice(choice.index, "", None)
        for part in filter(None, parts):
            reply["text"] += part["text"]
            reply["finish_reason"], reply["stop_reason"] = part["finish_reason"], part["stop_reason"]
            if part["logprobs"] is not None:
                joined = reply["logprobs"] = reply["logprobs"] or {key: [] for key in part["logprobs"]}
                for key, values in part["logprobs"].items():
                    joined[key] += values
        return reply

    def _choice(
        self, index: int, text: str, logprobs: Json | None, finish: str | None = None, stop: str | int | None = None
    ) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop}

    def _prompt_text(self, choice: Choice) -> tuple[str, list[int]]:
        """The prompt as it was given, and where in it each of its tokens begins (a BOS that we added: at 0)."""
        given = self.body.prompt[choice.index // self.body.n]
        detokenizer = Detokenizer(self.service.tokenizer, skip_special_tokens=False)
        text, offsets = "", []
        for token in choice.prompt:
            piece, start = detokenizer.add_token(token)
            offsets.append(len(text) + start)
            text += piece
        text += detokenizer.finish()
        if not isinstance(given, str):
            return text, offsets
        added = max(len(text) - len(given), 0)
        return given, [max(offset - added, 0) for offset in offsets]
