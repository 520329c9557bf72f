"""Models for all tests: the default one, pulled once into the user's cache, and small random ones by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.pull import pull

collect_ignore = ["clients"]  # `make test-clients` runs them, in an environment of their own


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: the .gguf file."""
    return pull("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """random_checkpoint(family="Llama", dtype="float32", max_shard_size="1GB", **config) -> a folder.

    A small model with random weights, as transformers saves it, and a tokenizer of 512 tokens. The same arguments give
    the same folder. `config` are fields of the family's config ("Llama", "Mistral", "Qwen3", "Phi3" ...), on top of
    4 query heads, 2 key/value heads, 2 layers. Weights vary ten times more than transformers' default, so that the most
    likely token stands out and greedy texts can be compared.
    """
    made: dict[str, Path] = {}

    def make(family: str = "Llama", dtype: str = "float32", max_shard_size: str = "1GB", **config: Any) -> Path:
        key = json.dumps([family, dtype, max_shard_size, config], sort_keys=True)
        if key in made:
            return made[key]
        import torch
        import transformers

        fields: dict[str, Any] = {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
            "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
        }  # fmt: skip
        torch.manual_seed(len(key))
        settings = getattr(transformers, f"{family}Config")(**(fields | config))
        model = getattr(transformers, f"{family}ForCausalLM")(settings)
        with torch.no_grad():  # biases and norm weights are made as zeros and ones, which would hide a forgotten one
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
        folder = tmp_path_factory.mktemp(family.lower())
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
        _small_tokenizer().save_pretrained(folder)
        made[key] = folder
        return folder

    return make


def _small_tokenizer() -> Any:
    """Byte-level BPE of 512 tokens: <s>, </s>, 256 bytes, and merges learnt from a few sentences."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    return tokenizer
