"""The commands `fen bench ...`. What they do is in bench/; here are their options."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Literal

import typer

from bench.serving.options import ServeOptions
from engine.errors import FenError
from engine.messages import EngineOptions
from server.bench_flags import SERVE, ManyWords
from server.flags import PriceOption, engine_options, options_of

bench = typer.Typer(help="Measure the engine.", no_args_is_help=True, rich_markup_mode=None)

Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads; default: torch's own.")]


def check_installation() -> None:
    """Raises FenError where a library is missing or too old."""
    from server.doctor import installation_problems

    for problem in installation_problems():
        raise FenError(problem)


@bench.command(cls=ManyWords)
@options_of(ServeOptions, SERVE)
def serve(options: ServeOptions) -> None:
    """Put load on any server that speaks the OpenAI API, and measure it.

    Options, metrics and output are those of `vllm bench serve`; below its block stand US$ per million tokens,
    utilisation and energy, from the server's ledger where it is a Fen. Ctrl-C keeps what was measured.
    """
    from bench.serving.command import run

    raise typer.Exit(run(options))


@bench.command(cls=ManyWords)
@options_of(ServeOptions, SERVE)
def sweep(
    options: ServeOptions,
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Where sweep.json and the plots go.")] = "sweep",
) -> None:
    """Measure a server at several concurrencies: speed and cost for each user against the whole.

    Tokens a second of the device, and US$ per million tokens, against tokens a second of one user. The options are
    those of `fen bench serve`; without --max-concurrency it takes 1, 2, 4, 8 and 16.
    """
    from bench.serving.sweep import run

    raise typer.Exit(run(options, output))


@bench.command()
@engine_options
def throughput(
    engine: EngineOptions,
    dataset_name: Annotated[
        Literal["random", "sharegpt", "custom", "prefix_repetition"], typer.Option(help="As of fen bench serve.")
    ] = "random",
    dataset_path: Annotated[str | None, typer.Option(metavar="FILE", help="Of sharegpt and custom.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts of a run, all given at once.")] = 1000,
    input_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a random prompt.")] = 1024,
    output_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of an answer.")] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(metavar="X", help="Random lengths are 1 - X to 1 + X times these.")
    ] = 0.0,
    num_runs: Annotated[int, typer.Option(min=1, metavar="N", help="Of which the median is printed.")] = 3,
    price: PriceOption = None,
    output_json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the result there, too.")] = None,
) -> None:
    """Measure the engine alone with all prompts at once.

    Requests and tokens a second as `vllm bench throughput` has them, and US$ per million tokens.
    """
    check_installation()
    from bench.throughput import run

    workload = ServeOptions(
        dataset_name=dataset_name,
        dataset_path=dataset_path,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        random_range_ratio=random_range_ratio,
        num_runs=num_runs,
        price=price,
        seed=engine.seed,
    )
    run(engine, workload, output_json)


@bench.command()
@engine_options
def latency(
    engine: EngineOptions,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the answer.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1, metavar="N", help="Of which the median is printed.")] = 5,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the result there, too.")] = None,
) -> None:
    """Measure one stream.

    Tokens a second of a prompt (pp512) and of an answer (tg128), as llama-bench has them, beside the limits of this
    machine, which are measured in the same run.
    """
    check_installation()
    from bench.latency import run

    run(engine, prompt_tokens, new_tokens, repetitions, json)


@bench.command()
def ladder(
    model: Annotated[str, typer.Option(help="As for fen serve.")] = EngineOptions().model,
    load_format: Annotated[Literal["auto", "dummy"], typer.Option(help="As for fen serve.")] = "auto",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Which rungs: those of a CPU or of a GPU.")] = "cpu",
    threads: Threads = None,
    price: PriceOption = None,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where the result is kept; default: in bench/results.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the result of a run that was cut short.")
    ] = False,
) -> None:
    """Measure the cost ladder: one workload, and one technique more on each rung.

    From plain PyTorch, one request at a time, to everything that this engine does on the device; with US$ per million
    tokens and what each rung changes in the answers. About half an hour on two cores; Ctrl-C keeps what was measured.
    """
    check_installation()
    from pathlib import Path

    from bench.ladder import run
    from bench.prices import parse_price

    known = None if price is None else parse_price(price)
    data = run(model, load_format, device, threads, known, None if json is None else Path(json), resume)
    raise typer.Exit(0 if data["complete"] else 130)


@bench.command()
@engine_options
def load(
    engine: EngineOptions,
    soak: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Of random load; 0 leaves it out.")] = 120.0,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the result there, too, after each scenario.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="This scenario; may be repeated.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what the file of --json holds already.")] = False,
) -> None:
    """See what a server withstands, beside what is wanted of it.

    It starts servers of its own on this machine: a thousand connections, cancelled and bad requests, large prompts, an
    engine that hangs; what HTTP takes from the engine's speed; memory and CPU. About 14 minutes.
    """
    check_installation()
    from bench.load.command import run

    run(engine, soak, json, only or (), resume)


@bench.command()
def kernels(
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only the cases whose name contains this.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes.")] = False,
    flex: Annotated[
        bool, typer.Option("--flex", help="FlexAttention, too: seconds of compiling for each size.")
    ] = False,
    threads: Threads = None,
    output: Annotated[str | None, typer.Option(metavar="FOLDER", help="Keep JSON, CSV and plots there.")] = None,
) -> None:
    """Measure every kernel beside what PyTorch has for the same work.

    On a GPU the Triton kernels; without one the operations of the CPU path. The exit status is 1 if a kernel is wrong.
    """
    check_installation()
    from bench.kernels import run

    with _refusals():
        right = run(only, quick, flex, threads, output)
    raise typer.Exit(0 if right else 1)


@bench.command()
def step(
    model: Annotated[str, typer.Option(metavar="SHAPE", help="The shape; its weights are random.")] = "smollm2-135m",
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences in the step.")] = 1,
    context: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that each of them has.")] = 1024,
    weights: Annotated[str, typer.Option(metavar="FORMAT", help="Q4_1, or on a GPU W4 g128.")] = "Q4_1",
    threads: Threads = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the result there, too.")] = None,
    fused: Annotated[bool, typer.Option("--fused", help="On a GPU: six launches a layer instead of nine.")] = False,
) -> None:
    """Measure one decode step, launch by launch, beside the least that its bytes and FLOPs take."""
    check_installation()
    from bench.step import run

    with _refusals():
        run(model, batch, context, weights, threads, json, fused)


@bench.command()
def tune(
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only the cases whose name contains this.")] = "",
) -> None:
    """Find the fastest tiles on this GPU and keep them for the kernels to use."""
    check_installation()
    from bench.tune import run

    with _refusals():
        run(only)


@bench.command()
def report(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE...]", help="Results, or folders of them; default: those of the repository."),
    ] = None,
    html: Annotated[str, typer.Option(metavar="FILE", help="The page to write.")] = "report.html",
    markdown: Annotated[str, typer.Option(metavar="FILE", help="The same as text.")] = "report.md",
    export: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write every picture there: SVG, and PNG with Chromium.")
    ] = None,
) -> None:
    """Make one page of the results: the ladder, costs and latencies, kernels, and sliders for what if.

    The page needs nothing else, neither a server nor the net. What was not measured is named and left out.
    """
    from bench.reporting.command import run

    run(files or [], html, markdown, export)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A benchmark's refusal is a sentence for the user."""
    from bench.operations import BenchError

    try:
        yield
    except BenchError as error:
        raise FenError(str(error)) from None
