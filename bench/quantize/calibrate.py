"""One layer at a time over a calibration text, in float32: what each linear gets as its input, and what the layer makes
of it. The engine's own decoder runs, so that every family is computed as it is served."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from engine.checkpoint import Checkpoint
from engine.model.cpu import CpuBackend
from engine.model.decoder import Decoder, Layer, Linear, Step
from engine.model.loader import CpuParts, Loader
from engine.model.rope import rotations
from kernels.cpu.attention import Span
from kernels.cpu.linear import plan
from kernels.formats import Weight, dequantize

WINDOW = 512  # tokens of a sequence
BLOCK_SIZE = 64


class Recorder(CpuParts):
    """A float32 decoder whose linears add x^T x of their inputs to `seen` while it is a dict."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint.config, plan(torch.float32, False, 0, 0), BLOCK_SIZE)
        self.seen: dict[str, torch.Tensor] | None = None

    def linear(self, name: str, weight: Weight, bias: torch.Tensor | None) -> Linear:
        dense = dequantize(weight)

        def multiply(x: torch.Tensor) -> torch.Tensor:
            if self.seen is not None:
                square = x.T @ x
                self.seen[name] = self.seen[name].add_(square) if name in self.seen else square
            return F.linear(x, dense, bias)

        return multiply


class Stream:
    """The residual stream of the calibration text between two layers: float32 [tokens, hidden]."""

    def __init__(self, checkpoint: Checkpoint, tokens: list[int]):
        config = checkpoint.config
        table = checkpoint.tensors["model.embed_tokens.weight"]
        loader = Loader(checkpoint, Recorder(checkpoint), None)
        ids = torch.tensor(tokens)
        unique, where = ids.unique(return_inverse=True)
        rows = loader.matrix(table.name).rows(lambda x: x[unique])
        self.values = dequantize(rows)[where] * config.embedding_multiplier
        self._rotations = rotations(config, WINDOW).unsqueeze(1)

    def inputs(self, checkpoint: Checkpoint, index: int) -> dict[str, torch.Tensor]:
        """Of layer `index`: the name of each linear, or of the first of those that share an input -> sum of x x^T."""
        seen: dict[str, torch.Tensor] = {}
        self._run(checkpoint, index, self.values.clone(), seen)
        return seen

    def advance(self, checkpoint: Checkpoint, index: int) -> None:
        """Through layer `index`."""
        self._run(checkpoint, index, self.values, None)

    def _run(
        self, checkpoint: Checkpoint, index: int, values: torch.Tensor, seen: dict[str, torch.Tensor] | None
    ) -> None:
        config = checkpoint.config
        unrotated = (0,) if index in config.unrotated_layers else ()
        alone = dataclasses.replace(config, num_layers=1, unrotated_layers=unrotated, embedding_multiplier=1.0)
        checkpoint = dataclasses.replace(checkpoint, config=alone)
        parts = Recorder(checkpoint)
        layer: Layer = Loader(checkpoint, parts, None).layer(f"model.layers.{index}.")
        parts.seen = seen
        backend = parts.backend
        assert isinstance(backend, CpuBackend)
        backend.allocate(WINDOW // BLOCK_SIZE)
        for part in values.split(WINDOW):
            count = len(part)
            # The decoder adds what a layer makes to what `embed` gave it, in place.
            decoder = Decoder(alone, backend, lambda _, part=part: part, [layer], torch.ones(part.shape[1]), F.relu)  # type: ignore[misc]
            decoder.forward(
                Step(
                    tokens=torch.zeros(count, dtype=torch.int64),
                    slots=torch.arange(count),
                    rotations=self._rotations[:count],
                    attention=backend.prepare([Span(0, count, count, 0, None)]),
                    logit_rows=None,
                )
            )
