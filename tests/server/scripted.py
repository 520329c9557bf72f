"""The real application before a scripted engine, in-process: for what a healthy engine cannot be asked to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from engine.checkpoint import Tokenizer
from engine.messages import EngineInfo, EngineStats, Output, Request
from server.app import create_app
from server.settings import ServerSettings

INFO = EngineInfo(
    model="m", path="", architecture="llama", parameters=1, quantization="", dtype="", device="", vocab_size=49152,
    max_model_len=64, block_size=64, num_blocks=1, kv_cache_bytes=1, weight_bytes=1, load_seconds=0,
    batch_invariant=True,
)  # fmt: skip


class ScriptedEngine:
    """Gives every request the same outputs, or raises what it finds among them."""

    def __init__(self, *script: Output | Exception):
        self.script = script
        self.info, self.stats, self.state, self.silence = INFO, EngineStats(), "ready", ""
        self.activity = "idle"

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    def finish(self, id: str, tokens: int, device_seconds: dict[str, float]) -> None: ...

    def health(self) -> tuple[bool, str]:
        return not self.silence, self.silence

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        for item in self.script:
            if isinstance(item, Exception):
                raise item
            yield item


def ask(
    engine: Any,
    tokenizer: Tokenizer,
    method: str,
    path: str,
    *,
    template: str = "x",
    cors: str = "",
    keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    loopback: bool = False,
    **fields: Any,
) -> httpx.Response:
    """One request; `fields` as httpx takes them."""
    settings = ServerSettings(cors_origins=[cors] if cors else [], allowed_hosts=list(hosts))
    app = create_app(engine, tokenizer, settings, chat_template=template, model="m", keys=keys, loopback=loopback)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.request(method, path, **fields)

    return asyncio.run(send())
