"""POST /tokenize and /detokenize: what the model sees."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.json_route import JsonRoute
from server.logprobs import token_text
from server.protocol import DetokenizeRequest, TokenizeRequest
from server.service import Service

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.check_model(body.model)
    info = service.check_ready()
    if body.messages is not None:
        tokens = await service.encode_messages(body.messages, body.add_generation_prompt, bool(body.add_special_tokens))
    else:
        text, special = body.prompt or "", body.add_special_tokens is not False
        tokens = await service.in_thread(lambda: service.tokenizer.encode(text, special))
    reply: dict[str, Any] = {"count": len(tokens), "max_model_len": info.max_model_len, "tokens": tokens}
    reply["token_strs"] = [token_text(service.tokenizer, token) for token in tokens] if body.return_token_strs else None
    return reply


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    service: Service = request.app.state.service
    service.check_model(body.model)
    service.check_ids(body.tokens, "tokens")
    text = await service.in_thread(lambda: service.tokenizer.decode(body.tokens, skip_special_tokens=False))
    return {"prompt": text}
