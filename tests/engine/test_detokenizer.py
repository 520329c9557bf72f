"""Incremental text against decoding everything at once, and stop strings against a search of the whole text."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint import Tokenizer, open_checkpoint
from engine.detokenizer import Detokenizer, OutputText, StopChecker, TextDelta
from engine.messages import Output, SamplingParams, TokenLogprob

TEXTS = ["Hello, world", "日本語のテキスト", "🙂👩‍👩‍👧‍👦🇨🇳", "naïve café — ½", "a\n\n  b\tc", "Привет", ""]


class ByteTokenizer:
    """Token i < 256 is the byte i; 256 is special."""

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else b"<end>"

    def is_special(self, id: int) -> bool:
        return id == 256


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    return open_checkpoint(str(smollm2)).tokenizer


@pytest.fixture(scope="session")
def sentence_piece() -> Tokenizer:
    """A vocabulary in SentencePiece's manner, with byte fallback."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁He", "llo", "é", "▁日", "本"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos_id=1, eos_ids=(2,))


def pieces_of(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.add([id]) for id in ids), detokenizer.finish()]


@given(data=st.data())
def test_pieces_equal_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 300), max_size=40))
    for skip in (True, False):
        assert "".join(pieces_of(Detokenizer(tokenizer, skip), ids)) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert Detokenizer(tokenizer, skip).add(ids) == "".join(pieces_of(Detokenizer(tokenizer, skip), ids)[:-1])


@pytest.mark.parametrize("text", TEXTS)
def test_real_text_comes_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = pieces_of(Detokenizer(tokenizer), ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    shown = ""
    for id_count, piece in enumerate(pieces[:-1], 1):  # nothing that is certain is held back
        shown += piece
        sure = b"".join(tokenizer.token_bytes(id) for id in ids[:id_count]).decode("utf-8", "ignore")
        assert shown == sure


@given(data=st.data())
def test_sentence_piece_follows_the_prompt(sentence_piece: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(3, sentence_piece.vocab_size - 1), max_size=20))
    prompt = [sentence_piece.token_to_id("▁He"), sentence_piece.token_to_id("llo")]
    whole = sentence_piece.decode([*prompt, *ids])  # type: ignore[list-item]
    assert "Hello" + "".join(pieces_of(Detokenizer(sentence_piece), ids)) == whole


def test_a_broken_character_is_replaced_once_it_is_certain() -> None:
    detokenizer = Detokenizer(ByteTokenizer())
    assert detokenizer.add([0xE6]) == ""
    assert detokenizer.add([0x97]) == ""
    assert detokenizer.add([0x41]) == "\ufffdA"
    assert detokenizer.add([0xE6]) == ""
    assert detokenizer.finish() == "\ufffd"


def character_of_byte(data: bytes) -> list[int]:
    """For each byte, the index of its character in data.decode("utf-8", "replace")."""
    index: list[int] = []
    while data:
        try:
            good, bad, data = data, b"", data[len(data) :]
            text = good.decode()
        except UnicodeDecodeError as error:
            text, bad, data = good[: error.start].decode(), good[error.start : error.end], good[error.end :]
        count = index[-1] + 1 if index else 0
        for character in text:
            index += [count] * len(character.encode())
            count += 1
        index += [count] * len(bad)
    return index


# Without 0xED: Python's decoder waits one byte longer than it must before it gives half a surrogate up.
BYTES = st.integers(0, 0xEC) | st.integers(0xEE, 0xFF) | st.sampled_from([0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0x41])


@given(st.lists(BYTES, max_size=12))
def test_offsets_are_where_a_tokens_first_byte_is(ids: list[int]) -> None:
    text = OutputText(ByteTokenizer(), SamplingParams())
    offsets = [offset for id in ids for offset in text.add(Output(id="", tokens=[id])).offsets]
    assert offsets == character_of_byte(bytes(ids))


# Stop strings.

STOPS = st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


