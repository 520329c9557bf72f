"""The command-line options of `fen bench serve` and `sweep`, of ServeOptions' fields; names as vLLM has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from server.flags import PriceOption

MANY = ("--header", "--goodput", "--metadata", "--max-concurrency")  # take several words, as with vLLM


class ManyWords(TyperCommand):
    """`--goodput ttft:200 tpot:50` means `--goodput ttft:200 --goodput tpot:50`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(repeated(args)))


def repeated(words: Iterable[str]) -> Iterable[str]:
    option, first = None, False
    for word in words:
        if word.startswith("-"):
            option, first = (word, True) if word in MANY else (None, False)
        elif option is not None:
            if not first:
                yield option
            first = False
        yield word


def _text(metavar: str, help: str) -> Any:
    return Annotated[str | None, typer.Option(metavar=metavar, help=help)]


def _count(help: str, least: int = 1) -> Any:
    return Annotated[int, typer.Option(min=least, metavar="N", help=help)]


def _optional_count(help: str) -> Any:
    return Annotated[int | None, typer.Option(min=1, metavar="N", help=help)]


def _number(help: str) -> Any:
    return Annotated[float | None, typer.Option(metavar="X", help=help)]


def _several(metavar: str, help: str) -> Any:
    return Annotated[list[str], typer.Option(metavar=metavar, help=help)]


def _flag(help: str, name: str) -> Any:
    return Annotated[bool, typer.Option(name, help=help)]


SERVE: dict[str, Any] = {
    "backend": Annotated[
        Literal["openai", "vllm", "openai-chat"],
        typer.Option(help="openai and vllm: completions; openai-chat: chat completions."),
    ],
    "base_url": _text("URL", "Where the server is, if not at --host and --port."),
    "host": Annotated[str, typer.Option(metavar="HOST")],
    "port": Annotated[int, typer.Option(min=1, max=65535, metavar="N")],
    "endpoint": _text("PATH", "Default: /v1/completions or /v1/chat/completions, by --backend."),
    "header": _several("KEY=VALUE", "Of every request. OPENAI_API_KEY in the environment is sent as a bearer token."),
    "insecure": _flag("Do not verify the server's certificate.", "--insecure"),
    "launch": _text("OPTIONS", "Start `fen serve` with these options for the time of the measurement."),
    "ready_check_timeout_sec": _count("Seconds to wait for the server.", 0),
    "model": _text("NAME", "Default: the first one that the server lists."),
    "served_model_name": _text("NAME", "The name to ask for, if it is not --model."),
    "tokenizer": _text("NAME", "A tokenizer.json, a folder or a model in the cache; default: that of the model."),
    "label": _text("TEXT", "Begins the file's name; default: the backend."),
    "seed": Annotated[int, typer.Option(metavar="N", help="Of prompts and arrivals.")],
    "dataset_name": Annotated[
        Literal["random", "sharegpt", "custom", "prefix_repetition", "multi_turn"],
        typer.Option(help="multi_turn: conversations whose turns carry all turns before."),
    ],
    "dataset_path": _text("FILE", "Of sharegpt (JSON) and custom (lines of JSON with a prompt)."),
    "num_prompts": _count("Requests of a run."),
    "input_len": _optional_count("Tokens of a prompt, for random and multi_turn."),
    "output_len": _optional_count("Tokens of an answer, for every dataset."),
    "random_input_len": _count("Tokens of a prompt."),
    "random_output_len": _count("Tokens of an answer."),
    "random_range_ratio": Annotated[
        float, typer.Option(metavar="X", help="Lengths are drawn from 1 - X to 1 + X times the ones above.")
    ],
    "random_prefix_len": _count("Tokens that all prompts begin with, on top.", 0),
    "sharegpt_output_len": _optional_count("Default: as long as the file's answers."),
    "custom_output_len": Annotated[int, typer.Option(min=-1, metavar="N", help='-1: the lines\' "output_tokens".')],
    "prefix_repetition_prefix_len": _count("Tokens of a prefix."),
    "prefix_repetition_suffix_len": _count("Tokens of what follows a prefix."),
    "prefix_repetition_num_prefixes": _count("Prefixes, shared by all prompts."),
    "prefix_repetition_output_len": _count("Tokens of an answer."),
    "multi_turn_num_turns": _count("Turns of a conversation."),
    "multi_turn_input_len": _count("Tokens that the user says in a turn."),
    "multi_turn_output_len": _count("Tokens of an answer."),
    "multi_turn_prefix_len": _count("Tokens that all conversations begin with, on top.", 0),
    "disable_shuffle": _flag("Keep a dataset's order.", "--disable-shuffle"),
    "request_rate": Annotated[float, typer.Option(metavar="X", help="Requests a second; inf: all at the start.")],
    "burstiness": Annotated[
        float, typer.Option(metavar="X", help="1: a Poisson process; below: bursts; above: more even; inf: even.")
    ],
    "ramp_up_strategy": Annotated[
        Literal["linear", "exponential"] | None, typer.Option(help="Let the rate grow from one to the other:")
    ],
    "ramp_up_start_rps": _number("Requests a second at first."),
    "ramp_up_end_rps": _number("Requests a second at last."),
    "max_concurrency": _several("N", "Requests at once; several (1,2,4 or 1 2 4): a measurement for each."),
    "num_warmups": _count("Requests before, which do not count.", 0),
    "num_runs": _count("Runs with other prompts, of which the median counts."),
    "ignore_eos": Annotated[
        bool | None, typer.Option(help="Answers of full length; default: on for random and multi_turn.")
    ],
    "temperature": _number("Default: the server's."),
    "top_p": _number("Default: the server's."),
    "top_k": Annotated[int | None, typer.Option(metavar="N", help="Default: the server's.")],
    "min_p": _number("Default: the server's."),
    "frequency_penalty": _number("Default: the server's."),
    "presence_penalty": _number("Default: the server's."),
    "repetition_penalty": _number("Default: the server's."),
    "logprobs": Annotated[int | None, typer.Option(min=0, metavar="N", help="Log probabilities for each token.")],
    "extra_body": _text("JSON", "More fields of every request."),
    "goodput": _several("KEY:MS", "What a good request keeps: ttft, tpot, e2el and milliseconds, as ttft:200."),
    "percentile_metrics": Annotated[str, typer.Option(metavar="NAMES", help="What is printed, with commas.")],
    "metric_percentiles": Annotated[str, typer.Option(metavar="NUMBERS", help="Percentiles of these, with commas.")],
    "price": PriceOption,
    "num_devices": _count("Devices behind the server, for the bill of one that is no Fen."),
    "disable_tqdm": _flag("No progress bar.", "--disable-tqdm"),
    "save_result": _flag("Write the result as JSON.", "--save-result"),
    "save_detailed": _flag("With every request's lengths, times, text and error.", "--save-detailed"),
    "result_dir": _text("FOLDER", "Default: here."),
    "result_filename": _text("NAME", "Default: made of label, rate, concurrency, model and time."),
    "metadata": _several("KEY=VALUE", "Notes for the file."),
}
