"""The measurement: for each concurrency some runs with fresh prompts, between two looks at the server's ledger."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.prices import Price, parse_price
from bench.serving import bill, metrics
from bench.serving.client import Client, HttpError
from bench.serving.datasets import Conversation, as_long_as_wanted, by_server, load
from bench.serving.load import Answer, Load
from bench.serving.options import FILES, ServeOptions
from bench.serving.vocabulary import Vocabulary, open_vocabulary
from engine.errors import FenError

Point = dict[str, Any]  # a concurrency's figures: medians, their spread, and `runs` with those of each


@dataclasses.dataclass
class Measurement:
    """price, or the reason why there is none. server: what it says of itself (model, quantization, device, notes);
    empty where it is not a Fen."""

    model: str
    tokenizer: str | None
    server: dict[str, Any]
    price: Price | None
    reason: str | None
    points: list[Point] = dataclasses.field(default_factory=list)
    interrupted: bool = False


def measure(options: ServeOptions, each: Callable[[Measurement, Point], None]) -> Measurement:
    """`each` gets every point when it is measured. After Ctrl-C what there is comes back, marked. Raises FenError."""
    options.check()
    price = None if options.price is None else parse_price(options.price)
    return asyncio.run(_measure(options, price, each))


async def _measure(
    options: ServeOptions, price: Price | None, each: Callable[[Measurement, Point], None]
) -> Measurement:
    key = os.environ.get("OPENAI_API_KEY")
    headers = ({"Authorization": f"Bearer {key}"} if key else {}) | options.headers
    try:
        client = Client(options.url, headers, options.insecure)
    except ValueError as error:
        raise FenError(f"--base-url: {error}.") from None
    stop = asyncio.Event()
    with contextlib.closing(client), _interrupts(stop):
        model, root = await _served_model(client, options)
        vocabulary = await asyncio.to_thread(open_vocabulary, options.tokenizer, root)
        body = await bill.ledger(client)
        found = Measurement(model, vocabulary.name, _about(body), *bill.price_of_run(price, body))
        for number, concurrency in enumerate(options.concurrencies):
            with _progress(options) as progress:
                runs = await _runs(options, client, vocabulary, found, number, concurrency, stop, progress)
            if runs:
                found.points.append({"max_concurrency": concurrency, **metrics.together(runs), "runs": runs})
                each(found, found.points[-1])
            if stop.is_set():
                found.interrupted = True
                break
    if not found.points:
        raise FenError("It was interrupted before any request was answered.")
    return found


async def _runs(
    options: ServeOptions,
    client: Client,
    vocabulary: Vocabulary,
    found: Measurement,
    number: int,
    concurrency: int | None,
    stop: asyncio.Event,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The figures of each run that has any."""
    sender = Load(client, options, found.model)

    async def prompts(seed: str) -> list[Conversation]:
        made = load(options, vocabulary, seed)
        if options.dataset_name in FILES or (vocabulary.exact and await as_long_as_wanted(client, found.model, made)):
            return made
        cut = await by_server(client, found.model, made)
        if cut is None and seed.endswith(" 0 0"):
            _say("No tokenizer is here or at the server: lengths are in words. --tokenizer names one.")
        return cut or made

    if options.num_warmups:
        warm = await prompts(f"{options.seed} warm-up {number}")
        await sender.warm_up(warm[0][0], options.num_warmups, concurrency)
    runs = []
    for i in range(options.num_runs):
        conversations = await prompts(f"{options.seed} {number} {i}")
        what = f"concurrency {concurrency or 'unlimited'}, run {i + 1} of {options.num_runs}"
        task = progress.add_task(what, total=sum(map(len, conversations)))

        def done(answer: Answer, task: Any = task) -> None:
            progress.advance(task)

        before = await bill.ledger(client, settled=True) if found.server else None
        run = await sender.run(conversations, concurrency, options.seed + i, stop, done)
        after = await bill.ledger(client, settled=True) if found.server else None
        figures = metrics.measured(run, options)
        if figures["completed"]:
            figures["request_rate"] = options.request_rate
            figures |= bill.account(before, after, figures, found.price, options.num_devices)
            runs.append(figures)
        elif not stop.is_set():
            first = next(answer.error for answer in run.answers)
            raise FenError(f"None of the {len(run.answers)} requests was answered; the first: {first}.")
        if stop.is_set():
            break
    return runs


async def _served_model(client: Client, options: ServeOptions) -> tuple[str, str]:
    """(the name to ask for, the model behind it). Raises FenError when nobody answers or the model is not served."""
    deadline = time.monotonic() + options.ready_check_timeout_sec
    while True:
        try:
            served = (await client.get("/v1/models"))["data"]
            break
        except HttpError as error:
            if time.monotonic() < deadline:
                await asyncio.sleep(0.5)
                continue
            wanted = options.served_model_name or options.model
            if error.status == 404 and wanted:  # it does not list its models
                return wanted, options.model or wanted
            raise FenError(f"There is no server to measure: {error}.") from None
        except (KeyError, TypeError):
            raise FenError(f"The server at {client.url} does not list models as the OpenAI API does.") from None
    names = [str(entry.get("id")) for entry in served]
    wanted = options.served_model_name or options.model or (names[0] if names else None)
    if wanted is None:
        raise FenError(f"The server at {client.url} serves no model.")
    if wanted not in names:
        raise FenError(f"The server at {client.url} does not serve {wanted!r}; it serves {', '.join(names)}.")
    root = next(str(entry.get("root") or wanted) for entry in served if entry.get("id") == wanted)
    return wanted, options.model if options.served_model_name and options.model else root


def _about(body: dict[str, Any] | None) -> dict[str, Any]:
    names = ("model", "quantization", "device", "notes")
    return {} if body is None else {name: body.get(name) for name in names}


@contextlib.contextmanager
def _interrupts(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C ends the run with what it has; the second one ends the program."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, interrupt)
    except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _progress(options: ServeOptions) -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=options.disable_tqdm or not console.is_terminal)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
