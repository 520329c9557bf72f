"""The commands `fen quantize` and `fen compare`. What they do is in bench/; here are their options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from engine.errors import FenError
from engine.messages import EngineOptions
from server.bench_cli import check_installation
from server.flags import PriceOption


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, a folder, a short name or an id.")],
    to: Annotated[
        Literal["w4a16", "w8a16", "w8a8", "fp8"],
        typer.Option("--to", help="w: bits of weights, a: of activations; fp8: both in e4m3."),
    ],
    method: Annotated[
        Literal["rtn", "gptq"] | None,
        typer.Option(help="rtn: to the nearest; gptq: calibrated. Default: gptq for w4a16, rtn for the others."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A new folder; default: MODEL's name and the format, here.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A text like those that the model will see."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, metavar="N", help="Of the calibration.")] = 8192,
    group_size: Annotated[
        int | None, typer.Option(metavar="32|64|128", help="Columns that share a scale; default: the most that fit.")
    ] = None,
) -> None:
    """Write a model in fewer bits.

    As compressed-tensors safetensors, which transformers and other engines load too. One layer is in memory at a time.
    """
    check_installation()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bench.quantize.run import quantize

    folder = Path(output or f"{Path(model).name.removesuffix('.gguf')}-{to}")
    columns = TextColumn("layers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)
        text = None if calibration is None else Path(calibration)
        quantize(
            model, to, folder, method, text, tokens, group_size,
            on_layer=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{folder}: {size / 1e6:,.0f} MB of weights")


def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="The first is the reference. MODEL:kv_cache_dtype=int8 sets options."),
    ],
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Default: a dictionary of 1911.")] = None,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Of the text.")] = 4096,
    window: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens that are computed together.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Streams together, for speed and cost.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads; default: all cores.")] = None,
    price: PriceOption = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the result there, too.")] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw quality against cost, as PNG, SVG or PDF.")
    ] = None,
) -> None:
    """Show what smaller forms of a model cost in quality and give in bytes, speed and US$.

    Perplexity on a text, KL divergence and agreement with the first model, bytes of weights and of KV cache, tokens a
    second and, with --price, US$ per million tokens. On the CPU.
    """
    check_installation()
    from rich.console import Console

    from bench import compare as comparison
    from bench import results
    from bench.machine import Disturbance, cpu_name
    from bench.prices import parse_price
    from bench.prompts import text_of
    from engine.cores import default_threads

    known = None if price is None else parse_price(price)
    if plot is not None and Path(plot).suffix not in (".png", ".svg", ".pdf"):
        raise FenError(f"--plot is {plot!r}; the name of a picture ends in .png, .svg or .pdf.")
    for path in filter(None, (json, plot)):
        results.check_writable(Path(path))
    options = EngineOptions(device="cpu", threads=threads)
    given = text_of(None if text is None else Path(text), "--text", "evaluation.txt")
    others = Disturbance(os.getpid())
    with Console(stderr=True).status("") as status:
        rows = comparison.compare(models, options, given, tokens, window, batch, known, status.update)
    print(comparison.table(rows, batch))
    used = threads or default_threads()
    kept = comparison.result(rows, window, batch, used, known, cpu_name(), others.share())
    if json is not None:
        results.save(Path(json), kept)
    if plot is not None:
        comparison.plot(Path(plot), rows, f"{models[0]}, {tokens} tokens, {kept.device}")
