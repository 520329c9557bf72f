"""The prompts: conversations of one turn or more. The same options and seed give the same prompts."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.serving.options import ServeOptions
from bench.serving.vocabulary import Vocabulary
from engine.errors import FenError

if TYPE_CHECKING:  # offline, as on a GPU machine with little installed, prompts are made without an HTTP client
    from bench.serving.client import Client

LONGEST_PROMPT, LONGEST_BOTH, SHORTEST = 1024, 2048, 4  # tokens; what of a ShareGPT file is used, as vLLM has it


@dataclasses.dataclass(frozen=True)
class Turn:
    """text: what the user says. tokens: of it, as far as known. new_tokens: of the answer."""

    text: str
    tokens: int
    new_tokens: int


Conversation = list[Turn]


def load(options: ServeOptions, vocabulary: Vocabulary, seed: str) -> list[Conversation]:
    """`--num-prompts` turns (of multi_turn: the next multiple of a conversation). Raises FenError for a wrong file."""
    draw = random.Random(seed)
    makers = {
        "random": _random,
        "prefix_repetition": _prefix_repetition,
        "multi_turn": _multi_turn,
        "sharegpt": _sharegpt,
        "custom": _custom,
    }
    return makers[options.dataset_name](options, vocabulary, draw)


async def as_long_as_wanted(client: Client, model: str, conversations: list[Conversation]) -> bool:
    """Whether the server, if it can be asked, counts as many tokens in the first text as it should have."""
    from bench.serving.client import HttpError

    first = conversations[0][0]
    try:
        counted = await client.post("/tokenize", {"model": model, "prompt": first.text, "add_special_tokens": False})
        return len(counted["tokens"]) == first.tokens
    except (HttpError, KeyError, TypeError):
        return True


async def by_server(client: Client, model: str, conversations: list[Conversation]) -> list[Conversation] | None:
    """Texts cut to their number of tokens by the server's own tokenizer (POST /tokenize and /detokenize, as Fen and
    vLLM have them); None where it has none. For prompts that were made without the right one."""
    from bench.serving.client import HttpError

    async def cut(turn: Turn) -> Turn:
        ids = await client.post("/tokenize", {"model": model, "prompt": turn.text, "add_special_tokens": False})
        kept = ids["tokens"][: turn.tokens]
        text = await client.post("/detokenize", {"model": model, "tokens": kept})
        return dataclasses.replace(turn, text=text["prompt"], tokens=len(kept))

    try:
        return [[await cut(turn) for turn in conversation] for conversation in conversations]
    except (HttpError, KeyError, TypeError):
        return None


def _random(options: ServeOptions, vocabulary: Vocabulary, draw: random.Random) -> list[Conversation]:
    prefix = vocabulary.text(options.random_prefix_len, draw)
    ratio = options.random_range_ratio

    def length(mean: int) -> int:
        return draw.randint(max(1, int(mean * (1 - ratio))), max(1, round(mean * (1 + ratio))))

    def one() -> Conversation:
        tokens = length(options.input_len or options.random_input_len)
        text = prefix + vocabulary.text(tokens, draw)
        return [Turn(text, options.random_prefix_len + tokens, length(options.output_len or options.random_output_len))]

    return [one() for _ in range(options.num_prompts)]


def _prefix_repetition(options: ServeOptions, vocabulary: Vocabulary, draw: random.Random) -> list[Conversation]:
    count = min(options.prefix_repetition_num_prefixes, options.num_prompts)
    prefixes = [vocabulary.text(options.prefix_repetition_prefix_len, draw) for _ in range(count)]
    tokens = options.prefix_repetition_prefix_len + options.prefix_repetition_suffix_len
    new = options.output_len or options.prefix_repetition_output_len
    found = [
        [Turn(prefixes[i % count] + vocabulary.text(options.prefix_repetition_suffix_len, draw), tokens, new)]
        for i in range(options.num_prompts)
    ]
    if not options.disable_shuffle:
        draw.shuffle(found)
    return found


def _multi_turn(options: ServeOptions, vocabulary: Vocabulary, draw: random.Random) -> list[Conversation]:
    """Each conversation begins with the same text, and each turn of it carries all turns before."""
    prefix = vocabulary.text(options.multi_turn_prefix_len, draw)
    new = options.output_len or options.multi_turn_output_len
    tokens = options.input_len or options.multi_turn_input_len

    def conversation() -> Conversation:
        texts = [vocabulary.text(tokens, draw) for _ in range(options.multi_turn_num_turns)]
        first = Turn(prefix + texts[0], options.multi_turn_prefix_len + tokens, new)
        return [first, *(Turn(text, tokens, new) for text in texts[1:])]

    return [conversation() for _ in range(-(-options.num_prompts // options.multi_turn_num_turns))]


def _sharegpt(options: ServeOptions, vocabulary: Vocabulary, draw: random.Random) -> list[Conversation]:
    """The first question of each conversation; as many new tokens as the file's answer has."""
    entries = _read(options, lambda text: json.loads(text))
    pairs = []
    try:
        for entry in entries:
            talk = entry.get("conversations", entry.get("conversation", []))
            if len(talk) >= 2:
                pairs.append((str(talk[0]["value"]), str(talk[1]["value"])))
    except (AttributeError, KeyError, TypeError):
        raise FenError(
            f'{options.dataset_path}: entry {entries.index(entry) + 1} is not {{"conversations": [{{"value": …}}, …]}}.'
        ) from None
    if not options.disable_shuffle:
        draw.shuffle(pairs)
    fixed = options.output_len or options.sharegpt_output_len
    found: list[Conversation] = []
    for prompt, answer in pairs:
        if len(found) == options.num_prompts:
            break
        tokens, new = vocabulary.count(prompt), fixed or vocabulary.count(answer)
        long = tokens > LONGEST_PROMPT or tokens + new > LONGEST_BOTH
        if not long and tokens >= SHORTEST and (fixed or new >= SHORTEST):
            found.append([Turn(prompt, tokens, new)])
    return _filled(options, found)


