"""`fen compare`: what a smaller form of a model costs in quality, and what it gives in bytes, speed and US$.

Every model computes the same text in windows that each begin anew. The first model is the reference: KL divergence, in
nats, is from its distribution of the next token to the other's, averaged over all positions.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from bench import results
from bench.local_engine import LocalEngine
from bench.prices import Price
from bench.quality import divergence
from bench.report import markdown_table
from engine.checkpoint import open_checkpoint
from engine.core.runner import Runner
from engine.errors import FenError
from engine.messages import EngineOptions

PROMPT, NEW, REPETITIONS = 256, 32, 2
# Options of one model of a comparison: NAME:kv_cache_dtype=int8,dtype=float32
OPTIONS = {"dtype": ("auto", "bfloat16", "float32"), "kv_cache_dtype": ("auto", "int8", "fp8")}


@dataclasses.dataclass(frozen=True)
class Row:
    """name: as it was asked for; tokens: of the text. Rates in tokens/s; decode with `batch` streams together; cost:
    US$ per million."""

    name: str
    tokens: int
    quantization: str
    weight_bytes: int
    kv_bytes_per_token: float
    perplexity: float
    kl_nats: float
    top1_agreement: float
    prefill_rate: float
    decode_rate: float
    batch_decode_rate: float
    usd_per_million: float | None


def parse(name: str, base: EngineOptions) -> EngineOptions:
    """ "MODEL" or "MODEL:option=value,..." -> the options of one engine. Raises FenError."""
    model, _, rest = name.rpartition(":") if "=" in name.rpartition(":")[2] else (name, "", "")
    changes: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        option, _, value = part.partition("=")
        if value not in OPTIONS.get(option, ()):
            allowed = "; ".join(f"{key}={'|'.join(values)}" for key, values in OPTIONS.items())
            raise FenError(f"{name!r}: {part!r} is not allowed after the model; {allowed} is.")
        changes[option] = value
    return msgspec.structs.replace(base, model=model, **changes)


def compare(
    names: list[str],
    options: EngineOptions,
    text: str,
    tokens: int,
    window: int,
    batch: int,
    price: Price | None,
    say: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """One row a model, in order; the first is the reference. Raises FenError."""
    wanted = [parse(name, options) for name in names]
    ids: list[int] = []
    vocab_size = 0
    for name, one in zip(
        names, wanted, strict=True
    ):  # what is wrong is said before the minutes that the first ones take
        checkpoint = open_checkpoint(one.model, one.load_format)
        if window > checkpoint.config.max_position:
            raise FenError(f"--window is {window}; the context of {name} is {checkpoint.config.max_position} tokens.")
        found = checkpoint.tokenizer.encode(text, add_special_tokens=False)[:tokens]
        if len(found) < 2:
            raise FenError("The text has fewer than two tokens.")
        if ids and (found != ids or checkpoint.config.vocab_size != vocab_size):
            raise FenError(f"{name} has another tokenizer than {names[0]}, so their predictions cannot be compared.")
        ids, vocab_size = found, checkpoint.config.vocab_size
    rows: list[Row] = []
    reference: list[torch.Tensor] | None = None
    for name, one in zip(names, wanted, strict=True):
        say(f"loading {name}")
        pool = max(window, (batch + 1) * (PROMPT + NEW)) + 256
        settings = msgspec.structs.replace(one, kv_cache_tokens=pool, max_num_seqs=batch, enable_prefix_caching=False)
        engine = LocalEngine(settings)
        say(f"computing {len(ids)} tokens with {name}")
        computed = _log_probabilities(engine, ids, window)
        first = reference or computed
        rows.append(_row(name, engine, ids, window, computed, first, batch, price, say))
        reference = first
        del engine, computed
        gc.collect()
    return rows


def _log_probabilities(engine: LocalEngine, ids: list[int], window: int) -> list[torch.Tensor]:
    """float32 [window, V] of each window."""
    runner = engine.core.runner
    assert isinstance(runner, Runner)
    step = runner.max_num_batched_tokens
    parts = []
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        logits = [runner.logits(part[i : i + step], i) for i in range(0, len(part), step)]
        parts.append(torch.cat(logits).log_softmax(-1))
    return parts


def _row(
    name: str,
    engine: LocalEngine,
    ids: list[int],
    window: int,
    computed: list[torch.Tensor],
    reference: list[torch.Tensor],
    batch: int,
    price: Price | None,
    say: Callable[[str], None],
) -> Row:
    lost, kl, same, count = 0.0, 0.0, 0.0, 0
    for index, (mine, theirs) in enumerate(zip(computed, reference, strict=True)):
        targets = torch.tensor(ids[index * window + 1 : index * window + len(mine)])
        lost -= mine[: len(targets)].gather(1, targets[:, None]).double().sum().item()
        count += len(targets)
        mean_kl, agreement = divergence(theirs, mine)
        kl, same = kl + mean_kl * len(mine), same + agreement * len(mine)
    say(f"timing {name}")
    prefill, decode, together = _rates(engine, ids, batch)
    per_second = price.per_second if price else None
    usd = None if per_second is None else 1e6 * per_second * (3 / prefill + 1 / together) / 4
    info = engine.info
    kv = info.kv_cache_bytes / (info.num_blocks * info.block_size)
    quality = math.exp(lost / count), kl / len(ids), same / len(ids)
    return Row(name, len(ids), info.quantization, info.weight_bytes, kv, *quality, prefill, decode, together, usd)


def _rates(engine: LocalEngine, ids: list[int], batch: int) -> tuple[float, float, float]:
    """Tokens/s: of a prompt, of one stream's answer, of `batch` streams' answers; the best of a few."""
    prompt = [ids[i % len(ids)] for i in range(min(PROMPT, engine.info.max_model_len - NEW))]
    engine.generate([prompt[:16]], 2)
    alone = [engine.generate([prompt], NEW) for _ in range(REPETITIONS)]
    many = [engine.generate([prompt[i:] + prompt[:i] for i in range(batch)], NEW) for _ in range(REPETITIONS)]
    return (
        len(prompt) / min(timing.first_seconds for timing in alone),
        max(timing.decode_rate for timing in alone),
        max(timing.decode_rate for timing in many),
    )


def rows_of(result: results.Result) -> list[Row]:
    """Of a file. Raises FenError where it is not whole."""
    try:
        return [Row(**row) for row in result.data["rows"]]
    except (KeyError, TypeError) as error:
        raise FenError(f"a result of the kind compare is not whole: {error}") from None


def conditions(result: results.Result) -> str:
    """One paragraph: what the figures of the table are of."""
    data, money = result.data, ""
    others = data["others_cpu_share"]
    busy = ""
    if others is not None:  # it is counted on Linux
        meaning = ", so speeds and US$ of this run mean little" if others > 0.1 else ""
        busy = f" Other processes used {others:.0%} of the CPUs{meaning}."
    if result.price:
        money = (
            f" US$ per million tokens at {result.price.usd_per_device_hour:g} a device-hour ({result.price.name}, "
            f"{result.price.date}, {result.price.source}): the blend of three prompt tokens to one of the answer, with "
            f"{data['batch']} streams busy (basis busy, utilisation 100%)."
        )
    return (
        f"{result.model} ({result.quantization}) is the reference, on {result.device}, "
        f"{data['threads']} thread{'s' * (data['threads'] > 1)}. Quality: of {data['tokens']:,} tokens of the text, "
        f"in windows of {data['window']:,}. Speed, tokens a second: a prompt of {data['prompt_tokens']} tokens, then "
        f"{data['new_tokens']} of the answer, alone and {data['batch']} together; the best of "
        f"{REPETITIONS}.{money}{busy}"
    )


def table(rows: list[Row], batch: int) -> str:
    header = ["", "weights", "KV/token", "perplexity", "KL, nats", "same top-1", "prefill", "decode", f"× {batch}"]
    priced = any(row.usd_per_million is not None for row in rows)
    lines = []
    for row in rows:
        lines.append(
            [
                row.name, f"{row.weight_bytes / 1e6:,.0f} MB", f"{row.kv_bytes_per_token / 1e3:.1f} kB",
                f"{row.perplexity:.2f}", f"{row.kl_nats:.2e}", f"{row.top1_agreement:.1%}",
                f"{row.prefill_rate:,.0f}", f"{row.decode_rate:,.0f}", f"{row.batch_decode_rate:,.0f}",
            ]
        )  # fmt: skip
        if priced:
            lines[-1].append("" if row.usd_per_million is None else f"{row.usd_per_million:.4f}")
    return markdown_table(header + (["US$/M"] if priced else []), lines)


def result(
    rows: list[Row], window: int, batch: int, threads: int, price: Price | None, device: str, others_cpu_share: float
) -> results.Result:
    data: dict[str, Any] = {
        "tokens": rows[0].tokens, "window": window, "batch": batch, "threads": threads, "prompt_tokens": PROMPT,
        "new_tokens": NEW, "others_cpu_share": others_cpu_share,
        "blend": "3 prompt tokens to 1 output token, all streams busy",
        "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    first = rows[0]
    return results.new(
        "compare", data, model=first.name, quantization=first.quantization, device=device, price=price
    )  # fmt: skip


def plot(path: Path, rows: list[Row], caption: str) -> None:
    """Perplexity against US$ per million tokens, or without a price against the bytes that a decode step reads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    priced = all(row.usd_per_million is not None for row in rows)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for row in rows:
        x = (row.usd_per_million or 0.0) if priced else row.weight_bytes / 1e6
        axes.scatter([x], [row.perplexity], s=20)
        axes.annotate(row.name, (x, row.perplexity), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="US$ per million tokens (3:1)" if priced else "MB of weights", ylabel="perplexity")
    axes.set_xlim(left=0)
    axes.grid(linewidth=0.3)
    axes.set_title(caption, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
