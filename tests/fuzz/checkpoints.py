"""Coverage-guided fuzzing of what reads checkpoints: `python -m tests.fuzz.checkpoints TARGET --seconds 120`.

Whatever bytes a file holds, opening it gives a model or one of our errors, within a second and in little memory.
Atheris mutates a small valid file and keeps what reaches new code. An input that breaks the rule is written to the
folder that `--keep` names, and the exit status is not 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["engine.checkpoint", "gguf"]):
    from engine.checkpoint import open_checkpoint
    from engine.checkpoint.names import expected_shapes
    from engine.errors import FenError

import numpy as np

from tests.engine.checkpoint.files import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, tiny_metadata, write_gguf

MEMORY_MB = 2048  # of the whole process; the files have some kilobytes
INPUT_SECONDS = 1
FILES = {
    "gguf": "model.gguf",
    "safetensors": "model.safetensors",
    "index": "model.safetensors.index.json",
    "config": "config.json",
    "tokenizer": "tokenizer.json",
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    "eos_token_id": 258,
}


def write_folder(folder: Path) -> None:
    """A valid safetensors checkpoint with an index and a tokenizer."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from engine.checkpoint.config import hf_config

    shapes = expected_shapes(hf_config(CONFIG, {}, "config.json"))
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, folder / FILES["safetensors"])
    weight_map = dict.fromkeys(shapes, FILES["safetensors"])
    (folder / FILES["index"]).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / FILES["config"]).write_text(json.dumps(CONFIG))
    tokens = tiny_metadata()["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[-3:])
    tokenizer.save(str(folder / FILES["tokenizer"]))


def read_all(path: Path) -> None:
    """Everything that opening, tokenizing and loading would read."""
    checkpoint = open_checkpoint(str(path))
    checkpoint.tokenizer.encode("hello")
    for tensor in checkpoint.tensors.values():
        if tensor.data.size != tensor.nbytes:
            raise RuntimeError(f"{tensor.name} promises {tensor.nbytes} bytes and has {tensor.data.size}")


def target(name: str, folder: Path) -> Callable[[bytes], None]:
    path = folder / FILES[name]

    def one_input(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read_all(path if name == "gguf" else folder)
        except FenError as error:
            if len(str(error)) > 2000:
                raise RuntimeError("a refusal of more than 2,000 characters") from None

    return one_input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=FILES)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--keep", type=Path, default=Path(".fuzz"), help="folder for inputs that break the rule")
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix="fen-fuzz-")  # libFuzzer ends the process itself: nothing runs after it
    folder, corpus = Path(temporary, "model"), Path(temporary, "corpus")
    folder.mkdir()
    corpus.mkdir()
    if args.target == "gguf":
        write_gguf(folder / FILES["gguf"])
    else:
        write_folder(folder)
    read_all(folder / FILES["gguf"] if args.target == "gguf" else folder)
    (corpus / "valid").write_bytes((folder / FILES[args.target]).read_bytes())
    flags = [
        f"-max_total_time={args.seconds}", f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={args.keep}/{args.target}-", "-max_len=200000", "-print_final_stats=1", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags], target(args.target, folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