def _custom(options: ServeOptions, vocabulary: Vocabulary, draw: random.Random) -> list[Conversation]:
    """Lines of JSON: {"prompt": …}, and with --custom-output-len -1 also "output_tokens"."""
    entries = _read(options, lambda text: [json.loads(line) for line in text.splitlines() if line.strip()])
    new = options.output_len or options.custom_output_len
    found: list[Conversation] = []
    for number, entry in enumerate(entries, start=1):
        length = entry.get("output_tokens") if new == -1 and isinstance(entry, dict) else new
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
            raise FenError(f'{options.dataset_path}: entry {number} has no "prompt" that is a text.')
        if not isinstance(length, int) or length < 1:
            raise FenError(f'{options.dataset_path}: entry {number} has no "output_tokens" of 1 or more.')
        found.append([Turn(entry["prompt"], vocabulary.count(entry["prompt"]), length)])
    if not options.disable_shuffle:
        draw.shuffle(found)
    return _filled(options, found[: options.num_prompts])


def _read(options: ServeOptions, parse: Any) -> list[Any]:
    path = Path(options.dataset_path or "")
    try:
        entries = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FenError(f"--dataset-path: {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise FenError(f"--dataset-path: {path} is not the JSON that {options.dataset_name} takes: {error}.") from None
    if not isinstance(entries, list) or not entries:
        raise FenError(f"--dataset-path: {path} holds no list of entries.")
    return entries


def _filled(options: ServeOptions, found: list[Conversation]) -> list[Conversation]:
    """The prompts of a short file are sent again until there are enough."""
    if not found:
        raise FenError(f"--dataset-path: {options.dataset_path} has no prompt of a usable length.")
    return [found[i % len(found)] for i in range(options.num_prompts)]
