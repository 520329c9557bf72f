"""The device's time by class. Steps, and the gaps between them, are measured apart and never made to fit."""

from __future__ import annotations

from collections.abc import Mapping

from engine.ledger.roofline import Roofline
from engine.messages import LedgerSnapshot
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import Sequence

WORK = ("prompt", "cached_prompt", "decode", "recompute")  # what a request is charged with
CLASSES = (*WORK, "padding", "rejected_draft", "aborted", "host", "idle", "startup", "in_flight")


class Ledger:
    """Of one engine, in one thread. All times are seconds of one clock. `start` .. `ready` is booked as start-up."""

    def __init__(self, start: float, ready: float | None = None, roofline: Roofline | None = None):
        self.start, self.end = start, start if ready is None else ready  # booked up to `end`
        self.roofline = roofline or Roofline()
        self.seconds = dict.fromkeys(CLASSES, 0.0)
        self.seconds["startup"] = self.end - start
        self.tokens = dict.fromkeys(WORK[:3], 0)  # of finished requests
        self._accounts: dict[str, list[float]] = {}  # of running requests, by class in the order of WORK
        self._runnable = False  # was there a request to run at `end`?
        self._flips: list[float] = []  # when that changed since

    def runnable(self, now: float, any: bool) -> None:
        """Tells whether there is a request to run, from `now` on."""
        if any != (self._runnable ^ (len(self._flips) % 2 == 1)):
            self._flips.append(now)

    def advance(self, until: float, on_device: bool = False) -> None:
        """Time passed. Unless a step was on the device it is booked: as host while there was a request, else idle."""
        while self._flips and self._flips[0] <= until:
            self._book(self._flips.pop(0), on_device)
            self._runnable = not self._runnable
        self._book(until, on_device)

    def _book(self, until: float, on_device: bool) -> None:
        if until > self.end:
            if not on_device:
                self.seconds["host" if self._runnable else "idle"] += until - self.end
            self.end = until

    def forecast(self, chunks: list[Chunk]) -> float:
        """Seconds that a step should take."""
        attention = sum(self.roofline.attention(chunk.start, chunk.length) for chunk in chunks)
        return self.roofline.linear(sum(chunk.length for chunk in chunks)) + attention

    def step(
        self, chunks: list[Chunk], started: float, stopped: float, seconds: float, padded: int = 0, prepared: float = 0
    ) -> None:
        """A step was on the device from `started` to `stopped`, and took `seconds` by the device's own timer.

        padded: rows of decode that were computed, if more than there are decodes (captured graphs). prepared: seconds
        of capturing before it; as far as the device waited for that they are start-up, not host.
        """
        host = self.seconds["host"]
        self.advance(started)
        prepared = min(prepared, self.seconds["host"] - host)
        self.seconds["host"] -= prepared
        self.seconds["startup"] += prepared
        self.advance(stopped, on_device=True)
        prefills: list[tuple[Chunk, float]] = []
        decodes: list[tuple[Chunk, float]] = []
        for chunk in chunks:
            phase = decodes if chunk.length == 1 and chunk.start >= chunk.sequence.prompt_len else prefills
            phase.append((chunk, self.roofline.attention(chunk.start, chunk.length)))
        tokens, rows = sum(chunk.length for chunk, _ in prefills), len(decodes)
        prefill = self.roofline.linear(tokens) if tokens else 0.0
        decode = self.roofline.linear(rows) if rows else 0.0
        useful = decode + sum(time for _, time in decodes)
        scale = seconds / (useful + prefill + sum(time for _, time in prefills))
        self._charge(prefills, scale, prefill / max(tokens, 1))
        if padded > rows > 0:
            kept = useful / (useful - decode + self.roofline.linear(padded))
            self.seconds["padding"] += scale * useful * (1 - kept)
            scale *= kept
        self._charge(decodes, scale, decode / max(rows, 1))

    def _charge(self, parts: list[tuple[Chunk, float]], scale: float, linear: float) -> None:
        """Each chunk with its time in attention; `linear` is what each of its tokens takes besides."""
        for chunk, time in parts:
            sequence, length, again = chunk.sequence, chunk.length, chunk.recomputed
            seconds = scale * (linear * length + time)
            if sequence.finish_reason is not None:  # it ended while this step was in flight
                self.seconds["aborted"] += seconds
                continue
            self.seconds["in_flight"] += seconds
            new = min(max(sequence.prompt_len - chunk.start - again, 0), length - again)  # of the prompt
            account = self._accounts.setdefault(sequence.id, [0.0, 0.0, 0.0, 0.0])
            account[0] += seconds * new / length
            account[2] += seconds * (length - again - new) / length
            account[3] += seconds * again / length

    def so_far(self, id: str) -> dict[str, float]:
        """Device seconds of a running request, by class."""
        return dict(zip(WORK, self._accounts.get(id, (0.0,) * len(WORK)), strict=True))

    def close(self, sequence: Sequence, reply: tuple[int, Mapping[str, float]] | None = None) -> dict[str, float]:
        """Books a request that has ended, and returns its device seconds by class.

        reply: tokens and seconds of a reply that ended at a stop string; what was computed after it is lost.
        """
        seconds = self.so_far(sequence.id)
        if self._accounts.pop(sequence.id, None) is None:
            return seconds
        lost = sum(seconds.values())
        self.seconds["in_flight"] = self.seconds["in_flight"] - lost if self._accounts else 0.0
        if reply is not None or sequence.finish_reason in ("stop", "length"):
            tokens, charged = reply or (sequence.num_generated, seconds)
            for name, value in charged.items():
                self.seconds[name] += value
            lost = lost - sum(charged.values()) if reply else 0.0
            self.tokens["prompt"] += sequence.prompt_len - sequence.cached_tokens
            self.tokens["cached_prompt"] += sequence.cached_tokens
            self.tokens["decode"] += tokens
        self.seconds["aborted"] += lost
        return seconds

    def snapshot(self) -> LedgerSnapshot:
        return LedgerSnapshot(self.start, self.end, self.seconds.copy(), self.tokens.copy())


def joined(past: LedgerSnapshot | None, now: LedgerSnapshot | None) -> LedgerSnapshot | None:
    """An engine's ledger and that of the next one; what lies between is start-up."""
    if past is None or now is None:
        return past or now
    seconds = {name: past.seconds[name] + now.seconds[name] for name in CLASSES}
    seconds["startup"] += now.start - past.end
    tokens = {name: past.tokens[name] + now.tokens[name] for name in past.tokens}
    return LedgerSnapshot(past.start, now.end, seconds, tokens)


def ended(last: LedgerSnapshot | None, at: float, kind: str) -> LedgerSnapshot | None:
    """Of an engine that ended: what was in flight is lost; the time since `last`, up to `at`, belongs to `kind`."""
    if last is None:
        return None
    seconds = {**last.seconds, "in_flight": 0.0}
    seconds["aborted"] += last.seconds["in_flight"]
    seconds[kind] += max(at - last.end, 0.0)
    return LedgerSnapshot(last.start, max(at, last.end), seconds, last.tokens)
