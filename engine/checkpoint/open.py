"""The one entry to checkpoints: `open_checkpoint(model)`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint import pull
from engine.checkpoint.config import gguf_config, hf_config, read_json
from engine.checkpoint.gguf import read_gguf
from engine.checkpoint.names import check_tensors, from_gguf, from_hugging_face, split_fused
from engine.checkpoint.quantized import join_parts, scheme_of
from engine.checkpoint.safetensors import read_safetensors, safetensors_files
from engine.checkpoint.tensors import StoredTensor
from engine.checkpoint.tokenizer import Tokenizer, tokenizer_from_folder
from engine.errors import CheckpointError
from engine.model.config import ModelConfig

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DENSE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model as it lies on disk: opened in milliseconds, read tensor by tensor.

    name: what it is served under by default. format: "gguf", "safetensors" or "dummy".
    quantization: the type that holds most of the weights, e.g. "Q4_1" or "bfloat16".
    tensors: exactly those the config asks for, under Hugging Face's Llama names, in loading order.
    """

    name: str
    path: Path
    format: str
    config: ModelConfig
    quantization: str
    tensors: Mapping[str, StoredTensor]
    load_tokenizer: Callable[[], Tokenizer]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return self.load_tokenizer()

    @property
    def chat_template(self) -> str | None:
        return self.tokenizer.chat_template

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, as reading them gives."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def open_checkpoint(model: str, load_format: str = "auto") -> Checkpoint:
    """model: a .gguf file, a folder with config.json and safetensors, a short name or a Hugging Face id (both pulled).

    load_format "dummy": random weights for the config of a folder, a config.json or a built-in shape ("llama-3-8b").
    Raises CheckpointError saying what is wrong and what is allowed.
    """
    if load_format not in ("auto", "dummy"):
        raise CheckpointError(f"load_format is {load_format!r}; allowed: auto, dummy")
    if load_format == "dummy":
        return _open_dummy(model)
    path = resolve(model)
    if path.is_dir():
        return _open_folder(path, _name(model, path))
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path, _name(model, path))
    if path.suffix.lower() in _PICKLES:
        raise _pickle(path)
    if path.suffix.lower() == ".safetensors" or path.name == "config.json":
        return _open_folder(path.parent, _name(model, path.parent))
    raise CheckpointError(f"{path} is neither a .gguf file nor a folder with config.json and *.safetensors")


def resolve(model: str) -> Path:
    """The file or folder that a path, short name or Hugging Face id stands for; fetches what is not here yet."""
    path = Path(model).expanduser()
    if model and path.exists():
        return path
    if model.lower() in pull.SHORT_NAMES:
        return pull.pull(model)
    # "models/tiny" with a folder "models" here is a mistyped path rather than a repository of an organisation "models".
    if pull.is_hub_id(model) and not path.parent.is_dir():
        return pull.cached(model) or pull.pull(model)
    raise CheckpointError(_not_found(model, path))


def _not_found(model: str, path: Path) -> str:
    from engine.checkpoint.dummy import SHAPES

    if model in SHAPES:
        return f"{model} is a built-in shape without weights; add --load-format dummy to run it on random ones"
    parent = next((folder for folder in path.parents if folder.is_dir()), Path("."))
    entries = list(parent.iterdir()) if os.access(parent, os.R_OK) else []
    names = [entry.name for entry in entries if entry.suffix == ".gguf" or os.path.isfile(entry / "config.json")]
    near = [str(parent / name) for name in difflib.get_close_matches(path.name, names, 3, 0.5)]
    near += difflib.get_close_matches(model.lower(), [*pull.SHORT_NAMES], 1, 0.5)
    hint = f"did you mean {' or '.join(near)}? Otherwise give" if near else "give"
    short = next(iter(pull.SHORT_NAMES))
    return f"there is no model {model!r}; {hint} a path, the short name {short} or a Hugging Face id org/name"


def _name(model: str, path: Path) -> str:
    if model.lower() in pull.SHORT_NAMES:
        return next(iter(pull.SHORT_NAMES))
    return model if pull.is_hub_id(model) and not Path(model).exists() else path.resolve().name.removesuffix(".gguf")


def _pickle(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, which could run any program on opening, so it is not opened: use safetensors or GGUF"
    )


