"""`fen bench throughput`: all prompts given to the engine at once, without a server; what `vllm bench throughput`
prints, and the cost from the engine's own ledger."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

from bench import results
from bench.local_engine import LocalEngine
from bench.prices import WORK, Price, no_price, parse_price, per_million, price_of, usd
from bench.report import median_and_spread
from bench.serving.datasets import load
from bench.serving.options import ServeOptions
from bench.serving.vocabulary import Vocabulary
from engine.errors import FenError
from engine.messages import EngineInfo, EngineOptions, LedgerSnapshot, Request, SamplingParams

Prompts = list[tuple[list[int], int]]  # token ids, and how many new tokens
Figures = dict[str, Any]


def run(engine: EngineOptions, workload: ServeOptions, json_path: str | None) -> None:
    """Loads the model, completes the workload `num_runs` times with fresh prompts, prints, and writes JSON if asked to.

    Of `workload` the dataset, the seed, the number of runs and the price count. Raises FenError.
    """
    workload.check()
    given = None if workload.price is None else parse_price(workload.price)
    local = LocalEngine(engine)
    price = given or price_of(local.info.device)
    vocabulary = Vocabulary(local.checkpoint.name, local.checkpoint.tokenizer)
    found = []
    for i in range(workload.num_runs):
        conversations = load(workload, vocabulary, f"{workload.seed} {i}")
        encode = local.checkpoint.tokenizer.encode
        prompts = [(encode(turn.text, False), turn.new_tokens) for turns in conversations for turn in turns]
        if i == 0:
            _complete(local, [(prompt, min(new, 2)) for prompt, new in prompts[:2]], f"warm-up-{i}")
        found.append(measured(local, prompts, str(i), price))
    print(render(local.info, found, price))
    if json_path is not None:
        info, data = local.info, {"dataset_name": workload.dataset_name, "seed": workload.seed, "runs": found}
        result = results.new(
            "throughput", data, model=info.model, quantization=info.quantization, device=info.device, price=price
        )
        results.save(Path(json_path), result)
        print(f"kept in {json_path}")


def measured(local: LocalEngine, prompts: Prompts, name: str, price: Price | None) -> Figures:
    """One run under the keys of `vllm bench throughput`, and what its ledger says."""
    before = _ledger(local)
    started = time.monotonic()
    generated = _complete(local, prompts, name)
    seconds = time.monotonic() - started
    after = _ledger(local)
    given = sum(len(prompt) for prompt, _ in prompts)
    spent = {name: after.seconds[name] - before.seconds[name] for name in after.seconds}
    tokens = {name: after.tokens[name] - before.tokens[name] for name in after.tokens}
    took = LedgerSnapshot(before.end, after.end, spent, tokens)
    return {
        "elapsed_time": seconds,
        "num_requests": len(prompts),
        "total_num_tokens": given + generated,
        "total_input_tokens": given,
        "total_output_tokens": generated,
        "requests_per_second": len(prompts) / seconds,
        "tokens_per_second": (given + generated) / seconds,
        "output_tokens_per_second": generated / seconds,
        "device_seconds": spent,
        "utilisation": sum(spent[name] for name in WORK) / (after.end - before.end),
        "usd_per_million_tokens": per_million(took, price) if price else None,
    }


def _complete(local: LocalEngine, prompts: Prompts, name: str) -> int:
    """Completes them all together; how many tokens that gave."""
    for i, (prompt, new) in enumerate(prompts):
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        local.core.add(Request(id=f"{name}-{i}", prompt=prompt, params=params, arrival=time.monotonic()))
    generated = 0
    while local.core.has_work:
        for output in local.core.step():
            if output.error:
                raise FenError(output.error)
            generated += len(output.tokens)
    return generated


def _ledger(local: LocalEngine) -> LedgerSnapshot:
    snapshot = local.core.stats().ledger
    assert snapshot is not None
    return snapshot


def render(info: EngineInfo, found: list[Figures], price: Price | None) -> str:
    def spread(key: str, digits: int = 2) -> str:
        return median_and_spread([run[key] for run in found], digits)

    first = found[0]
    lines = [
        f"{info.model}, {info.quantization}, {info.dtype} activations, {info.device}",
        f"Throughput: {spread('requests_per_second')} requests/s, {spread('tokens_per_second')} total tokens/s, "
        f"{spread('output_tokens_per_second')} output tokens/s",
        f"Total num prompt tokens:  {first['total_input_tokens']}",
        f"Total num output tokens:  {first['total_output_tokens']}",
    ]
    if len(found) > 1:
        lines.append(f"Medians of {len(found)} runs (smallest to largest).")
    if price is None:
        return "\n".join([*lines, f"US$: none: {no_price(info.device)}"])
    for basis in ("busy", "wall"):
        values = [run["usd_per_million_tokens"][basis]["blended_3_to_1"] for run in found]
        middle = statistics.median(value if value is not None else math.nan for value in values)
        lines.append(f"US$ per million tokens, {basis}, 3:1 of prompt and answer: {usd(middle).removeprefix('US$')}")
    busy = statistics.median(run["utilisation"] for run in found)
    mean_in, mean_out = (first[f"total_{kind}_tokens"] / first["num_requests"] for kind in ("input", "output"))
    lines.append(
        f"at US${price.usd_per_device_hour:g} a device-hour ({price.name}); {mean_in:.0f} tokens in, "
        f"{mean_out:.0f} out, {first['num_requests']} requests at once, utilisation {busy:.1%}"
    )
    return "\n".join(lines)
