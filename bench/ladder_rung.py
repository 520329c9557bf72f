"""One part of the ladder, in a process of its own: the machine's ceilings, the baseline's checks, or a rung.

What to do comes as one JSON object on stdin; what was found leaves as JSON lines on stdout: {"progress": [done, of]},
{"request": ...} after each request of a rung that takes them one at a time (so that a run cut short keeps them),
{"result": ...}, or {"error": sentence}.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.ceilings import Ceilings, measure_ceilings, read_bandwidth
from bench.ladder_workload import Rung, Task, Workload, floor_seconds, tasks
from bench.latency import bytes_read
from bench.machine import Disturbance
from bench.plain import DTYPES, PlainModel, matrix
from bench.prompts import make_prompt, prose_tokens
from engine.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from engine.checkpoint.dummy import SCHEMES
from engine.checkpoint.tensors import FLOATS
from engine.core.build import build_core
from engine.errors import FenError
from engine.ledger import CLASSES
from engine.messages import EngineOptions, Request, SamplingParams

Emit = Callable[[dict[str, Any]], None]
DISTURBED, TRIES = 0.1, 3  # share of the CPUs that others may use during a request; how often it is tried
BASELINE_REQUESTS = 3  # on which plain PyTorch and transformers take turns


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and on what: device "cpu" or "cuda", threads of the CPU (None: the engine's choice)."""

    model: str
    load_format: str
    device: str
    threads: int | None

    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.model, self.load_format)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def dense(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights, dequantised once to bfloat16."""

    def stored(tensor: StoredTensor) -> StoredTensor:
        if tensor.dtype in FLOATS:
            return tensor
        source = functools.partial(_dense_bytes, tensor)
        return StoredTensor(tensor.name, "BF16", tensor.shape, source)

    tensors = {name: stored(tensor) for name, tensor in checkpoint.tensors.items()}
    return dataclasses.replace(checkpoint, quantization="bfloat16", tensors=tensors)


def _dense_bytes(tensor: StoredTensor) -> Any:
    return matrix(tensor, torch.bfloat16).view(torch.uint8).numpy()


def w8a8(checkpoint: Checkpoint) -> Checkpoint:
    """The layers' weights rounded to the nearest of 255 steps for each row, to be multiplied by activations in int8."""

    def stored(tensor: StoredTensor) -> StoredTensor:
        return _int8(tensor) if tensor.name.endswith("_proj.weight") else tensor

    tensors = {name: stored(tensor) for name, tensor in checkpoint.tensors.items()}
    return dataclasses.replace(checkpoint, quantization="W8A8", tensors=tensors)


def w8a8_head(checkpoint: Checkpoint) -> Checkpoint:
    """The head, too: a matrix of its own beside the embeddings, which stay as they are."""
    table = checkpoint.tensors["model.embed_tokens.weight"]
    head = dataclasses.replace(checkpoint.tensors.get("lm_head.weight", table), name="lm_head.weight")
    tensors = {**w8a8(checkpoint).tensors, head.name: _int8(head)}
    config = dataclasses.replace(checkpoint.config, tie_embeddings=False)
    return dataclasses.replace(checkpoint, config=config, quantization="W8A8, head too", tensors=tensors)


def _int8(tensor: StoredTensor) -> StoredTensor:
    weight = matrix(tensor, torch.float32)
    scale = weight.abs().amax(1, keepdim=True).clamp_(min=1e-30) / 127
    whole = (weight / scale).round_().to(torch.int8)
    parts = {
        "weight": StoredTensor(tensor.name, "I8", tensor.shape, whole.numpy()),
        "weight_scale": StoredTensor(tensor.name + "_scale", "F32", (tensor.shape[0], 1), scale.numpy()),
    }
    return StoredTensor(tensor.name, "W8A8", tensor.shape, scale.numpy(), parts)


def fp8(checkpoint: Checkpoint) -> Checkpoint:
    """The layers' weights rounded to e4m3 with a scale for each row, when they are read."""
    tensors = {
        name: _fp8(tensor) if name.endswith("_proj.weight") else tensor for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, quantization="FP8", tensors=tensors)


def _fp8(tensor: StoredTensor) -> StoredTensor:
    def scale() -> torch.Tensor:
        return matrix(tensor, torch.float32).abs().amax(1, keepdim=True).clamp_(min=1e-30) / 448

    def rounded() -> Any:
        return (matrix(tensor, torch.float32) / scale()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    parts = {
        "weight": StoredTensor(tensor.name, "F8_E4M3", tensor.shape, rounded),
        "weight_scale": StoredTensor(tensor.name + "_scale", "F32", (tensor.shape[0], 1), lambda: scale().numpy()),
    }
    return StoredTensor(tensor.name, SCHEMES["-fp8"].kind, tensor.shape, np.empty(0), parts)


def four_bit(checkpoint: Checkpoint) -> Checkpoint:
    """As stored if that is 4-bit; else the layers' weights rounded to GGUF's Q4_0, when they are read."""
    if checkpoint.quantization.startswith("Q4"):
        return checkpoint
    tensors = {
        name: StoredTensor(name, "Q4_0", tensor.shape, functools.partial(_q4_0, tensor))
        if name.endswith("_proj.weight") and tensor.shape[1] % 32 == 0
        else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, quantization="Q4_0", tensors=tensors)


def _q4_0(tensor: StoredTensor) -> Any:
    """Blocks of 32: an fp16 scale that puts the largest weight on -8, then 16 bytes, the first 16 in the low bits."""
    found = []
    for rows in matrix(tensor, torch.float32).view(-1, 32).split(1 << 20):
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        scale = (largest / -8).half()
        inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
        q = (rows * inverse + 8.5).clamp_(0, 15).to(torch.uint8)
        found.append(torch.cat([scale.view(torch.uint8), q[:, :16] | q[:, 16:] << 4], 1))
    return torch.cat(found).numpy()


WEIGHTS = {
    "stored": lambda checkpoint: checkpoint,
    "dense": dense,
    "4-bit": four_bit,
    "w8a8": w8a8,
    "w8a8 and head": w8a8_head,
    "fp8": fp8,
}


def ceilings(place: Place, small: bool) -> dict[str, Any]:
    """bench.ceilings, and the rate of 8-bit products where this CPU has them."""
    limits = measure_ceilings(torch.device(place.device), small)
    if place.device == "cpu" and not small:
        weights = bytes_read(place.checkpoint())
        limits = dataclasses.replace(limits, bandwidth=max(limits.bandwidth, read_bandwidth(weights)))
    rates = limits.rates | {"16-bit": max(limits.rates[name] for name in ("bfloat16", "float16", "float32"))}
    if "int8" not in rates:  # a GPU's is among its limits
        rates["int8"] = int8_rate(place, 64 if small else 1024)
    return dataclasses.asdict(dataclasses.replace(limits, rates=rates))


def int8_rate(place: Place, size: int) -> float:
    """Operations a second of an 8-bit product."""
    a = torch.ones(size, size, dtype=torch.int8, device=place.device)
    best = math.inf
    for _ in range(9):
        started = time.perf_counter()
        torch._int_mm(a, a.t())
        place.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def baseline(place: Place, workload: Workload, emit: Emit) -> dict[str, Any]:
    """Which plain dtype is fastest, and how plain PyTorch in it stands to transformers.generate in its fastest."""
    checkpoint = place.checkpoint()
    work = tasks(workload, prose_tokens(checkpoint.tokenizer))
    taken = work[: min(BASELINE_REQUESTS + 1, len(work))]
    dtypes = DTYPES if place.device == "cpu" else ("bfloat16",)  # a GPU has no reason for others; loading takes minutes
    steps, done = 2 * len(dtypes) + 2 * len(taken), 0

    def step() -> None:
        nonlocal done
        done += 1
        emit({"progress": [done, steps]})

    trial = Task(taken[0].prompt, min(32, taken[0].new_tokens))
    plain: dict[str, float] = {}
    peer: dict[str, float] = {}
    for dtype in dtypes:
        model = PlainModel(checkpoint, getattr(torch, dtype), workload.longest, place.device)
        model.generate(trial.prompt, 4)
        plain[dtype] = sum(model.generate(trial.prompt, trial.new_tokens)[:2])
        if len(dtypes) > 1:  # room for the next
            del model
        step()
        other = _transformers(place, checkpoint, dtype)
        _generate(place, other, Task(trial.prompt, 4))
        peer[dtype] = _generate(place, other, trial)[0]
        if len(dtypes) > 1:
            del other
        step()
    best, best_peer = min(plain, key=plain.__getitem__), min(peer, key=peer.__getitem__)
    if len(dtypes) > 1:
        model = PlainModel(checkpoint, getattr(torch, best), workload.longest, place.device)
        other = _transformers(place, checkpoint, best_peer)
    model.generate(trial.prompt, 4)
    _generate(place, other, Task(trial.prompt, 4))
    ours = theirs = 0.0
    same = 0
    for task in taken:  # they take turns
        first, rest, tokens = model.generate(task.prompt, task.new_tokens)
        ours += first + rest
        step()
        seconds, text = _generate(place, other, task)
        theirs += seconds
        same += sum(a == b for a, b in zip(tokens, text, strict=True))
        step()
    import transformers

    return {
        "dtype": best,
        "plain_trial_seconds": plain,
        "transformers_trial_seconds": peer,
        "trial": {"prompt_tokens": len(trial.prompt), "new_tokens": trial.new_tokens},
        "transformers_dtype": best_peer,
        "transformers_version": transformers.__version__,
        "requests": len(taken),
        "plain_seconds": ours,
        "transformers_seconds": theirs,
        "speed_against_transformers": theirs / ours,
        "same_tokens": same / sum(task.new_tokens for task in taken),
    }


def _transformers(place: Place, checkpoint: Checkpoint, dtype: str) -> Any:
    from bench.peers.transformers_eager import load_model, random_model

    if checkpoint.format == "dummy":
        return random_model(checkpoint.config, dtype, place.device)
    return load_model(checkpoint.path, dtype).to(place.device)


@torch.inference_mode()
def _generate(place: Place, model: Any, task: Task) -> tuple[float, list[int]]:
    """transformers' own generate(): greedy, past any end-of-text token."""
    prompt = torch.tensor([task.prompt], device=place.device)
    model.generation_config.eos_token_id = None
    started = time.monotonic()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=task.new_tokens,
        min_new_tokens=task.new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    tokens = out[0, len(task.prompt) :].tolist()
    return time.monotonic() - started, tokens


class PlainRung:
    """bench.plain behind what a rung needs."""

    def __init__(self, place: Place, workload: Workload, dtype: str):
        checkpoint = place.checkpoint()
        self.checkpoint = checkpoint
        self.model = PlainModel(checkpoint, getattr(torch, dtype), workload.longest, place.device)
        self.weight_bytes = float(self.model.weight_bytes)
        config = checkpoint.config
        self.kv_bytes = 2.0 * config.num_layers * config.num_kv_heads * config.head_dim * self.model.dtype.itemsize
        self.settings = f"{dtype} weights and activations, KV cache allocated once, scaled_dot_product_attention"
        self.rate = "float32" if dtype == "float32" else "16-bit"
        self.model.generate(make_prompt(prose_tokens(checkpoint.tokenizer), 64), 4)

    def one(self, task: Task) -> dict[str, Any]:
        prompt, decode, tokens = self.model.generate(task.prompt, task.new_tokens)
        counts = {"prompt": len(task.prompt), "cached_prompt": 0, "decode": len(tokens)}
        return {"seconds": {"prompt": prompt, "decode": decode}, "tokens": counts, "texts": [_text(tokens)]}

    def logits(self, tokens: list[int], start: int) -> torch.Tensor:
        return self.model.forward(torch.tensor(tokens, device=self.model.device), start, last=False).float().cpu()


class EngineRung:
    """The engine in this process, behind what a rung needs: its scheduler, paging, sampler, loop and ledger."""

    def __init__(self, place: Place, workload: Workload, rung: Rung):
        checkpoint = place.checkpoint()
        checkpoint = WEIGHTS[rung.weights](checkpoint)
        self.checkpoint = checkpoint
        slots = 1 if rung.sequential else workload.concurrency
        options = {
            "model": place.model, "load_format": place.load_format, "device": place.device, "threads": place.threads,
            "max_num_seqs": slots, "max_model_len": workload.longest + 1,
            "kv_cache_tokens": (workload.concurrency + 4) * (workload.longest + 64),
        }  # fmt: skip
        self.core, self.info, _ = build_core(EngineOptions(**(options | rung.options)), checkpoint=checkpoint)
        info = self.info
        plan = getattr(self.core.runner, "_plan", None)
        as_stored = plan is None or slots <= plan.few_rows or rung.weights.startswith("w8a8")
        # fp8 is multiplied at the rate of int8 on a GPU that has it, and not at all on a CPU.
        eight = rung.weights.startswith("w8a8") or (rung.weights == "fp8" and place.device == "cuda")
        self.rate = "int8" if eight else "16-bit"
        self.kv_bytes = info.kv_cache_bytes / (info.num_blocks * info.block_size)
        stored = float(bytes_read(checkpoint))
        self.weight_bytes = stored if as_stored else 2.0 * info.parameters  # else a dense copy
        self.settings = (
            f"{info.quantization} weights, {info.dtype} activations, KV blocks of {info.block_size}, "
            f"max_num_seqs {slots}, prefix cache {'on' if self.core.scheduler.enable_prefix_caching else 'off'}"
            + (f", KV cache in {kv}" if (kv := rung.options.get("kv_cache_dtype")) else "")
        )
        prose = prose_tokens(checkpoint.tokenizer)
        warm = [make_prompt(prose[::-1], min(512, workload.longest - 8), i) for i in range(slots)]
        if place.device == "cpu":  # as in a server that has been running, every page of the pool was touched before
            self.core.runner.backend.clear(list(range(info.num_blocks)))  # type: ignore[attr-defined]
        scheduler = self.core.scheduler
        caching, scheduler.enable_prefix_caching = scheduler.enable_prefix_caching, False
        self._run([Task(prompt, 3) for prompt in warm], lambda done: None)
        scheduler.enable_prefix_caching = caching  # what warms up leaves nothing in the pool

    def one(self, task: Task) -> dict[str, Any]:
        return self.all([task], lambda done: None)

    def all(self, work: list[Task], on_done: Callable[[int], None]) -> dict[str, Any]:
        before = self.core.stats().ledger
        texts = self._run(work, on_done)
        after = self.core.stats().ledger
        assert before is not None and after is not None
        return {
            "seconds": {name: after.seconds[name] - before.seconds[name] for name in CLASSES},
            "tokens": {name: after.tokens[name] - before.tokens[name] for name in after.tokens},
            "texts": [_text(text) for text in texts],
        }

    def _run(self, work: list[Task], on_done: Callable[[int], None]) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in work]
        done = 0
        for i, task in enumerate(work):
            params = SamplingParams(max_tokens=task.new_tokens, temperature=0.0, ignore_eos=True)
            request = Request(id=str(i), prompt=task.prompt, params=params, arrival=time.monotonic())
            self.core.add(request)
        while self.core.has_work:
            for output in self.core.step():
                if output.error:
                    raise FenError(output.error)
                texts[int(output.id)] += output.tokens
                if output.finish_reason:
                    done += 1
                    on_done(done)
        return texts

    def logits(self, tokens: list[int], start: int) -> torch.Tensor:
        return self.core.runner.logits(tokens, start).cpu()  # type: ignore[attr-defined]


def measure(
    place: Place,
    workload: Workload,
    rung: Rung,
    dtype: str,
    limits: Ceilings,
    done: list[dict[str, Any]],
    emit: Emit,
) -> dict[str, Any]:
    """The workload on one rung. `done`: what an earlier run has measured, of a rung that takes one at a time."""
    if place.threads:
        torch.set_num_threads(place.threads)
    model = PlainRung(place, workload, dtype) if rung.runs == "plain" else EngineRung(place, workload, rung)
    prose = prose_tokens(model.checkpoint.tokenizer)
    work = tasks(workload, prose)
    if rung.sequential:
        known = {part["index"]: part for part in done}
        for i, task in enumerate(work):
            if i not in known:
                known[i] = _undisturbed(functools.partial(model.one, task)) | {"index": i}
                emit({"request": known[i]})
            emit({"progress": [i + 1, len(work)]})
        parts = [known[i] for i in range(len(work))]
    else:
        assert isinstance(model, EngineRung)
        parts = [model.all(work, lambda finished: emit({"progress": [finished, len(work)]}))]
    seconds = {name: sum(part["seconds"].get(name, 0.0) for part in parts) for name in CLASSES}
    tokens = {name: sum(part["tokens"][name] for part in parts) for name in parts[0]["tokens"]}
    rows = 1 if rung.sequential else workload.concurrency
    best, nll = quality(model.logits, make_prompt(prose, workload.quality_tokens), rows)
    floor = floor_seconds(
        work,
        model.checkpoint.config,
        limits,
        batch=rows,
        rate=model.rate,
        weight_bytes=model.weight_bytes,
        kv_bytes=model.kv_bytes,
        cached_tokens=tokens["cached_prompt"],
    )
    return {
        "settings": model.settings,
        "roofline_seconds": floor,
        "device_seconds": seconds,
        "tokens": tokens,
        "batch": rows,
        "rate": model.rate,
        "weight_bytes": model.weight_bytes,
        "kv_bytes_per_token": model.kv_bytes,
        "perplexity": math.exp(nll),
        "best_tokens": _text(best),
        "texts": [text for part in parts for text in part["texts"]],
    }


def _text(tokens: list[int]) -> str:
    """Token ids as JSON keeps them on one line."""
    return " ".join(map(str, tokens))


def _undisturbed(one: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A request's measurement. One that others disturbed, which would make this rung look slow, is repeated."""
    tries: list[dict[str, Any]] = []
    while not tries or (tries[-1]["others_cpu_share"] > DISTURBED and len(tries) < TRIES):
        others = Disturbance(os.getpid())
        tries.append(one() | {"others_cpu_share": others.share()})
    return min(tries, key=lambda part: part["others_cpu_share"])


def quality(logits: Callable[[list[int], int], torch.Tensor], text: list[int], rows: int) -> tuple[list[int], float]:
    """The most likely token at each position of the text but the last, computed `rows` positions at a time, as the rung
    computes its answers; and the mean negative log-likelihood of the text, nats."""
    parts = [logits(text[i : i + rows], i) for i in range(0, len(text) - 1, rows)]
    all_rows = torch.cat(parts)[: len(text) - 1].float()
    chosen = all_rows.log_softmax(-1).gather(1, torch.tensor(text[1:]).unsqueeze(1))
    return all_rows.argmax(-1).tolist(), -chosen.mean().item()


def main() -> None:
    import msgspec

    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not end up between the lines

    def emit(found: dict[str, Any]) -> None:
        lines.write(json.dumps(found) + "\n")
        lines.flush()

    asked = json.load(sys.stdin)
    place = Place(**asked["place"])
    torch.set_grad_enabled(False)
    if place.threads:
        torch.set_num_threads(place.threads)
    try:
        workload = msgspec.convert(asked["workload"], Workload)
        if asked["part"] == "ceilings":
            found = ceilings(place, asked["small"])
        elif asked["part"] == "baseline":
            found = baseline(place, workload, emit)
        else:
            rung = msgspec.convert(asked["rung"], Rung)
            found = measure(place, workload, rung, asked["dtype"], Ceilings(**asked["ceilings"]), asked["done"], emit)
    except FenError as error:
        emit({"error": str(error)})
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        emit({"result": found})


if __name__ == "__main__":
    main()
