"""POST /tokenize and /detokenize, GET /tokenizer_info: what the model sees."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from server.json_route import JsonRoute
from server.logprobs import token_text
from server.protocol import DetokenizeRequest, TokenizeRequest
from server.replies import Detokenized, Tokenized, TokenizerInfo
from server.service import Service

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text, or of messages as the chat template renders them."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    info = service.check_ready()
    if body.messages is not None:
        special = bool(body.add_special_tokens)
        tokens = await service.encode_messages(body.messages, body.add_generation_prompt, special, body.tools)
    else:
        text, special = body.prompt or "", body.add_special_tokens is not False
        tokens = await service.encode_text(text, special)

    def write_out() -> bytes:  # up to millions of tokens: not on the event loop, and without the model's checks
        strings = [token_text(service.tokenizer, token) for token in tokens] if body.return_token_strs else None
        reply = {"count": len(tokens), "max_model_len": info.max_model_len, "tokens": tokens, "token_strs": strings}
        return msgspec.json.encode(reply)

    data = await service.in_thread(write_out, len(tokens))
    return Response(data, headers=body.ignored_header(), media_type="application/json")


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request, response: Response) -> Detokenized:
    """The text of token ids, special tokens written out."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    service.check_ids(body.tokens, "tokens")
    response.headers.update(body.ignored_header())
    decode = service.tokenizer.decode
    return Detokenized(prompt=await service.in_thread(lambda: decode(body.tokens, skip_special_tokens=False)))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> TokenizerInfo:
    """What a client needs to know of the tokenizer to use /tokenize in place of one of its own, as lm-eval does."""
    service: Service = request.app.state.service
    special = service.tokenizer.special_tokens
    return TokenizerInfo(
        tokenizer_class=type(service.tokenizer).__name__,
        vocab_size=service.tokenizer.vocab_size,
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        pad_token=special.get("pad_token"),
        chat_template=service.chat_template,
    )
