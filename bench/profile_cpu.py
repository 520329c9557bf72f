"""Where the engine's time on a CPU goes, by operation: `python -m bench.profile_cpu`.

Self time on the thread that runs the loop, for the decode steps of one stream and for a prefill. "outside" is what no
torch operation accounts for: scheduler, runner, Python.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

from bench.local_engine import LocalEngine
from bench.prompts import make_prompt, prose_tokens
from bench.report import markdown_table
from engine.errors import FenError
from engine.messages import EngineOptions


def operations(
    engine: LocalEngine, prompts: list[list[int]], new_tokens: int
) -> tuple[float, list[tuple[str, int, float]]]:
    """-> seconds of one `generate` without the profiler, and (operation, calls, share of the profiled time), sorted."""
    engine.generate(prompts, new_tokens)
    seconds = engine.generate(prompts, new_tokens).seconds
    started = time.monotonic()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        engine.generate(prompts, new_tokens)
        profiled = time.monotonic() - started
    rows = [(event.key, event.count, event.self_cpu_time_total / 1e6 / profiled) for event in recorded.key_averages()]
    rows.append(("outside", 0, max(0.0, 1 - sum(share for _, _, share in rows))))
    return seconds, sorted(rows, key=lambda row: -row[2])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_cpu", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="path, short name or Hugging Face id")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=64, help="1 profiles the prefill alone")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--rows", type=int, default=20)
    arguments = parser.parse_args()
    pool = arguments.streams * (arguments.prompt_tokens + arguments.new_tokens + 64)
    try:
        engine = LocalEngine(
            EngineOptions(
                model=arguments.model,
                device="cpu",
                threads=arguments.threads,
                kv_cache_tokens=pool,
                # Of equal runs the second finds its prompt in the cache: then decode alone is profiled.
                enable_prefix_caching=arguments.new_tokens > 1,
            )
        )
        prose = prose_tokens(engine.checkpoint.tokenizer)
        prompts = [make_prompt(prose, arguments.prompt_tokens, 50 * i) for i in range(arguments.streams)]
        seconds, rows = operations(engine, prompts, arguments.new_tokens)
    except FenError as error:
        sys.exit(str(error))
    print(
        f"{arguments.streams} x {arguments.prompt_tokens} prompt and {arguments.new_tokens} new tokens, "
        f"{torch.get_num_threads()} threads: {seconds * 1e3:.1f} ms"
    )
    shown = [[name, str(calls), f"{share:.1%}"] for name, calls, share in rows[: arguments.rows]]
    print(markdown_table(["operation", "calls", "self time"], shown))


if __name__ == "__main__":
    main()
