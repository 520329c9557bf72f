"""A model cut to a few layers of zeros runs, and what is carried over to all layers is a straight line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench import forecast
from bench.forecast import Forecast, compare, shortened
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.messages import EngineOptions


def test_a_shortened_model_has_the_first_layers_and_the_ends(smollm2: Path) -> None:
    whole = open_checkpoint(str(smollm2))
    short = shortened(whole, 2)
    assert short.config.num_layers == 2
    assert {name for name in whole.tensors if ".layers." not in name} <= short.tensors.keys()
    layers = {int(name.split(".")[2]) for name in short.tensors if ".layers." in name}
    assert layers == {0, 1}
    assert all(short.tensors[name].dtype == whole.tensors[name].dtype for name in short.tensors)
    assert not any(tensor.data.any() for name, tensor in short.tensors.items() if ".layers." in name)


def test_times_are_carried_over_by_the_layer(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paces = []

    class Line:
        """An engine on a machine whose pace halves for some rounds: medians of differences do not see it."""

        def __init__(self, checkpoint: Checkpoint, options: EngineOptions, prompt: int, batches: list[int]):
            self.layers, self.prompt, self.batches, self.rounds = checkpoint.config.num_layers, prompt, batches, 0

        def round(self) -> Forecast:
            pace, self.rounds = (2.0 if self.rounds in (1, 2) else 1.0), self.rounds + 1
            paces.append(pace)
            decode = {batch: pace * batch * (1.0 + 0.5 * self.layers) for batch in self.batches}
            return Forecast(self.prompt, pace * (2.0 + 3.0 * self.layers), decode)

    monkeypatch.setattr(forecast, "Timed", Line)
    result = forecast.forecast(open_checkpoint(str(smollm2)), EngineOptions(), 64, [1, 4])
    assert len(paces) == 2 * forecast.ROUNDS and 2.0 in paces
    assert result == Forecast(64, 2.0 + 3.0 * 30, {1: 1.0 + 0.5 * 30, 4: 4 * (1.0 + 0.5 * 30)})


def test_forecast_and_measurement_of_a_small_model(random_checkpoint: Callable[..., Path]) -> None:
    result = compare(str(random_checkpoint(num_hidden_layers=8)), 32, [1, 2])
    rows = result.data["seconds"]
    assert [row["what"] for row in rows] == ["prefill of 32", "decode step of 1 after 32", "decode step of 2 after 32"]
    assert all(row["forecast"] > 0 and row["measured"] > 0 for row in rows)
    assert all(row["met"] == (abs(row["forecast"] / row["measured"] - 1) <= 0.25) for row in rows)
