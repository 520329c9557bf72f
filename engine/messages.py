"""The typed messages between a front end (the HTTP process, or `LLM` in-process) and the engine.

Torch is not imported here: the HTTP process must stay free of it. `encode`/`decoder` are msgpack.
"""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to pick the next token and when to stop. Ranges are checked where users enter them (server.protocol, LLM)."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # 0 is off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stream: int = 0  # choice i of n draws from the random stream (seed, i)
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # number of top alternatives beside the chosen token; 0: the chosen token alone
    prompt_logprobs: int | None = None  # the same for prompt tokens (bypasses the prefix cache)
    stop: tuple[str, ...] = ()  # matched by the front end, on text; the engine ignores it
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    grammar: str = ""  # what the answer must match: llguidance's Lark or JSON (engine.grammar); empty: anything


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt, one completion. `n` choices are n requests: the prefix cache makes the shared prompt free."""

    id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0  # smaller is served first
    cache_salt: str = ""  # prefix-cache blocks are shared only between equal salts
    arrival: float = 0.0  # time.monotonic() of the front end


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probability (before temperature and truncation) of `token`, and the `top` most likely, best first."""

    token: int
    logprob: float
    rank: int  # 1 is the most likely
    top: list[tuple[int, float]]


class Output(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step gave one request."""

    id: str
    tokens: list[int] = []  # new token ids, in order; a stop token is included
    logprobs: list[TokenLogprob] | None = None  # one per new token
    prompt_logprobs: list[TokenLogprob | None] | None = None  # one per prompt token, first None; with the first output
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"
    stop_reason: int | None = None  # the stop token id that matched, when it was not the model's own eos
    error: str | None = None  # with finish_reason "error": the sentence for the user
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    queue_seconds: float = 0.0  # arrival -> first scheduled
    # What it was charged with, by class of the ledger; in the last output, and in every one if there are stop strings.
    device_seconds: dict[str, float] | None = None


class LedgerSnapshot(msgspec.Struct, frozen=True, array_like=True):
    """Where the device's time from `start` to `end` (time.monotonic()) went: see engine.ledger."""

    start: float
    end: float
    seconds: dict[str, float]  # by class
    tokens: dict[str, int]  # of finished requests: prompt (uncached), cached_prompt, decode


STEP_SIZES = (1, 8, *(16 << i for i in range(11)))  # tokens of a step: vLLM's buckets, without that for more


class EngineStats(msgspec.Struct, kw_only=True):
    """A snapshot for /metrics, /load and /health; counters only grow while the process lives."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0  # held by running requests; cached but unreferenced blocks are free
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    scheduled_tokens: int = 0  # prompts' and generated ones
    step_sizes: list[int] = msgspec.field(default_factory=lambda: [0] * (len(STEP_SIZES) + 1))  # steps by their tokens
    ledger: LedgerSnapshot | None = None


class EngineInfo(msgspec.Struct, kw_only=True):
    """What runs, on what, with how much KV cache: the banner, /v1/models, /version."""

    model: str  # the name it is served under
    path: str
    architecture: str
    parameters: int
    quantization: str  # e.g. "Q4_1" or "bfloat16"
    dtype: str  # of activations
    device: str  # e.g. "cpu (2 threads)" or "NVIDIA H100 80GB HBM3"
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    weight_bytes: int
    load_seconds: float
    batch_invariant: bool
    stages: list[tuple[str, float]] = []  # of the start, in order, and their seconds


class EngineOptions(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Everything that fixes how an engine runs; the command line's options carry the same names."""

    model: str = "smollm2-135m-instruct"
    load_format: str = "auto"  # "auto" | "dummy"
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    dtype: str = "auto"  # "auto" | "bfloat16" | "float16" | "float32"
    max_model_len: int | None = None  # default: the model's own context
    kv_cache_dtype: str = "auto"  # "auto": of the activations | "int8" | "fp8", with a scale for each row
    kv_cache_tokens: int | None = None  # size of the KV pool; default: sized from memory
    block_size: int | None = None  # default 64
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None  # token budget of a step; default depends on the device
    enable_prefix_caching: bool = True
    batch_invariant: bool | None = None  # default: on with float32, else off
    threads: int | None = None  # CPU threads; default: all cores
    enforce_eager: bool = False  # no CUDA graphs
    fusions: str = "auto"  # "auto": those measured to pay on this GPU | "none" | "all"
    gpu_memory_utilization: float = 0.9
    seed: int = 0  # for requests without one


# Front end -> engine process.


class Add(msgspec.Struct, tag=True, frozen=True):
    request: Request


class Cancel(msgspec.Struct, tag=True, frozen=True):
    ids: list[str]


class Finish(msgspec.Struct, tag=True, frozen=True):
    """A stop string ended the reply: how many tokens it has, and the device seconds that its last output told."""

    id: str
    tokens: int
    device_seconds: dict[str, float]


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Finish nothing more, free everything, exit 0."""


# Engine process -> front end.


class Loading(msgspec.Struct, tag=True, frozen=True):
    """Sent while starting: stage is "weights", "warm-up", ...; fraction in 0..1."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, tag=True, frozen=True):
    info: EngineInfo


class Outputs(msgspec.Struct, tag=True, frozen=True):
    outputs: list[Output]
    stats: EngineStats


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """Sent about once a second while the process lives, by a thread beside the loop: a long step does not stop it."""

    state: str  # "loading" | "idle" | "busy", or what a step does first: "compiling" | "capturing"
    step_seconds: float = 0.0  # how long the step under way has been running
    forecast: float = 0.0  # and how long it should take
    stats: EngineStats = msgspec.field(default_factory=EngineStats)


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The engine did not take the request: a RequestError's message, param and code."""

    id: str
    message: str
    param: str | None = None
    code: str | None = None


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start or go on; the sentence says why. The process ends after it."""

    message: str


ToEngine = Add | Cancel | Finish | Shutdown
FromEngine = Loading | Ready | Outputs | Refused | Heartbeat | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
