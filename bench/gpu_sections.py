"""The sections of `python -m bench.gpu`. Each yields its result so far; {"not_run": why} where it cannot be done."""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import gpu_operations, kernel_cases, kernels, results
from bench import step as decode_step
from bench.ceilings import Ceilings, measure_ceilings
from bench.kernel_cases import Case
from bench.machine import commit
from bench.operations import Place, outcome, reason

Result = dict[str, Any]
Run = Callable[[bool, Path], Iterator[Result]]
DUMMIES = (
    "llama-3-8b", "llama-3-8b-w4a16", "llama-3-8b-w4a16-head", "llama-3-8b-w8a8", "llama-3-8b-fp8", "yi-6b-w4a16",
    "yi-34b-w4a16", "yi-34b-fp8",
)  # fmt: skip
# These run with six launches a layer, too.
FUSED = ("smollm2-135m-instruct", "llama-3-8b-w4a16", "llama-3-8b-w4a16-head")
END_TO_END = ("smollm2-135m-instruct", *DUMMIES)
LADDERS = ("llama-3-8b", "yi-34b")
FAMILIES = {
    "w4a16": "w4", "dequant_w4": "w4", "layer": "w4", "w8a16": "w8", "w8a8": "w8", "dequant_w8": "w8",
    "quantise_rows": "w8", "decode": "attention", "prefill": "attention",
}  # fmt: skip
WANTED = {  # tokens a second; the second has a head of 16 bits
    ("llama-3-8b", 1): 170.0, ("llama-3-8b-w4a16", 1): 430.0, ("llama-3-8b-w4a16-head", 1): 500.0,
}  # fmt: skip
PROMPT, NEW = 128, 128


def machine(dry: bool, folder: Path) -> Iterator[Result]:
    """What this is. Without a GPU that PyTorch can use, the run ends with a sentence."""
    if dry:
        yield {"device": kernels.device_name(torch.device("cpu"))}
        return
    if not torch.cuda.is_available():
        yield {
            "stop": "There is no GPU here that PyTorch can use. python -m bench.gpu --dry tries everything on the CPU."
        }
        return
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        driver = reason(error)
    found = {name: importlib.metadata.version(name) for name in ("triton",)}
    yield {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "capability": torch.cuda.get_device_capability(),
        "l2_bytes": kernels.l2_bytes(),
        "memory": torch.cuda.get_device_properties(0).total_memory,
        "versions": found | {"cuda": torch.version.cuda},
    }


def ceilings(dry: bool, folder: Path) -> Iterator[Result]:
    device = _device(dry)
    limits = measure_ceilings(device, small=dry)
    text = kernels.describe(limits, kernels.device_name(device))
    yield {"bandwidth": limits.bandwidth, "rates": limits.rates, "measured": limits.measured, "text": text}


def check(family: str, part: int, parts: int) -> Run:
    """The error of every case, the timed ones too: what those need compiled is then on disk. Every `parts`-th case."""

    def run(dry: bool, folder: Path) -> Iterator[Result]:
        cases = _cases(dry, family, kernel_cases.checks() + kernel_cases.short())[part::parts]
        yield from _rows(cases, dry, folder, timed=False)

    return run


def timing(family: str) -> Run:
    def run(dry: bool, folder: Path) -> Iterator[Result]:
        yield from _rows(_cases(dry, family, kernel_cases.short()), dry, folder, timed=True)

    return run


def _cases(dry: bool, family: str, cases: list[Case]) -> list[Case]:
    if dry:
        cases = kernel_cases.dry()
    else:
        cases = kernel_cases.possible(dict.fromkeys(cases), torch.cuda.get_device_capability())
    return [case for case in cases if FAMILIES.get(case.kernel, "other") == family]


def _rows(cases: list[Case], dry: bool, folder: Path, timed: bool) -> Iterator[Result]:
    cache = kernels.l2_bytes() if timed and not dry else 0
    place = Place(_device(dry), cache, baselines=timed)
    limits = _limits(folder) if timed else Ceilings(1.0, {}, "")
    rows: list[kernels.Row] = []
    seconds, known = 0.0 if dry else 0.05, _checked(folder) if timed else {}
    for row in kernels.measured(cases, gpu_operations.prepare, place, limits, seconds, timed, known):
        rows.append(row)
        yield {"rows": rows}
    if len(rows) < len(cases):
        raise RuntimeError(f"the device failed at {rows[-1]['kernel']} {rows[-1]['case']}: {rows[-1]['failed']}")


