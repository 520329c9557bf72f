"""Text <-> token ids: Hugging Face's `tokenizers`, with the exact bytes of each token and the checkpoint's rules."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from engine.checkpoint.config import read_json
from engine.errors import CheckpointError, RequestError
from engine.model.config import ModelConfig

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Encoding stays in the thread that asks for it, which may have a low priority.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _secret() -> str:
    """Digits that no caller can guess: case, trimming and JSON leave them as they are."""
    return str(secrets.randbelow(10**24)).zfill(24)


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the other 68 for U+0100 upwards, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """One vocabulary with its rules. Safe to call from several threads.

    bos_id, eos_ids: the ids the checkpoint declares. special_tokens: {"bos_token": "<s>", ...} for chat templates.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        num_embeddings: int | None = None,
        bos_id: int | None = None,
        eos_ids: tuple[int, ...] = (),
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
    ):
        """add_bos, add_eos: whether `encode` adds them; None: what the backend's own post-processor does.

        num_embeddings: rows of the model's embedding table, where that is smaller than the vocabulary.
        """
        self.bos_id, self.eos_ids = bos_id, eos_ids
        self.special_tokens = special_tokens or {}
        self.chat_template = chat_template
        self._backend = backend
        self._lock = threading.Lock()
        self._strict: tuple[tokenizers.Tokenizer, dict[int, int]] | None  # see _strict_backend
        self._byte_level, self._strips_space = _decoding(backend)
        self.num_embeddings = num_embeddings
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        names = sorted((self._added[token_id] for token_id in self._special), key=len, reverse=True)
        either = "|".join(map(re.escape, names)) or "(?!)"
        self._name, self._name_start = re.compile(either), re.compile(f"(?={either})")
        self.marks = _secret(), _secret()
        self._heads = {name[:size] for name in names for size in range(1, len(name))}
        self._tails = {name[size:] for name in names for size in range(1, len(name))}
        self._longest_name = max(map(len, names), default=0)
        self._bytes: dict[int, bytes] = {}
        self.vocab_size = max(backend.get_vocab_size(), max(self._added, default=-1) + 1)
        self._prefix, self._suffix = self._affixes(add_bos, add_eos)

    def _affixes(self, add_bos: bool | None, add_eos: bool | None) -> tuple[list[int], list[int]]:
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a").ids
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        prefix, suffix = full[:start], full[start + len(bare) :]
        if add_bos is not None:
            prefix = [self.bos_id] if add_bos and self.bos_id is not None else []
        if add_eos is not None:
            suffix = [self.eos_ids[0]] if add_eos and self.eos_ids else []
        return prefix, suffix

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """add_special_tokens: put BOS/EOS around it if the checkpoint says so (a rendered chat template has its own).

        parse_special: text such as "<|im_end|>" becomes that one token; False reads it as ordinary characters.
        Raises RequestError for half a surrogate pair, which JSON can carry and UTF-8 cannot.
        """
        backend, renamed = (self._backend, {}) if parse_special else self._strict_backend()
        try:  # a batch of one: unlike `encode` it lets other threads run
            ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            raise RequestError("the text has a surrogate code point (U+D800 to U+DFFF) outside a pair") from None
        ids = [renamed.get(id, id) for id in ids] if renamed else ids
        if self.num_embeddings is not None and ids and max(ids) >= self.num_embeddings:
            raise RequestError(f"the model has no embedding for the token {self.id_to_token(max(ids))!r}")
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def mark_text(self, text: str) -> str:
        """`text` such that `encode_marked` reads nothing in it as a special token, wherever a template puts it.

        Text that holds no special token's name, nor a piece of one at an end, comes back as it is.
        """
        starts = {match.start() for match in self._name_start.finditer(text)} if self._name.search(text) else set()
        sizes = range(1, min(self._longest_name, len(text) + 1))
        starts |= {len(text) - size for size in sizes if text[-size:] in self._heads}
        starts |= {0 for size in sizes if text[:size] in self._tails}
        cuts = [0, *sorted(starts), len(text)]
        return self._text_mark.join(text[start:end] for start, end in itertools.pairwise(cuts)) if starts else text

    def encode_marked(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of rendered `text`: special tokens are those that stand outside what `mark_text` marked."""
        if self._text_mark in text:
            text = self._unmarked_name.sub(lambda match: self._token_mark + match[0], text)
            return self.encode(text.replace(self._text_mark, ""), add_special_tokens, parse_special=False)
        return self.encode(text, add_special_tokens)

    @property
    def marks(self) -> tuple[str, str]:
        """The secrets of `mark_text`: another process that opens the same checkpoint may be given them."""
        return self._text_mark, self._token_mark

    @marks.setter
    def marks(self, marks: tuple[str, str]) -> None:
        self._text_mark, self._token_mark = marks
        self._unmarked_name = re.compile(f"(?<!{self._text_mark})(?:{self._name.pattern})")
        self._strict = None

    def least_tokens(self, text: str) -> int:
        """A lower bound of the tokens of `text`, found without tokenising: 0 where the rules allow no such bound."""
        characters = len(text) - len(self._text_mark) * text.count(self._text_mark)
        return math.ceil(characters / self._longest_token) if self._longest_token else 0

    @functools.cached_property
    def _longest_token(self) -> int:
        """Characters of text that one token can stand for at most; 0: unknown."""
        rules = json.loads(self._backend.to_str())
        outer = rules["normalizer"] or {}
        steps = outer.get("normalizers", [outer]) if outer else []
        composes = any(step["type"] == "NFC" for step in steps)  # of up to four characters
        kept = all(
            step["type"] in ("NFC", "Prepend")
            or (step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1 and step["content"])
            for step in steps
        )
        if not kept or any(token["lstrip"] or token["rstrip"] for token in rules["added_tokens"]):
            return 0
        return max(map(len, self._backend.get_vocab())) * (4 if composes else 1)

    def _strict_backend(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The same rules, but a special token's name begins with a secret mark: {its id there: its id}."""
        with self._lock:
            if self._strict is None:
                rules = json.loads(self._backend.to_str())
                for token in rules["added_tokens"]:
                    token["content"] = (self._token_mark if token["special"] else "") + token["content"]
                strict = tokenizers.Tokenizer.from_str(json.dumps(rules))
                ids = ((strict.token_to_id(token["content"]), token["id"]) for token in rules["added_tokens"])
                self._strict = strict, {there: here for there, here in ids if there is not None}
            return self._strict

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; bytes that are no UTF-8 become U+FFFD. Ids outside the vocabulary are empty."""
        skipped = self._special if skip_special_tokens else frozenset()
        text = b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strips_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """Exactly the bytes this token adds to the text (perhaps a part of a character); b"" outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.id_to_token(token_id) or ""
        if self._byte_level:
            byte_of = byte_of_character()
            known = all(character in byte_of for character in token)
            return bytes(byte_of[character] for character in token) if known else token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling (in GPT-2's byte alphabet for byte-level ones); None outside the vocabulary."""
        token: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return token

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def to_json(self) -> str:
        """The whole tokenizer in `tokenizers`' JSON, for libraries that read it."""
        text: str = self._backend.to_str()
        return text


def _decoding(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Do tokens spell bytes in GPT-2's alphabet (else \u2581 and <0xNN>)? Is the first word's space dropped?"""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    parts = {part.get("type"): part for part in [decoder, *decoder.get("decoders", [])]}
    if "ByteLevel" in parts:
        return True, False
    if "Metaspace" in parts:
        return False, parts["Metaspace"].get("prepend_scheme") != "never"
    if "ByteFallback" in parts:
        return False, "Strip" in parts
    kind = decoder.get("type")
    raise CheckpointError(f"the tokenizer's decoder is {kind}; supported: ByteLevel, ByteFallback, Metaspace")


def tokenizer_from_folder(folder: Path, config: ModelConfig) -> Tokenizer:
    """From tokenizer.json; special tokens, BOS/EOS flags and chat template from tokenizer_config.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = "; tokenizer.model alone is not supported" if (folder / "tokenizer.model").is_file() else ""
        raise CheckpointError(f"{folder} has no tokenizer.json{hint}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
        raise CheckpointError(f"{path} is not a usable tokenizer: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    special: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[name] = value
    bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else config.bos_token_id
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    template_path = folder / "chat_template.jinja"
    template = template_path.read_text("utf-8") if template_path.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several named ones: [{"name": "default", "template": "..."}]
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    add_bos, add_eos = settings.get("add_bos_token"), settings.get("add_eos_token")
    return Tokenizer(
        backend,
        num_embeddings=config.vocab_size,
        bos_id=bos,
        eos_ids=config.eos_token_ids or (() if eos is None else (eos,)),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        add_eos=add_eos if isinstance(add_eos, bool) else None,
        special_tokens=special,
        chat_template=template if isinstance(template, str) else None,
    )
