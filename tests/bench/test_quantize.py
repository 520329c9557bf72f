"""`fen quantize`: what it writes is what was asked for, runs here and in transformers, and GPTQ loses less."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.quantize import run
from bench.quantize.rounding import TARGETS, gptq, nearest
from engine.checkpoint import open_checkpoint
from engine.core.runner import Runner
from engine.errors import FenError
from engine.messages import EngineOptions
from tests.engine.checkpoint.files import write_gguf

TOKENS = [5, 9, 300, 17, 4, 80, 33, 200, 150]
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}


def logits_of(model: Path, dtype: str = "float32") -> torch.Tensor:
    options = EngineOptions(model=str(model), dtype=dtype, device="cpu", kv_cache_tokens=256)
    return Runner(open_checkpoint(str(model)), options).logits(TOKENS)


def test_gptq_loses_less_of_the_output() -> None:
    torch.manual_seed(0)
    w = torch.randn(48, 128)
    x = torch.randn(600, 128) @ torch.randn(128, 128)
    x[:, 7] = 0  # an input that never comes
    for name, group in (("w4a16", 32), ("w8a16", 0)):
        lost = []
        for rounded in (
            nearest(w, TARGETS[name], group, torch.float32),
            gptq(w, x.T @ x, TARGETS[name], group, torch.float32),
        ):
            again = rounded.q.float() * rounded.scale.repeat_interleave(group or 128, 1)
            lost.append((x @ (again - w).T).norm().item())
        assert lost[1] < 0.7 * lost[0], (name, lost)


@pytest.mark.parametrize(
    ("to", "method", "family"),
    [
        *((to, "rtn", "Qwen2") for to in TARGETS),
        ("w4a16", "gptq", "Qwen2"), ("w8a8", "gptq", "Qwen2"),
        ("w4a16", "gptq", "Phi3"), ("fp8", "rtn", "Phi3"),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_what_is_written(
    random_checkpoint: Callable[..., Path], tmp_path: Path, to: str, method: str, family: str
) -> None:
    """Phi3's linears are fused in the file, and split where they are read."""
    source = random_checkpoint(family, **SHAPE)
    layers = []
    folder = run.quantize(
        str(source),
        to,
        tmp_path / "out",
        method,
        tokens=1024,
        on_layer=lambda done, total: layers.append((done, total)),
    )
    assert layers == [(0, 2), (1, 2), (2, 2)] and not list(tmp_path.glob("*.partial"))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.quantization == to.upper() and len(list(folder.glob("*.safetensors"))) == 3
    linears = [t for name, t in checkpoint.tensors.items() if name.endswith("_proj.weight")]
    assert len(linears) == 14
    for tensor in linears:
        n, k = tensor.shape
        assert tensor.nbytes <= n * (k * TARGETS[to].bits / 8 + 4 * (k // 64 if to == "w4a16" else 1)) + 16
    assert checkpoint.tokenizer.encode("hello") == open_checkpoint(str(source)).tokenizer.encode("hello")
    exact, found = logits_of(source), logits_of(folder)
    difference = (found - exact).norm() / exact.norm()
    # Random weights make much of a rounding: 4 bits lose 16 times what 8 do.
    assert difference < {"w4a16": 0.9, "w8a16": 6e-2, "w8a8": 0.1, "fp8": 0.25}[to], difference

    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = model(torch.tensor([TOKENS])).logits[0].float()
    difference = (found - theirs).norm() / theirs.norm()
    # It rounds activations with a scale of its own, fp8 ones among them, which a CPU leaves as they are here.
    assert difference < {"w8a8": 0.12, "fp8": 0.25}.get(to, 1e-4), difference


def test_from_a_gguf_file(tmp_path: Path) -> None:
    """The rows of q and k are in another order there, and config.json and tokenizer are made from the metadata."""
    write_gguf(tmp_path / "a.gguf")
    tokens = [5, 9, 30, 17, 4]
    text = tmp_path / "text"
    text.write_text("he said that the hen " * 40)
    for method in run.METHODS:
        folder = run.quantize(str(tmp_path / "a.gguf"), "w8a16", tmp_path / method, method, text)
        runners = [
            Runner(open_checkpoint(str(path)), EngineOptions(dtype="float32", device="cpu", kv_cache_tokens=128))
            for path in (tmp_path / "a.gguf", folder)
        ]
        exact, found = (runner.logits(tokens) for runner in runners)
        assert (found - exact).norm() / exact.norm() < 2e-2
        ours, theirs = (open_checkpoint(str(path)).tokenizer for path in (folder, tmp_path / "a.gguf"))
        assert ours.encode("he<|eos|>") == theirs.encode("he<|eos|>") and ours.eos_ids == theirs.eos_ids
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [258]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"to": "w3a16"}, "--to is w3a16; it must be w4a16, w8a16, w8a8, fp8"),
        ({"to": "fp8", "method": "gptq"}, "fp8 takes rtn"),
        ({"method": "awq"}, "--method is awq"),
        ({"calibration": Path("/nowhere/text")}, "--calibration /nowhere/text cannot be read"),
        ({"tokens": 100}, "has 100 tokens; 512 are needed"),
        ({"taken": True}, "is there already"),
    ],
)
def test_refusals(random_checkpoint: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    if changes.pop("taken", False):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").touch()
    with pytest.raises(FenError, match=named):
        run.quantize(str(random_checkpoint(**SHAPE)), changes.pop("to", "w4a16"), tmp_path / "out", **changes)
    assert not list(tmp_path.glob("*.partial"))


def test_groups(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = str(random_checkpoint(**SHAPE))
    sizes = []
    for size in (32, 64):
        folder = run.quantize(source, "w4a16", tmp_path / str(size), "rtn", group=size)
        sizes.append(open_checkpoint(str(folder)).tensors["model.layers.0.mlp.up_proj.weight"].nbytes)
    assert sizes[0] - sizes[1] == 192 * 2 * 4  # two scales more in a row of 128
    with pytest.raises(FenError, match=r"groups of 64 or 32 columns, not of 128"):
        run.quantize(source, "w4a16", tmp_path / "out", "rtn", group=128)
    with pytest.raises(FenError, match="w8a16 has one scale a row and takes no --group-size"):
        run.quantize(source, "w8a16", tmp_path / "out", group=32)


def test_a_model_without_a_group_is_refused(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FenError, match="no group of 128, 64 or 32 columns divides"):
        run.quantize(str(random_checkpoint(intermediate_size=176)), "w4a16", tmp_path / "out", "rtn")


def test_an_interrupted_run_leaves_nothing(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert list(tmp_path.iterdir()) == [tmp_path / "out.partial"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(str(random_checkpoint()), "w8a16", tmp_path / "out", on_layer=interrupt)
    assert list(tmp_path.iterdir()) == []