def cut(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The definition: reveal the text character by character until a stop string ends; the longest of them counts."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(st.lists(st.text("abé", max_size=5), max_size=10), STOPS, st.booleans())
def test_stop_strings_in_any_pieces(pieces: list[str], stops: tuple[str, ...], include: bool) -> None:
    checker = StopChecker(stops, include)
    shown, given_so_far = "", ""
    expected, stop = cut("".join(pieces), stops, include)
    for piece in pieces:
        given_so_far += piece
        text, found = checker.add(piece)
        shown += text
        if found is not None:
            assert (shown, found) == (expected, stop)
            return
        held = given_so_far.removeprefix(shown)
        assert shown + held == given_so_far
        longest = max(
            (n for s in stops for n in range(len(s)) if n <= len(given_so_far) and given_so_far.endswith(s[:n])),
            default=0,
        )
        assert len(held) == longest  # all that may be a beginning is held back, and no more
    assert stop is None
    assert shown + checker.finish() == expected
    assert checker.finish() == ""


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopChecker(()).add("text") == ("text", None)


# Outputs of a request.


def feed(text: OutputText, outputs: list[Output]) -> tuple[str, list[TextDelta]]:
    deltas = []
    for output in outputs:
        deltas.append(text.add(output))
        if deltas[-1].finish_reason is not None:
            break
    return "".join(delta.text for delta in deltas), deltas


@given(data=st.data())
def test_a_whole_reply(tokenizer: Tokenizer, data: st.DataObject) -> None:
    draw = data.draw
    ids = draw(st.lists(st.integers(17, 1000) | st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=30))
    whole = tokenizer.decode(ids)
    spots = draw(st.lists(st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 6)), max_size=3))
    stops = tuple(whole[at : at + length] for at, length in spots if whole[at : at + length])
    include = draw(st.booleans())
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, logprobs=0)
    outputs, rest = [], ids
    while rest:
        size = draw(st.integers(1, 3))
        chunk, rest = rest[:size], rest[size:]
        logprobs = [TokenLogprob(id, -1.0, 1, []) for id in chunk]
        outputs.append(Output(id="a", tokens=chunk, logprobs=logprobs, finish_reason=None if rest else "length"))

    text = OutputText(tokenizer, params)
    shown, deltas = feed(text, outputs)
    expected, stop = cut(whole, stops, include)
    assert shown == expected
    assert deltas[-1].finish_reason == ("stop" if stop else "length") and deltas[-1].stop_reason == stop
    assert all(delta.finish_reason is None and not delta.cancel for delta in deltas[:-1])
    assert deltas[-1].cancel == (stop is not None and len(deltas) < len(outputs))
    used = [token for delta in deltas for token in delta.tokens]
    assert used == ids[: len(used)] and text.num_tokens == len(used)
    assert [entry.token for delta in deltas for entry in delta.logprobs or []] == used
    offsets = [offset for delta in deltas for offset in delta.offsets]
    assert len(offsets) == len(used) and offsets == sorted(offsets)
    if stop is None:
        assert used == ids
    else:  # the first token that completes the stop string is the last one used
        assert cut(Detokenizer(tokenizer).add(used[:-1]), stops, False)[1] is None
        flushed = len(used) == len(ids)  # an unfinished character at the very end may complete it, too
        assert flushed or cut(Detokenizer(tokenizer).add(used), stops, False)[1] == stop


def test_text_offsets(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("日本 is 🙂!")
    text, deltas = feed(OutputText(tokenizer, SamplingParams()), [Output(id="a", tokens=[id]) for id in ids])
    offsets = [delta.offsets[0] for delta in deltas]
    for offset, id in zip(offsets, ids, strict=True):
        data = tokenizer.token_bytes(id)
        assert data.decode("utf-8", "ignore") in text[offset:]
        if data.isascii():
            assert text[offset:].startswith(data.decode())
    assert offsets[0] == 0 and offsets[-1] == len(text) - 1


def test_a_stop_token_has_no_text() -> None:
    stop_token = Output(id="a", tokens=[65, 66], finish_reason="stop", stop_reason=66)
    delta = OutputText(ByteTokenizer(), SamplingParams()).add(stop_token)
    assert (delta.text, delta.tokens, delta.offsets) == ("A", [65, 66], [0, 1])
    assert (delta.finish_reason, delta.stop_reason, delta.cancel) == ("stop", 66, False)
    shown = OutputText(ByteTokenizer(), SamplingParams(include_stop_str_in_output=True)).add(stop_token)
    assert shown.text == "AB"
    end = Output(id="a", tokens=[65, 256], finish_reason="stop")
    assert OutputText(ByteTokenizer(), SamplingParams(skip_special_tokens=False)).add(end).text == "A"


def test_held_text_comes_at_the_end() -> None:
    text = OutputText(ByteTokenizer(), SamplingParams(stop=("ABC",)))
    assert text.add(Output(id="a", tokens=[65])).text == ""
    assert text.add(Output(id="a", tokens=[66])).text == ""
    assert text.add(Output(id="a", finish_reason="length")).text == "AB"


def test_min_tokens_puts_stop_strings_off() -> None:
    text = OutputText(ByteTokenizer(), SamplingParams(stop=("A",), min_tokens=2))
    shown, deltas = feed(text, [Output(id="a", tokens=[65]) for _ in range(5)])
    assert shown == "AA" and len(deltas) == 3 and deltas[-1].cancel