def _open_gguf(path: Path, name: str) -> Checkpoint:
    from engine.checkpoint.gguf_tokenizer import tokenizer_from_gguf

    file = read_gguf(path)
    config = gguf_config(file)
    tensors: dict[str, StoredTensor] = {}
    for tensor in file.tensors.values():
        if not tensor.name.startswith("rope_f"):  # rope_freqs, rope_factors_*: they are in the config
            ours = from_gguf(tensor.name, fused=config.architecture == "phi3")
            for part in split_fused(dataclasses.replace(tensor, name=ours), config):
                tensors[part.name] = part
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            sizes[file.types[tensor.name]] += math.prod(tensor.shape)
    kind = sizes.most_common(1)[0][0] if sizes else "F32"
    return Checkpoint(
        name=name,
        path=path,
        format="gguf",
        config=config,
        quantization=_DENSE.get(kind, kind),
        tensors=check_tensors(tensors, config, path.name),
        load_tokenizer=lambda: tokenizer_from_gguf(file, config),
    )


def _open_folder(folder: Path, name: str) -> Checkpoint:
    files = safetensors_files(folder)
    if not files:
        ggufs, pickles = sorted(folder.glob("*.gguf")), [p for p in sorted(folder.iterdir()) if p.suffix in _PICKLES]
        if len(ggufs) == 1:
            return _open_gguf(ggufs[0], name)
        if pickles:
            raise _pickle(pickles[0])
        several = f"; it has {len(ggufs)} .gguf files: name one of them" if ggufs else ""
        raise CheckpointError(f"{folder} has no *.safetensors{several}")
    config = _folder_config(folder)
    scheme = scheme_of(_quantization(folder), str(folder / "config.json"))
    tensors: dict[str, StoredTensor] = {}
    for tensor in read_safetensors(files).values():
        if (ours := from_hugging_face(tensor.name)) is not None:
            for part in split_fused(dataclasses.replace(tensor, name=ours), config):
                tensors[part.name] = part
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)  # some files repeat the embeddings there; transformers ignores it too
    checked = check_tensors(join_parts(tensors, config, scheme, str(folder)), config, str(folder))
    kind = _DENSE[checked["model.layers.0.input_layernorm.weight"].dtype]
    return Checkpoint(
        name=name,
        path=folder,
        format="safetensors",
        config=dataclasses.replace(config, dtype=kind),
        quantization=scheme.name if scheme else kind,
        tensors=checked,
        load_tokenizer=lambda: tokenizer_from_folder(folder, config),
    )


def _folder_config(folder: Path) -> ModelConfig:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json")
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    return hf_config(read_json(folder / "config.json"), generation, str(folder / "config.json"))


def _quantization(folder: Path) -> dict[str, Any]:
    """An object whose quantization_config is the folder's: config.json, or as the first GPTQ files have it."""
    config, old = read_json(folder / "config.json"), folder / "quantize_config.json"
    if config.get("quantization_config") is None and old.is_file():
        return {"quantization_config": {"quant_method": "gptq"} | read_json(old)}
    return config


def _open_dummy(model: str) -> Checkpoint:
    from engine.checkpoint.dummy import SCHEMES, SHAPES, dummy_tensors, dummy_tokenizer

    path = Path(model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    suffix = next((suffix for suffix in SCHEMES if model.endswith(suffix)), "")
    shape = model.removesuffix(suffix)
    if shape in SHAPES:
        config, name, scheme = SHAPES[shape], model, SCHEMES.get(suffix)
    elif (folder / "config.json").is_file():
        config, name = _folder_config(folder), folder.resolve().name
        scheme = scheme_of(_quantization(folder), str(folder / "config.json"))
    else:
        raise CheckpointError(
            f"dummy weights need a folder with config.json or a shape ({', '.join(SHAPES)}; quantised with "
            f"{', '.join(SCHEMES)} behind it), not {model!r}"
        )
    config = dataclasses.replace(config, dtype="bfloat16")
    own = (folder / "tokenizer.json").is_file() and shape not in SHAPES
    return Checkpoint(
        name=name,
        path=path,
        format="dummy",
        config=config,
        quantization=scheme.name if scheme else "bfloat16",
        tensors=dummy_tensors(config, scheme),
        load_tokenizer=lambda: tokenizer_from_folder(folder, config) if own else dummy_tokenizer(config),
    )
