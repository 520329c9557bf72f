"""Token ids equal llama.cpp's, bytes and text survive, flags and special tokens are the checkpoint's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from engine.checkpoint import Tokenizer, open_checkpoint
from engine.checkpoint.dummy import SHAPES
from engine.checkpoint.gguf import GgufFile, read_gguf
from engine.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from engine.checkpoint.tokenizer import byte_of_character, tokenizer_from_folder
from engine.errors import CheckpointError, RequestError
from tests.engine.checkpoint.files import tiny_metadata, write_gguf
from tests.engine.checkpoint.llama_cpp_variants import SENTENCEPIECE, variant

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "llama_cpp_tokens.json").read_text())
VARIANTS = json.loads((DATA / "llama_cpp_variants.json").read_text())
CONFIG = dataclasses.replace(SHAPES["smollm2-135m"], vocab_size=1 << 20, eos_token_ids=(258,))


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return open_checkpoint(str(smollm2)).tokenizer


@pytest.mark.parametrize("kind", ["plain", "special"])
def test_same_ids_as_llama_cpp(tokenizer: Tokenizer, kind: str) -> None:
    texts = GOLDEN[kind]
    assert len(texts) >= 10
    for entry in texts:
        ids = tokenizer.encode(entry["text"], parse_special=kind == "special")
        assert ids == entry["ids"], entry["text"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == entry["text"]


@pytest.mark.parametrize("pre", VARIANTS["ids"])
def test_other_pre_tokenizers_give_the_same_ids_as_llama_cpp(smollm2: Path, pre: str) -> None:
    file = read_gguf(smollm2)
    tokenizer = tokenizer_from_gguf(dataclasses.replace(file, metadata=variant(file.metadata, pre)), CONFIG)
    for kind in ("plain", "special"):
        for entry, expected in zip(GOLDEN[kind], VARIANTS["ids"][pre][kind], strict=True):
            ids = tokenizer.encode(entry["text"], add_special_tokens=False, parse_special=kind == "special")
            assert ids == expected, entry["text"]


def test_every_pre_tokenizer_was_compared() -> None:
    assert {*PRE_TOKENIZERS, SENTENCEPIECE} == {*VARIANTS["ids"], *VARIANTS["same_as"]}
    for pre, twin in VARIANTS["same_as"].items():
        assert PRE_TOKENIZERS[pre] == PRE_TOKENIZERS[twin]


@given(st.text(max_size=60))
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    """All but the bytes that SmolLM2's vocabulary has no token for: llama.cpp leaves those out, too."""
    missing = {byte for character, byte in byte_of_character().items() if tokenizer.token_to_id(character) is None}
    assert missing == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    kept = bytes(byte for byte in text.encode() if byte not in missing)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == kept
    assert tokenizer.decode(ids, skip_special_tokens=False) == kept.decode("utf-8", "replace")


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_token_bytes_are_exact_where_text_is_not(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("𐍈")
    assert len(ids) > 1 and tokenizer.decode(ids[:1]) == "\ufffd"
    assert b"".join(map(tokenizer.token_bytes, ids)) == "𐍈".encode()
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b"" and tokenizer.id_to_token(-1) is None


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 49152)
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>"
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.is_special(2) and not tokenizer.is_special(100)
    assert tokenizer.decode([2, 28120, 2]) == tokenizer.decode([28120])
    assert tokenizer.token_to_id("<|im_end|>") == 2 and tokenizer.id_to_token(2) == "<|im_end|>"
    assert tokenizer.chat_template is not None and "<|im_start|>" in tokenizer.chat_template


def test_many_threads(tokenizer: Tokenizer) -> None:
    """Prompts are tokenised off the event loop, some with special tokens parsed and some without."""
    texts = [
        (entry["text"], entry["ids"], kind == "special") for kind in ("plain", "special") for entry in GOLDEN[kind]
    ]
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda job: tokenizer.encode(job[0], parse_special=job[2]) == job[1], texts * 5)
    assert all(results)


def _tiny(path: Path, **changes: Any) -> GgufFile:
    write_gguf(path, tiny_metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}, shapes={})
    return read_gguf(path)


def test_flags_of_a_gguf(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(_tiny(tmp_path / "a.gguf"), CONFIG)
    assert tokenizer.encode("he") == [257, 256]
    assert tokenizer.encode("he", add_special_tokens=False) == [256]
    assert tokenizer.encode("<tool><|eos|>", add_special_tokens=False, parse_special=False)[:1] == [259]
    both = tokenizer_from_gguf(_tiny(tmp_path / "b.gguf", add_eos_token=True, add_bos_token=False), CONFIG)
    assert both.encode("he") == [256, 258]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'"),
        ({"pre": "klingon"}, "tokenizer.ggml.pre is 'klingon'"),
        ({"tokens": ["a", "b", "a"]}, "same token twice"),
        ({"merges": ["hello"]}, "merges has 'hello'"),
        ({"merges": ["q z"]}, "merges has 'q z'"),
        ({"token_type": [1, 1]}, "token_type has 2 entries"),
        ({"add_bos_token": "yes"}, "add_bos_token"),
        ({"tokens": "abc"}, "tokens must be there"),
    ],
)
def test_a_gguf_tokenizer_that_cannot_be_had_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        tokenizer_from_gguf(_tiny(tmp_path / "x.gguf", **changes), CONFIG)


