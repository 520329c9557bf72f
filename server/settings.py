"""How the HTTP server runs; the options of `fen serve` carry the same names. Imports no torch."""

from __future__ import annotations

import msgspec

from engine.messages import EngineOptions

MAX_HEAD_BYTES = 32 * 2**10  # of a request line and its headers
MAX_HEADERS = 100
MAX_BODY_BYTES = 8 * 2**20
BODY_SECONDS = 30.0  # that the next piece of a body may take
KEEP_ALIVE_SECONDS = 15.0  # between comments on a silent event stream


class ServerSettings(msgspec.Struct, kw_only=True):
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: list[str] = []  # the first is the one in metrics; default: the checkpoint's own name
    max_queue: int = 256  # completions that may wait for a place in the batch before 429
    max_queue_tokens: int = 2**20  # tokens of prompts that may wait, likewise
    request_timeout: float | None = None  # seconds from a request's arrival to its end
    drain_timeout: float = 30.0  # seconds that requests in flight get after SIGTERM
    log_format: str = "text"  # "text" | "json"
    log_file: str | None = None  # default: standard error
    api_key_file: str | None = None  # a key a line; FEN_API_KEYS and FEN_API_KEY add to it
    allowed_hosts: list[str] = []  # names it is called by; "*" is any. Empty: see server.host_check
    cors_origins: list[str] = []  # empty: no CORS headers
    price: str | None = None  # US$ per device-hour, or a device of seeds/prices.toml; default: by the GPU's name
    engine: EngineOptions = msgspec.field(default_factory=EngineOptions)
