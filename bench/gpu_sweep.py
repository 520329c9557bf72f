"""The sections "sweep ..." of bench.gpu: what a million tokens cost with more and more sequences together, and from how
many on they are cheaper than each price line of seeds/prices.toml. Dummy weights: the prices say nothing of quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import seeds
from bench.operations import outcome

Result = dict[str, Any]
SHAPES = ("llama-3-8b-w4a16", "llama-3-8b-fp8", "yi-34b-w4a16", "yi-34b-fp8")
AT_A_TIME = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPT, NEW = 768, 256  # tokens: three to one, as the blend of the price
BASES = ("busy", "wall")


def sweep(shape: str) -> Callable[[bool, Path], Iterator[Result]]:
    def run(dry: bool, folder: Path) -> Iterator[Result]:
        """Tokens a second and US$ per million (3:1) at each concurrency, all requests there from the start."""
        from bench.gpu_sections import _engine, _models, _prompt
        from bench.prices import Price, price_of
        from bench.throughput import measured
        from engine.core.device import batch_sizes

        model, load_format = _models(dry, folder, [shape])[-1]
        largest, prompt, new = (2, 8, 4) if dry else (AT_A_TIME[-1], PROMPT, NEW)
        engine = _engine(
            model, load_format, dry, eager=False, kv_cache_tokens=2048 if dry else None, max_num_seqs=largest
        )
        info = engine.info
        price = Price(1.0, "a dry run", "", "") if dry else price_of(info.device)
        pool = info.num_blocks * info.block_size
        about = {"quantization": info.quantization, "prompt_tokens": prompt, "new_tokens": new}
        if price is not None:
            about["usd_per_device_hour"] = price.usd_per_device_hour
        rows: list[Result] = []
        for batch in (batch for batch in AT_A_TIME if batch <= largest):
            name = f"sweep {shape}, {batch} at a time"
            if batch * (prompt + new + info.block_size) > pool:
                rows.append({"name": name, "not_run": f"the KV cache holds {pool:,} tokens"})
                break
            prompts = [(_prompt(prompt, batch + i, info.vocab_size), new) for i in range(batch)]
            try:
                # Every size that the batch has on its way up and down, twice: it is captured the second time.
                for n in (n for n in batch_sizes(largest) if batch // 2 < n <= batch):
                    measured(engine, [(text[:8], min(new, 4)) for text, _ in prompts[:n]], f"warm-{batch}-{n}", None)
                measured(engine, [(text, min(new, 8)) for text, _ in prompts], f"warm-{batch}", None)
                found = measured(engine, prompts, str(batch), price)
            except Exception as error:
                rows.append({"name": name} | outcome(error))
                break
            money = found["usd_per_million_tokens"]
            rows.append({
                "name": name, "concurrency": batch, "tokens_per_second": found["output_tokens_per_second"],
                "utilisation": found["utilisation"],
                "usd_per_million": money and {basis: money[basis]["blended_3_to_1"] for basis in BASES},
            } | about)  # fmt: skip
            yield {"rows": rows, "cheaper_from": cheaper_from(rows)}
        yield {"rows": rows, "cheaper_from": cheaper_from(rows)}

    return run


def cheaper_from(rows: list[Result]) -> list[Result]:
    """For each price line and basis the smallest measured concurrency whose blend is below it; None: not reached."""
    priced = [row for row in rows if row.get("usd_per_million")]
    found = []
    for line in seeds.load().apis.values():
        first = {
            basis: next(
                (row["concurrency"] for row in priced if row["usd_per_million"][basis] < line.usd_per_million_tokens),
                None,
            )
            for basis in BASES
        }
        found.append({"label": line.label, "usd_per_million": line.usd_per_million_tokens, "concurrency": first})
    return found if priced else []
