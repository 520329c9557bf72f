"""The cost ladder: its workload, its first rung, its arithmetic, and the whole command on a small random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bench import ladder, ladder_rung, results
from bench.ceilings import Ceilings
from bench.ladder_workload import Rung, Task, Workload, floor_seconds, load, tasks
from bench.local_engine import LocalEngine
from bench.plain import PlainModel, matrix
from bench.prices import Price
from bench.prompts import make_prompt, prose_tokens
from engine.checkpoint import open_checkpoint
from engine.errors import FenError
from engine.ledger import CLASSES
from engine.messages import EngineOptions

README = Path(__file__).parents[2] / "README.md"
PRICE = Price(3.6, "test", "2026", "a test")  # US$0.001 a second


def small_ladder() -> Any:
    """The ladder of a CPU on a workload of seconds."""
    whole = load()
    work = msgspec.structs.replace(
        whole.workload,
        requests=4,
        concurrency=2,
        shared_prefix=128,
        tail=(4, 8),
        new_tokens=(3, 5),
        quality_tokens=12,
    )
    return msgspec.structs.replace(whole, workload=work)


def test_the_workload_is_the_same_for_the_same_seed() -> None:
    work, prose = load().workload, list(range(1000, 2123))
    first, second = tasks(work, prose), tasks(work, prose)
    assert first == second and len(first) == work.requests
    assert first != tasks(msgspec.structs.replace(work, seed=work.seed + 1), prose)
    shared = [task for task in first if task.prompt[: work.shared_prefix] == prose[: work.shared_prefix]]
    assert len(shared) == work.requests // 2 and work.shared_prefix == 512
    others = [tuple(task.prompt[:64]) for task in first if task not in shared]
    assert len(set(others)) == len(others)  # no block of theirs is in the prefix cache
    for task in first:
        assert work.tail[0] <= len(task.prompt) - work.shared_prefix <= work.tail[1]
        assert work.new_tokens[0] <= task.new_tokens <= work.new_tokens[1]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("requests = 48", "requests = 0", "below 1"),
        ("tail = [32, 96]", "tail = [97, 96]", "ends before"),
        ("seed = ", "sed = ", "sed"),
        ('runs = "plain"', 'runs = "fast"', "runs"),
        ('weights = "w8a8"', 'weights = "w2"', "weights"),
        ("concurrency = 48", "concurrency = 0", "below 1"),
        ("[workload]", "[workload", "cannot be used"),
    ],
)
def test_wrong_data_is_refused_by_name(old: str, new: str, named: str) -> None:
    text = Path(ladder.__file__).with_name("ladder.toml").read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(FenError, match=named):
        load(text.replace(old, new))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {"num_attention_heads": 6, "head_dim": None, "hidden_size": 96}),
        ("Qwen3", {}),
    ],
)
def test_plain_pytorch_is_the_engine_in_float32(
    random_checkpoint: Callable[..., Path], family: str, config: dict[str, Any]
) -> None:
    folder = random_checkpoint(family, **{key: value for key, value in config.items() if value is not None})
    same_tokens(str(folder), [5, 40, 70], 12)


def test_plain_pytorch_is_the_engine_on_smollm2(smollm2: Path) -> None:
    same_tokens(str(smollm2), [9, 120], 12)


def same_tokens(model: str, lengths: list[int], new_tokens: int) -> None:
    engine = LocalEngine(EngineOptions(model=model, dtype="float32", device="cpu", threads=1, kv_cache_tokens=1024))
    prose = prose_tokens(engine.checkpoint.tokenizer)
    plain = PlainModel(engine.checkpoint, torch.float32, 256)
    for length in lengths:
        prompt = make_prompt(prose, length, 3 * length)
        assert plain.generate(prompt, new_tokens)[2] == engine.generate([prompt], new_tokens).tokens[0]
    together = plain.forward(torch.tensor(prompt), 0, last=False)
    plain.forward(torch.tensor(prompt[:3]), 0)
    torch.testing.assert_close(plain.forward(torch.tensor(prompt[3:]), 3, last=False), together[3:], atol=1e-3, rtol=0)


def test_the_rounded_weights_are_near_the_stored_ones(random_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(random_checkpoint("Llama")))
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = ladder_rung.w8a8(checkpoint).tensors[name].parts
    shape = checkpoint.tensors[name].shape
    whole = torch.from_numpy(parts["weight"].data.copy()).view(torch.int8).view(shape)
    step = torch.from_numpy(parts["weight_scale"].data.copy()).view(torch.float32).view(-1, 1)
    weight = torch.from_numpy(checkpoint.tensors[name].data.copy()).view(torch.float32).view(shape)
    assert ((whole * step - weight).abs() <= step * 0.5001).all()
    assert (whole.abs().amax(1) == 127).all()


def test_4_bit_weights_are_within_a_step_of_the_stored_ones(random_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(random_checkpoint("Llama")))
    name = "model.layers.0.self_attn.q_proj.weight"
    rounded = ladder_rung.four_bit(checkpoint).tensors[name]
    assert rounded.dtype == "Q4_0" and rounded.data.nbytes == rounded.nbytes
    weight, near = matrix(checkpoint.tensors[name], torch.float32), matrix(rounded, torch.float32)
    step = weight.view(-1, 32).abs().amax(1, keepdim=True) / 8
    assert ((weight - near).view(-1, 32).abs() <= step * 1.001).all()
    assert ((weight - near).view(-1, 32).abs() <= step * 0.51).float().mean() > 0.95


def test_the_floor_of_a_workload() -> None:
    config = open_checkpoint("smollm2-135m", "dummy").config
    limits = Ceilings(1e9, {"16-bit": 1e12}, "")
    work = [Task([1] * 100, 11)] * 4
    layers = 2.0 * 30 * 576 * (9 * 64 * 2 + 3 * 64 * 2 + 3 * 1536)
    head, score = 2.0 * 49152 * 576, 4.0 * 30 * 9 * 64
    prompts = (400 * layers + 4 * 5000 * score + 4 * head) / 1e12
    common: dict[str, Any] = {"rate": "16-bit", "weight_bytes": 1e8, "kv_bytes": 1e3}
    one = floor_seconds(work, config, limits, batch=1, **common)
    contexts = 40 * 105.5
    assert one == pytest.approx(prompts + (40 * 1e8 + contexts * 1e3) / 1e9)
    four = floor_seconds(work, config, limits, batch=4, **common)
    assert four == pytest.approx(prompts + (10 * 1e8 + contexts * 1e3) / 1e9)
    cached = floor_seconds(work, config, limits, batch=4, cached_tokens=200, **common)
    assert four - cached == pytest.approx((200 * layers + 2 * 5000 * score) / 1e12)


def found(prompt: float, decode: float, host: float, text: str) -> dict[str, Any]:
    seconds = dict.fromkeys(CLASSES, 0.0) | {"prompt": prompt, "decode": decode, "host": host, "idle": 50.0}
    return {
        "settings": "", "roofline_seconds": 1.0, "device_seconds": seconds, "batch": 1, "perplexity": 2.0,
        "tokens": {"prompt": 600, "cached_prompt": 400, "decode": 100},
        "best_tokens": text, "texts": [text, "7 7 7 7"],
    }  # fmt: skip


def test_the_arithmetic_of_a_rung() -> None:
    rung = Rung(name="a", technique="b", runs="plain", weights="dense")
    first = ladder.entry_of(rung, found(10, 80, 10, "1 2 3 4"), None, PRICE, 2)
    assert first["busy_seconds"] == 100 and first["tokens_per_second"] == 1.0 and first["cut"] == 0
    assert first["roofline_share"] == 0.01
    million = first["seconds_per_million"]  # busy: direct times 100/90
    assert million["decode"] == pytest.approx(0.8e6 * 100 / 90)
    assert million["blended_3_to_1"] == pytest.approx((3 * 10 / 1000 + 0.8) / 4 * 1e6 * 100 / 90)
    assert first["usd_per_million"]["decode"] == pytest.approx(million["decode"] * 0.001)
    second = ladder.entry_of(rung, found(1, 8, 1, "1 2 9 4"), first, None, 2)
    assert second["cut"] == pytest.approx(0.9) and second["usd_per_million"] is None
    assert second["top1_agreement"] == 0.75
    assert second["greedy_agreement"] == (2 + 4) / 8
    assert "texts" not in second and "texts" in first


def test_the_whole_command_on_a_small_model(
    random_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model, small = tmp_path / "ladder.json", str(random_checkpoint("Llama")), small_ladder()
    real = ladder._part
    taken: list[dict[str, Any]] = []

    def interrupted(asked: dict[str, Any], show: Any, on_request: Any = None) -> Any:
        """Ctrl-C after the second request of the first rung."""

        def one(request: dict[str, Any]) -> None:
            on_request(request)
            taken.append(request)
            if len(taken) == 2:
                raise KeyboardInterrupt

        return real(asked, show, one if on_request else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "_part", interrupted)
        data = ladder.run(model, threads=1, price=PRICE, path=path, ladder=small, small=True)
    assert not data["complete"] and data["rungs"] == []
    kept = results.load(path, "ladder")
    assert kept.data["unfinished"]["name"] == "plain PyTorch" and kept.data["unfinished"]["requests"] == taken
    assert "--resume goes on" in capsys.readouterr().err

    data = ladder.run(model, threads=1, price=PRICE, path=path, resume=True, ladder=small, small=True)
    assert data["complete"] and "unfinished" not in data
    assert [rung["name"] for rung in data["rungs"]] == [rung.name for rung in small.cpu]
    for rung in data["rungs"]:
        assert rung["tokens"]["prompt"] + rung["tokens"]["cached_prompt"] == sum(len(t) for t in prompts(model, small))
        assert rung["busy_seconds"] > 0 and 0 <= rung["top1_agreement"] <= 1 and rung["perplexity"] > 1
    assert data["rungs"][-1]["tokens"]["cached_prompt"] == 128
    dense = data["rungs"][1]
    assert dense["top1_agreement"] > 0.8
    assert data["baseline"]["speed_against_transformers"] > 0 and 0 < data["baseline"]["same_tokens"] <= 1
    result = results.load(path, "ladder")
    text = ladder.render(result)
    assert text.strip() in capsys.readouterr().out
    for word in ("US$", "busy", "utilisation", "4 requests", "1 threads", "generate()", "says nothing about quality"):
        assert word in text, word

    with pytest.raises(FenError, match="another workload"):
        other = msgspec.structs.replace(small, workload=msgspec.structs.replace(small.workload, seed=1))
        ladder.run(model, threads=1, path=path, resume=True, ladder=other, small=True)


def prompts(model: str, small: Any) -> list[list[int]]:
    prose = prose_tokens(open_checkpoint(model).tokenizer)
    return [task.prompt for task in tasks(small.workload, prose)]


def test_what_cannot_be_measured_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FenError, match="there is no model"):
        ladder.run("no-such-model", path=tmp_path / "x.json")
    with pytest.raises(FenError, match="cannot be read"):
        ladder.run("smollm2-135m", "dummy", path=tmp_path / "x.json", resume=True, threads=1)
    if not torch.cuda.is_available():
        with pytest.raises(FenError, match="no GPU"):
            ladder.run("smollm2-135m", "dummy", device="cuda", path=tmp_path / "x.json")
    (tmp_path / "old.json").write_text(json.dumps({"rungs": []}))
    with pytest.raises(FenError, match="not a benchmark result of this version"):
        ladder.run("smollm2-135m", "dummy", path=tmp_path / "old.json", resume=True, threads=1)


def test_the_readme_shows_what_was_measured_and_nothing_else() -> None:
    path, readme = ladder.RESULTS / "ladder_cpu.json", README.read_text(encoding="utf-8")
    if not path.exists():
        assert "## The cost ladder" not in readme
        return
    result = results.load(path, "ladder")
    assert result.data["complete"] and ladder.table(result) in readme


def test_a_workload_knows_its_longest_request() -> None:
    work = load().workload
    assert isinstance(work, Workload) and work.longest == 512 + 96 + 160
