"""The tokenizer of a GGUF file, from `tokenizer.ggml.*`: the ids that llama.cpp gives, with its regular expressions."""

from __future__ import annotations

from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from engine.checkpoint.gguf import GgufFile
from engine.checkpoint.tokenizer import Tokenizer
from engine.errors import CheckpointError
from engine.model.config import ModelConfig

# llama.cpp's pre-tokenizers (src/llama-vocab.cpp): each expression splits the pieces that the one before left.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
_CASELESS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
_TEKKEN += r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
_TEKKEN += r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
_LLAMA3, _QWEN2 = _CASELESS % r"\p{N}{1,3}", _CASELESS % r"\p{N}"
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("gpt-2", "phi-2"), (_GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_LLAMA3,)),
    "tekken": (_TEKKEN,),
    "deepseek-coder": _DEEPSEEK_CODER,
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
}
# Those where a word that is in the vocabulary is taken as it is, not merged up from its bytes; they add BOS by default.
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type


def tokenizer_from_gguf(file: GgufFile, config: ModelConfig) -> Tokenizer:
    """Raises CheckpointError naming the key for a tokenizer that this engine cannot reproduce."""
    keys = _Keys(file)
    model = keys.get("model", str)
    # [EMPTY_7] is llama.cpp's name for an empty token.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(keys.get("tokens", list))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise keys.fail("tokens", "has the same token twice")
    if model == "gpt2":
        backend = _byte_level(keys, vocabulary)
        add_bos = keys.get("pre", str) in _WHOLE_WORDS_FIRST
    elif model == "llama":
        backend, add_bos = _sentencepiece(keys, vocabulary), True
    else:
        raise keys.fail("model", f"is {model!r}; supported: gpt2 (byte-level BPE), llama (SentencePiece)")

    kinds = keys.vector("token_type", len(tokens)) if "tokenizer.ggml.token_type" in file.metadata else []
    added = [
        AddedToken(tokens[i], special=kind != _USER_DEFINED, normalized=False)
        for i, kind in enumerate(kinds)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)

    def token_id(name: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    template = file.metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        num_embeddings=config.vocab_size,
        bos_id=token_id("bos"),
        eos_ids=config.eos_token_ids,
        add_bos=keys.get("add_bos_token", bool, add_bos),
        add_eos=keys.get("add_eos_token", bool, False),
        special_tokens={name: tokens[i] for name, key in names.items() if (i := token_id(key)) is not None},
        chat_template=template if isinstance(template, str) else None,
    )


class _Keys:
    """Typed reading of `tokenizer.ggml.*`."""

    def __init__(self, file: GgufFile):
        self.file = file

    def fail(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path.name}: tokenizer.ggml.{name} {problem}")

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.file.metadata.get(f"tokenizer.ggml.{name}", default)
        if value is None or not isinstance(value, kind):
            raise self.fail(name, f"must be there, as {kind.__name__}")
        return value

    def vector(self, name: str, length: int) -> list[Any]:
        values: list[Any] = self.get(name, np.ndarray).tolist()
        if len(values) != length:
            raise self.fail(name, f"has {len(values)} entries for {length} tokens")
        return values


def _byte_level(keys: _Keys, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """GPT-2's kind: text is split by expressions, then bytes are merged up in the order of the file's merges."""
    pre = keys.get("pre", str)
    if pre not in PRE_TOKENIZERS:
        raise keys.fail("pre", f"is {pre!r}; supported: {', '.join(sorted(PRE_TOKENIZERS))}")
    merges = []
    for merge in keys.get("merges", list):
        space = merge.find(" ", 1)
        first, second = merge[:space], merge[space + 1 :]
        if space < 0 or first not in vocabulary or second not in vocabulary or first + second not in vocabulary:
            raise keys.fail("merges", f"has {merge[:40]!r}, which joins no two tokens to one")
        merges.append((first, second))
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    backend = tokenizers.Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(keys: _Keys, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """Llama 2's kind: characters are merged up, the piece of the best score first; unknown ones become byte tokens."""
    scores = keys.vector("scores", len(vocabulary))
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, i in vocabulary.items():
        if len(piece) > 128:
            raise keys.fail("tokens", f"has a token of {len(piece)} characters; 128 are allowed")
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-scores[i], left, right, piece[:cut], piece[cut:]))
    merges.sort()
    unknown_id = keys.get("unknown_token_id", int, 0)
    unknown = next((token for token, i in vocabulary.items() if i == unknown_id), None)
    pairs = [(left, right) for _, _, _, left, right in merges]
    model = models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    prefix = [normalizers.Prepend("\u2581")] if keys.get("add_space_prefix", bool, True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(parts)
    return backend
