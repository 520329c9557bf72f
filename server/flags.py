"""Command-line options made from the fields of a settings struct, so that both have the same names and defaults."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
import typer

from engine.messages import EngineOptions

# The type and the help of each field's option; the range is checked before anything is loaded.
ENGINE: dict[str, Any] = {
    "model": Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="A GGUF file, a folder of safetensors, a short name or a Hugging Face id.",
        ),
    ],
    "load_format": Annotated[
        Literal["auto", "dummy"], typer.Option(help="dummy: weights made up from the config alone.")
    ],
    "device": Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto is the CPU; cuda has not run on a GPU yet.")
    ],
    "dtype": Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of activations; float32 is exact and slow."),
    ],
    "max_model_len": Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tokens of prompt and answer together; default: the model's own context."
        ),
    ],
    "kv_cache_tokens": Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens that the KV cache holds, all requests together; default: sized from memory.",
        ),
    ],
    "kv_cache_dtype": Annotated[
        Literal["auto", "int8", "fp8"],
        typer.Option(help="Of keys and values; 8 bits hold twice the tokens. auto: as the activations."),
    ],
    "block_size": Annotated[
        int | None,
        typer.Option(min=16, max=128, metavar="N", help="Tokens in a KV block: 16, 32, 64 or 128; default 64."),
    ],
    "max_num_seqs": Annotated[int, typer.Option(min=1, metavar="N", help="Sequences that run together.")],
    "max_num_batched_tokens": Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens that one step computes; default: by device.")
    ],
    "enable_prefix_caching": Annotated[bool, typer.Option(help="Reuse the KV blocks of equal beginnings.")],
    "batch_invariant": Annotated[
        bool | None, typer.Option(help="The same bits alone and in a batch; default: on with float32.")
    ],
    "threads": Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads; default: all cores.")],
    "enforce_eager": Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")],
    "fusions": Annotated[
        Literal["auto", "none", "all"],
        typer.Option(help="Decode launches that are fused on a GPU; auto: those measured to pay there."),
    ],
    "gpu_memory_utilization": Annotated[
        float,
        typer.Option(
            min=0.05, max=1.0, metavar="X", help="Share of the GPU's memory that weights and KV cache may take."
        ),
    ],
    "seed": Annotated[int, typer.Option(metavar="N", help="Of requests that bring none.")],
}

PriceOption = Annotated[
    str | None,
    typer.Option(
        metavar="PRICE",
        help="US$ per device-hour, or the name of a device such as cpu-4vcpu; default: by the GPU's name.",
    ),
]

SERVER: dict[str, Any] = {
    "host": Annotated[str, typer.Option(metavar="HOST", help="Address to listen on; 0.0.0.0 is every network.")],
    "port": Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen on; 0 takes a free one.")],
    "served_model_name": Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="A name that clients ask for; give several, or put commas between. Default: the model's own.",
        ),
    ],
    "max_queue": Annotated[
        int, typer.Option(min=0, metavar="N", help="Requests that may wait for a place in the batch before 429.")
    ],
    "max_queue_tokens": Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens of prompts that may wait likewise before 429.")
    ],
    "request_timeout": Annotated[
        float | None,
        typer.Option(min=0.001, metavar="SECONDS", help="From a request's arrival to its end; default: no limit."),
    ],
    "drain_timeout": Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="What running requests get after SIGTERM.")
    ],
    "price": PriceOption,
    "log_format": Annotated[
        Literal["text", "json"], typer.Option(help="A line for each request: key=value, or a JSON object.")
    ],
    "log_file": Annotated[
        str | None, typer.Option(metavar="FILE", help="Append the log to this file; default: standard error.")
    ],
    "api_key_file": Annotated[
        str | None,
        typer.Option(metavar="FILE", help="API keys, one a line; callers must send one of them. Default: open to all."),
    ],
    "allowed_hosts": Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="A name that clients call this server by, beside addresses and localhost; * is any. "
            "Default: any, but none on a loopback address without API keys.",
        ),
    ],
    "cors_origins": Annotated[
        list[str], typer.Option(metavar="ORIGIN", help="A web origin that may call; may be given several times.")
    ],
}


def options_of(
    struct: type[msgspec.Struct], annotations: dict[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command that takes a `struct`: it gets an option for each field in `annotations` instead.

    The struct is built from what the user gave and handed over under the name of the parameter annotated with it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        (target,) = (name for name, parameter in signature.parameters.items() if parameter.annotation is struct)
        defaults = struct()
        added = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=getattr(defaults, name), annotation=annotation
            )
            for name, annotation in annotations.items()
        ]
        kept = [parameter for name, parameter in signature.parameters.items() if name != target]

        @functools.wraps(command)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            fields = {name: _split(kwargs.pop(name)) for name in annotations}
            command(*args, **kwargs, **{target: struct(**fields)})

        wrapper.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*kept, *added]}
        return wrapper

    return decorate


def _split(value: Any) -> Any:
    """Of an option that may be given several times: commas separate, too, for the environment has but one value."""
    if not isinstance(value, list):
        return value
    return [part.strip() for item in value for part in item.split(",") if part.strip()]


engine_options = options_of(EngineOptions, ENGINE)
