"""The tokenizer of a GGUF file, from `tokenizer.ggml.*`: the ids that llama.cpp gives, with its regular expressions."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from engine.checkpoint.gguf import GgufFile
from engine.checkpoint.tokenizer import Tokenizer
from engine.errors import CheckpointError

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


def tokenizer_from_gguf(file: GgufFile, eos_ids: tuple[int, ...]) -> Tokenizer:
    """Raises CheckpointError naming the key for a tokenizer that this engine cannot reproduce."""
    where, metadata = file.path.name, file.metadata

    def key(name: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if value is None or not isinstance(value, kind):
            raise CheckpointError(f"{where}: tokenizer.ggml.{name} must be there, as {kind.__name__}")
        return value

    model, pre = key("model", str), key("pre", str)
    if model != "gpt2":
        raise CheckpointError(f"{where}: tokenizer.ggml.model is {model!r}; supported: 'gpt2' (byte-level BPE)")
    if pre not in PRE_TOKENIZERS:
        supported = ", ".join(sorted(PRE_TOKENIZERS))
        raise CheckpointError(f"{where}: tokenizer.ggml.pre is {pre!r}; supported: {supported}")
    # [EMPTY_7] is llama.cpp's name for an empty token.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(key("tokens", list))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens has the same token twice")
    merges = []
    for merge in key("merges", list):
        space = merge.find(" ", 1)
        first, second = merge[:space], merge[space + 1 :]
        if space < 0 or first not in vocabulary or second not in vocabulary or first + second not in vocabulary:
            raise CheckpointError(
                f"{where}: tokenizer.ggml.merges has {merge[:40]!r}, which joins no two tokens to one"
            )
        merges.append((first, second))
    whole_words = pre in _WHOLE_WORDS_FIRST
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()

    kinds = metadata.get("tokenizer.ggml.token_type")
    kinds = [] if kinds is None else list(kinds)
    if kinds and len(kinds) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
    added = [
        AddedToken(tokens[i], special=kind != _USER_DEFINED, normalized=False)
        for i, kind in enumerate(kinds)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)

    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_id=token_id("bos"),
        eos_ids=eos_ids,
        add_bos=key("add_bos_token", bool, whole_words),
        add_eos=key("add_eos_token", bool, False),
        special_tokens={name: tokens[i] for name, key_ in names.items() if (i := token_id(key_)) is not None},
        chat_template=template if isinstance(template, str) else None,
    )
