"""The command `fen`. Every command imports what it needs when it runs, so that `fen --help` is instant."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from engine.errors import FenError, is_out_of_memory
from engine.messages import EngineOptions, SamplingParams
from server import weights_cli
from server.bench_cli import bench, check_installation
from server.config_file import ConfigOption
from server.flags import SERVER, PriceOption, engine_options, options_of
from server.settings import ServerSettings

if TYPE_CHECKING:
    from server.local_model import LocalModel


class Commands(TyperGroup):
    """Turns errors into one sentence on standard error and exit status 1; wrong options exit with 2.

    FEN_DEBUG=1 shows the traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TyperException as error:  # a wrong option, which typer words itself
            if "unexpected extra argument" in error.message:
                error.message += ". The model is named by --model, and a text with spaces needs quotes."
            error.message = error.message.replace("Value error, ", "")
            option = getattr(getattr(error, "param", None), "name", None)
            if option and os.environ.get(variable := f"FEN_{option.upper()}"):
                error.message += f" ({variable} is set to {os.environ[variable][:100]!r})"
            raise
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get("FEN_DEBUG"):
                raise
            if isinstance(error, FenError):
                typer.echo(f"fen: {error}", err=True)
            elif is_out_of_memory(error):
                typer.echo("fen: there is not enough memory for this; choose a smaller model or fewer tokens", err=True)
            elif isinstance(error, OSError) and error.filename is not None:
                typer.echo(f"fen: {error.filename}: {error.strerror}", err=True)
            else:
                typer.echo(
                    f"fen: this is a bug in Fen: {type(error).__name__}: {error} (FEN_DEBUG=1 shows where)", err=True
                )
            raise typer.Exit(1) from None


app = typer.Typer(
    name="fen",
    cls=Commands,
    help="Serve LLaMA-family language models over the OpenAI API, on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.command()(weights_cli.quantize)
app.command()(weights_cli.compare)

MaxTokens = Annotated[int, typer.Option(min=1, metavar="N", help="New tokens at most.")]
Temperature = Annotated[float, typer.Option(min=0, max=2, metavar="X", help="0 takes the most likely token each time.")]
TopP = Annotated[
    float, typer.Option(min=0.001, max=1, metavar="X", help="Draw from the likeliest tokens of this total.")
]


@app.command(context_settings={"auto_envvar_prefix": "FEN"})
@engine_options
@options_of(ServerSettings, SERVER)
def serve(settings: ServerSettings, engine: EngineOptions, config: ConfigOption = None) -> None:
    """Serve a model over HTTP.

    A model that is not here yet is fetched first. An option that is not given is taken from the environment
    (--max-queue from FEN_MAX_QUEUE), else from the file of --config.
    """
    check_installation()
    from server.run import serve

    settings.engine = engine
    serve(settings)


@app.command()
@engine_options
def chat(
    engine: EngineOptions,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="A server that runs already; without it, an engine is started.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of an answer; default: the rest of the context.")
    ] = None,
    price: PriceOption = None,
) -> None:
    """Talk to a model in the terminal."""
    from rich.console import Console

    from server.local_model import REST_OF_CONTEXT
    from server.terminal_chat import RemoteModel, converse

    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens or REST_OF_CONTEXT)
    console = Console(highlight=False)
    if url is not None:
        if price is not None:
            raise typer.BadParameter("the server at --url has its own", param_hint="'--price'")
        remote = RemoteModel(url)
        console.print(f"{remote.model} at {remote.url}", markup=False)
        converse(remote, params, system, console)
        return
    with _start(engine, price) as model:
        console.print(f"{model.info.model} ({model.info.quantization}) on {model.info.device}", markup=False)
        converse(model, params, system, console)


@app.command()
@engine_options
def run(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help="The text to continue, or with --chat the question; - reads it from standard input."
        ),
    ],
    engine: EngineOptions,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_tokens: MaxTokens = 128,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be given several times.")
    ] = None,
) -> None:
    """Complete one prompt.

    Prints what follows it; the timing goes to standard error.
    """
    params = SamplingParams(
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=tuple(stop or ()), seed=engine.seed
    )
    if "" in params.stop:
        raise typer.BadParameter("an empty text would stop at once", param_hint="'--stop'")
    text = sys.stdin.read() if prompt == "-" else prompt
    with _start(engine) as model:
        pieces = model.chat([{"role": "user", "content": text}], params) if chat else model.complete(text, params)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print(flush=True)
        typer.secho(model.usage.line(), err=True, dim=True)


@app.command()
def cost(
    url: Annotated[str, typer.Option(metavar="URL", help="Where the server is.")] = "http://127.0.0.1:8000",
    plan: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Plan for this model instead, from its header; no server.")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Of a plan: cpu (this one), or a device of seeds/prices.toml.")
    ] = "cpu",
    weights: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Of a plan: as if the layers were in w4a16, w8a16, fp8 ...")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], typer.Option(help="Of a plan: the engine's option.")
    ] = "auto",
    context: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of a plan: tokens of a sequence.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, metavar="N", help="Of a plan: sequences together; several times.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Of a plan: tokens of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Of a plan: tokens of an answer.")] = 128,
    price: PriceOption = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Of a plan: write it there, too.")] = None,
) -> None:
    """Show where a running server's time went, and what its tokens cost.

    Seconds by class, the bill, US$ per million tokens; docs/cost.md explains them. With --plan: what a model would
    take and cost on a device, before a weight is read.
    """
    from rich.console import Console

    console = Console(highlight=False)
    if plan is None:
        from server.show_cost import show_cost

        show_cost(url, console)
        return
    from server.show_plan import Question, show_plan

    batches = sorted(set(batch or (1, 8, 64)))
    asked = Question(plan, device, weights, dtype, context, batches, prompt_tokens, output_tokens, price)
    show_plan(asked, console, json)


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A short name such as smollm2-135m-instruct, or a Hugging Face id.")
    ],
) -> None:
    """Fetch a model into the cache and print where it lies."""
    from engine.checkpoint.pull import pull

    print(pull(name))


@app.command()
def doctor() -> None:
    """Say what will run here, and why not.

    What is installed, devices, models. The exit status is 1 if something is wrong.
    """
    from server.doctor import examine

    report = examine()
    section = ""
    for row in report.rows:
        if row[0] != section:
            section = row[0]
            typer.secho(section, bold=True)
        print(f"  {row[1]:22} {row[2]}")
    print()
    for problem in report.problems:
        typer.secho(f"problem: {problem}", fg="red")
    if report.problems:
        raise typer.Exit(1)
    typer.secho("nothing is wrong", fg="green")


@app.command()
def version() -> None:
    """Print Fen's version."""
    from server.version import version

    print(version())


def _start(engine: EngineOptions, price: str | None = None) -> LocalModel:
    """An engine of one's own, with a progress line on standard error while it loads."""
    check_installation()
    from rich.console import Console

    from bench.prices import parse_price
    from server.local_model import LocalModel

    known = None if price is None else parse_price(price)
    with Console(stderr=True).status(f"loading {engine.model}") as status:
        return LocalModel(engine, lambda stage, fraction: status.update(f"{stage} {fraction:.0%}"), known)


if __name__ == "__main__":
    app(prog_name="fen")
