"""How fast a run is: tokens a second, model FLOPs utilisation, memory, and profiles of chosen steps."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxtp.config import ModelConfig
from jaxtp.log import logger
from jaxtp.planner import hardware
from jaxtp.planner.cost import train_flops


class Meter:
    """Tokens a second, MFU and memory since the last time it was asked."""

    def __init__(self, config: ModelConfig, mesh: Mesh, *, rows: int, length: int, frozen: bool = False) -> None:
        """A step takes `rows` rows of `length` tokens. frozen: weights get no gradient of their own (LoRA)."""
        self._tokens, self._devices = rows * length, mesh.size
        self._flops = train_flops(config, length, frozen=frozen)
        self._device = mesh.local_devices[0]
        self._seconds = self._steps = 0.0

    def add(self, seconds: float) -> None:
        """A step took so long."""
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1

    def take(self) -> dict[str, float]:
        """The rates, and starts anew. MFU is of GPUs that `planner.hardware` knows."""
        if not self._steps:
            return {}
        rate = self._tokens * self._steps / self._seconds
        values = {"tokens_per_second": rate}
        peak = peak_flops(self._device)
        if peak:
            values["mfu"], values["mfu_6n"] = (rate * flops / self._devices / peak for flops in self._flops)
        stats = self._device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            values["peak_gib"] = stats["peak_bytes_in_use"] / 2**30
        self._seconds = self._steps = 0.0
        return values


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 operations a second, by its data sheet; None for a device that `planner.hardware` does not know."""
    gpu = hardware.of_device(device.device_kind)
    return None if gpu is None else gpu.tflops * 1e12


class Profile:
    """Writes a profile of the steps FIRST to LAST."""

    def __init__(self, steps: str | None, folder: Path) -> None:
        """`steps`: "FIRST:LAST", or None for none. Raises ValueError for anything else."""
        try:
            self._first, self._last = map(int, steps.split(":")) if steps else (-1, -1)
        except ValueError:
            raise ValueError(f"log.profile_steps={steps!r} must be FIRST:LAST, e.g. 10:13") from None
        self._folder, self._running = folder / "profile", False

    def before(self, step: int) -> None:
        """Starts at FIRST."""
        if step == self._first and jax.process_index() == 0:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, *, last: bool) -> None:
        """Ends after LAST, or with the run."""
        if self._running and (step == self._last or last):
            jax.profiler.stop_trace()
            self._running = False
            logger.info("profile of steps %d to %d: %s", self._first, step, self._folder)