def test_a_folder_tokenizes_as_transformers_does(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint()
    ours = open_checkpoint(str(folder)).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("Hello, world!", "naïve 你好 😀", "", "  two  ", "<s>a</s>"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (0, (1,), 512)
    assert ours.chat_template == theirs.chat_template


def test_flags_of_a_folder(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = random_checkpoint()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(source / name)
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "from the config"}))
    tokenizer = open_checkpoint(str(tmp_path)).tokenizer
    assert tokenizer.encode("a") == [0, *tokenizer.encode("a", add_special_tokens=False), 1]
    assert tokenizer.chat_template == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert open_checkpoint(str(tmp_path)).chat_template == "from the file"


def test_sentencepiece_text(smollm2: Path, tmp_path: Path) -> None:
    """Text as the tokenizers library decodes it, from a GGUF and from the same as tokenizer.json."""
    file = read_gguf(smollm2)
    metadata = variant(file.metadata, SENTENCEPIECE)
    del metadata["tokenizer.ggml.add_bos_token"]
    tokenizer = tokenizer_from_gguf(dataclasses.replace(file, metadata=metadata), CONFIG)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    folder, library = tokenizer_from_folder(tmp_path, CONFIG), tokenizers.Tokenizer.from_str(tokenizer.to_json())
    for entry in GOLDEN["plain"]:
        ids = tokenizer.encode(entry["text"], add_special_tokens=False, parse_special=False)
        assert tokenizer.decode(ids) == library.decode(ids) == entry["text"]
        assert folder.decode(ids) == entry["text"]
        spaced = " " + entry["text"] if entry["text"] else ""
        assert b"".join(map(tokenizer.token_bytes, ids)) == spaced.encode()
    assert tokenizer.encode("a")[0] == tokenizer.bos_id == 1
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.scores"):
        tokenizer_from_gguf(_tiny(tmp_path / "x.gguf", model="llama"), CONFIG)


LLAMA_2 = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


@pytest.mark.parametrize("legacy", [True, False], ids=["normalizer", "metaspace"])
def test_both_forms_of_a_sentencepiece_tokenizer_json(tmp_path: Path, legacy: bool) -> None:
    """LLaMA 2 and Yi put the space of the first word there by a normalizer, or by a pre-tokenizer (not "legacy"); what
    has no token becomes bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"helo", "he", "ll"]
    model = models.BPE(
        vocab={word: i for i, word in enumerate([*words, "\u2581he"])},
        merges=[("h", "e"), ("l", "l"), ("\u2581", "he")],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    )  # fmt: skip
    library = tokenizers.Tokenizer(model)
    library.decoder = decoders.Sequence(LLAMA_2)
    if legacy:
        spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        library.normalizer = normalizers.Sequence(spaces)
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    config = dataclasses.replace(CONFIG, vocab_size=512)
    ours = tokenizer_from_folder(tmp_path, config)
    assert ours.encode("hello", add_special_tokens=False) == [len(words), words.index("ll"), words.index("o")]
    for text in ("hello", "hello he", "  two", "naïve 你好 😀\n", "", "a\tb", "<s>he"):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == library.decode(ids), text
    snowman = ours.encode("☃", add_special_tokens=False)
    assert [ours.token_bytes(token) for token in snowman[-3:]] == [b"\xe2", b"\x98", b"\x83"]


def test_a_token_beyond_the_embeddings(random_checkpoint: Callable[..., Path]) -> None:
    """Some repositories add a padding token to the tokenizer and no row to the model."""
    folder = random_checkpoint()
    tokenizer = tokenizer_from_folder(folder, dataclasses.replace(CONFIG, vocab_size=1))
    assert tokenizer.encode("<s>") == [0]
    with pytest.raises(RequestError, match="no embedding for the token '</s>'"):
        tokenizer.encode("<s></s>")


def test_another_kind_of_decoder_is_refused() -> None:
    with pytest.raises(CheckpointError, match="decoder is WordPiece; supported: ByteLevel"):
        backend = tokenizers.Tokenizer(models.WordPiece({"a": 0}))
        backend.decoder = decoders.WordPiece()
        Tokenizer(backend)


def test_a_folder_without_a_tokenizer(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = random_checkpoint()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(source / name)
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        _ = checkpoint.tokenizer
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a usable tokenizer"):
        _ = checkpoint.tokenizer


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a merge of tokens that are not there": lambda rules: rules["model"]["merges"].append(["zq", "qz"]),
    "a merge of one token": lambda rules: rules["model"]["merges"].append("he"),
    "a merge of three tokens": lambda rules: rules["model"]["merges"].append(["h", "e", "l"]),
    "merges that are no list": lambda rules: rules["model"].update(merges="h e"),
    "an id that is no number": lambda rules: rules["model"]["vocab"].update(h="7"),
    "a kind of model that is not known": lambda rules: rules["model"].update(type="Klingon"),
    "no model": lambda rules: rules.pop("model"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tokenizer_json_is_refused(random_checkpoint: Callable[..., Path], tmp_path: Path, case: str) -> None:
    rules = json.loads((random_checkpoint() / "tokenizer.json").read_text(encoding="utf-8"))
    BROKEN[case](rules)
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a usable tokenizer: ") as error:
        tokenizer_from_folder(tmp_path, CONFIG)
    assert len(str(error.value)) < 1000