def _checked(folder: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """(error, allowed) of (kernel, case), as the checks of this run have found it: the oracles take their time."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "parts").glob("check-*.json")]
    rows = [row for part in parts if part.get("commit") == commit() for row in part.get("rows", [])]
    # An error that is no number is null in a file; what was not right is looked at again.
    right = [row for row in rows if row.get("error") is not None and row["error"] <= row["allowed"]]
    return {(row["kernel"], row["case"]): (row["error"], row["allowed"]) for row in right}


def step(dry: bool, folder: Path) -> Iterator[Result]:
    """One decode step of Llama-3-8B in 4 bits, launch by launch."""
    shape = kernel_cases.TINY if dry else kernel_cases.LLAMA_3_8B
    weights = "Q4_1" if dry else "W4 g128"
    place = Place(_device(dry), 0)
    found: Result = {"text": ""}
    for fused in (False, True):
        launches = decode_step.gpu_launches(shape, 2 if dry else 1, 40 if dry else 1024, weights, place, fused)
        timed = decode_step.measure_step(launches, place.device, _limits(folder), 0.0 if dry else 0.05)
        name = "six launches a layer" if fused else "nine launches a layer"
        found |= {name: {"rows_by_launch": timed.rows, "us": timed.us}}
        found["text"] += f"\n{name}\n{decode_step.render(timed)}\n"
        yield found


def graph_equals_eager(dry: bool, folder: Path) -> Iterator[Result]:
    """The same prompts with and without CUDA graphs, one of them under a grammar: the same tokens, and the same bits of
    their log-probabilities."""
    rows: list[Result] = []
    models = _models(dry, folder, ("smollm2-135m",))
    for (model, load_format), fusions in itertools.product(models, ("none", "all")):
        name = model if fusions == "none" else f"{model}, fused"
        try:
            texts = []
            for eager in (True, False):
                engine = _engine(model, load_format, dry, eager, fusions=fusions)
                new = 8 if dry else 48
                free = _greedy(engine, [5, 64, 130, 1, 33], new)
                texts.append(free + _greedy(engine, [9], new, grammar="start: /[a-z ]*/"))
                del engine
                _free()
            same = [a == b for a, b in zip(*texts, strict=True)]
            rows.append({"model": name, "equal": all(same), "first": same.index(False) if False in same else None})
        except Exception as error:
            rows.append({"name": f"graph equals eager, {name}"} | outcome(error))
        yield {"rows": rows}
    if all("not_run" in row for row in rows):
        yield {"not_run": rows[0]["not_run"]}


def end_to_end(model: str) -> Run:
    def run(dry: bool, folder: Path) -> Iterator[Result]:
        """Tokens a second of the whole engine: the real SmolLM2, or dummy weights of a larger shape."""
        rows: list[Result] = []
        name, load_format = _models(dry, folder, [model] if model in DUMMIES else ())[-1]
        for fusions in ("none", "all") if model in FUSED or dry else ("none",):
            label = name if load_format == "auto" else f"{name}, dummy weights"
            label += ", fused" if fusions == "all" else ""
            try:
                engine = _engine(name, load_format, dry, eager=False, fusions=fusions)
                about = {"quantization": engine.info.quantization, "dtype": engine.info.dtype}
                for batch in (1, 4) if dry else (1, 16, 64):
                    rate = _decode_rate(engine, batch, *((8, 4) if dry else (PROMPT, NEW)))
                    wanted = None if dry else WANTED.get((model, batch))
                    row = {"name": f"{label}, {batch} at a time", "tokens_per_second": rate, "wanted": wanted}
                    rows.append(row | about)
                    yield {"rows": rows}
                del engine
                _free()
            except Exception as error:
                rows.append({"name": label} | outcome(error))
                yield {"rows": rows}
        if all("not_run" in row for row in rows):
            yield {"not_run": rows[0]["not_run"]}

    return run


def transformers(dry: bool, folder: Path) -> Iterator[Result]:
    """The peer: transformers on the same shape in bfloat16, eager, then with a static cache and torch.compile."""
    rows: list[Result] = []
    try:
        model = _transformers_model(kernel_cases.TINY if dry else kernel_cases.LLAMA_3_8B, _device(dry))
    except Exception as error:
        yield {"not_run": reason(error)}
        return
    for name, cache in (("eager", None), ("static cache and torch.compile", "static")):
        label = f"transformers {importlib.metadata.version('transformers')}, {name}, 1 at a time"
        try:
            rate = _generate_rate(model, cache, _device(dry), *((4, 6) if dry else (32, 96)))
            rows.append({"name": label, "tokens_per_second": rate})
        except Exception as error:
            rows.append({"name": label, "not_run": reason(error)})
        yield {"rows": rows}


def ladder(shape: str) -> Run:
    def run(dry: bool, folder: Path) -> Iterator[Result]:
        """The cost ladder on dummy weights. Its own file has all of it, and is gone on with."""
        import msgspec  # like the engine, it may be missing on a GPU machine: then this section alone is not run

        from bench import ladder as cost
        from bench.ladder_workload import load
        from engine.errors import FenError

        path, whole = folder / f"ladder_{shape}.json", load()
        if dry:
            small = {"requests": 4, "concurrency": 2, "shared_prefix": 64, "tail": (4, 8), "new_tokens": (3, 5)}
            work = msgspec.structs.replace(whole.workload, **small, quality_tokens=12)
            whole = msgspec.structs.replace(whole, workload=work, cpu=whole.gpu)
        model, load_format = _models(dry, folder, [shape])[-1]
        device, threads = ("cpu", 1) if dry else ("cuda", None)
        stopped: list[Result] = []
        try:
            cost.run(model, load_format, device, threads, None, path, path.exists(), whole, small=dry)
        except FenError as error:  # a model that does not fit this GPU in 16 bits, for one
            stopped.append({"name": f"ladder {shape}", "not_run": str(error)})
        rungs = results.load(path, cost.KIND).data["rungs"] if path.exists() else []
        rows = [{"name": f"ladder {shape} {i}, {rung['name']}", "cut": rung["cut"],
                 "usd_per_million": rung["usd_per_million"], "tokens_per_second": rung["tokens_per_second"]}
                for i, rung in enumerate(rungs, 1)]  # fmt: skip
        yield {"rows": rows + stopped}

    return run


def _device(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def _limits(folder: Path) -> Ceilings:
    """What the section "ceilings" has measured in this run."""
    found = json.loads((folder / "parts" / "ceilings.json").read_text(encoding="utf-8"))
    return Ceilings(found["bandwidth"], found["rates"], found["measured"])


def _models(dry: bool, folder: Path, dummies: Iterable[str]) -> list[tuple[str, str]]:
    """(model, load format): the default model and dummies; dry: one that is made up here."""
    if not dry:
        return [("smollm2-135m-instruct", "auto"), *((name, "dummy") for name in dummies)]
    tiny = folder / "tiny" / "config.json"
    tiny.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "eos_token_id": 0,
    }  # fmt: skip
    tiny.write_text(json.dumps(config), encoding="utf-8")
    return [(str(tiny), "dummy")]


def _engine(model: str, load_format: str, dry: bool, eager: bool, **other: Any) -> Any:
    """bench.local_engine.LocalEngine; raises ImportError where the engine's libraries are missing."""
    from bench.local_engine import LocalEngine
    from engine.messages import EngineOptions

    options = {"model": model, "load_format": load_format, "enforce_eager": eager, "enable_prefix_caching": False}
    if dry:
        options |= {"device": "cpu", "dtype": "float32", "threads": 1, "kv_cache_tokens": 2048}
    else:
        options |= {"device": "cuda", "kv_cache_tokens": 65536, "max_model_len": 1024}
    return LocalEngine(EngineOptions(**(options | other)))


def _prompt(length: int, seed: int, vocab: int) -> list[int]:
    return [(7919 * (i + 1) + 104729 * (seed + 1)) % (vocab - 1) + 1 for i in range(length)]


def _greedy(engine: Any, lengths: list[int], new: int, grammar: str = "") -> list[tuple[int, float]]:
    """Tokens and log-probabilities of prompts that run together, one prompt after another."""
    from engine.messages import Request, SamplingParams

    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, logprobs=0, grammar=grammar)
    found: dict[str, list[tuple[int, float]]] = {f"p{i}": [] for i in range(len(lengths))}
    for i, length in enumerate(lengths):
        prompt = _prompt(length, i, engine.info.vocab_size)
        engine.core.add(Request(id=f"p{i}", prompt=prompt, params=params, arrival=time.monotonic()))
    while engine.core.has_work:
        for output in engine.core.step():
            if output.error:
                raise RuntimeError(output.error)
            found[output.id] += [(entry.token, entry.logprob) for entry in output.logprobs or []]
    return list(itertools.chain.from_iterable(found.values()))


def _decode_rate(engine: Any, batch: int, prompt: int, new: int) -> float:
    """Tokens a second after the first of each; the median of three, after one that captures and compiles."""
    prompts = [_prompt(prompt, seed, engine.info.vocab_size) for seed in range(batch)]
    rates = [engine.generate(prompts, new).decode_rate for _ in range(4)]
    return statistics.median(rates[1:])


def _transformers_model(shape: kernel_cases.Shape, device: torch.device) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=4096, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _generate_rate(model: Any, cache: str | None, device: torch.device, few: int, many: int) -> float:
    """Tokens a second between two lengths of answer, so that the prompt does not count; each timed after a warm-up."""
    prompt = torch.tensor([_prompt(PROMPT, 0, model.config.vocab_size)], device=device)

    def seconds(new: int) -> float:
        started = time.perf_counter()
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            cache_implementation=cache,
        )  # fmt: skip
        assert out.shape[1] == prompt.shape[1] + new
        out.cpu()
        return time.perf_counter() - started

    for new in (few, many):
        seconds(new)
    return (many - few) / (
        statistics.median(seconds(many) for _ in range(3)) - statistics.median(seconds(few) for _ in range(3))
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
