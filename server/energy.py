"""Joules that a GPU has used, by NVML's counter. Without one: None and the reason, never 0."""

from __future__ import annotations

import os
from typing import Any


class EnergyMeter:
    """Counts from its creation on."""

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            import pynvml
        except ImportError:
            self._reason = "NVML's Python package is not installed (nvidia-ml-py)"
            return
        try:
            pynvml.nvmlInit()
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            if visible.isdecimal():
                self._device = pynvml.nvmlDeviceGetHandleByIndex(int(visible))
            else:
                self._device = pynvml.nvmlDeviceGetHandleByUUID(visible)
            self._start = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self._reason = f"NVML has no energy counter here ({error})"

    def read(self, device: str) -> tuple[float | None, str | None]:
        """Joules since the start, or why there are none; `device` is what the model runs on."""
        if device.startswith("cpu"):
            return None, "the model runs on a CPU, whose energy is not counted"
        if self._nvml is None:
            return None, self._reason
        try:
            millijoules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device) - self._start
        except self._nvml.NVMLError as error:
            return None, f"NVML's energy counter cannot be read ({error})"
        return millijoules / 1e3, None
