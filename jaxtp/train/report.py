"""What a run tells while it goes: a progress display, JSONL, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxtp.log import console, interactive, logger


class Report:
    """Sinks for the numbers of a run; only the first process writes."""

    def __init__(
        self, folder: Path, *, steps: int, start: int, tensorboard: bool, wandb: str | None, settings: dict[str, Any]
    ) -> None:
        """`settings` are kept with the run. Raises ValueError where `wandb` is asked for but not installed."""
        self._writes, self._tensorboard, self._wandb = jax.process_index() == 0, None, None
        columns = (
            *(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("", total=steps, completed=start, note="")
        self._live = Live(self._bar, console=console, refresh_per_second=4) if interactive() else None
        if not self._writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = (folder / "log.jsonl").open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)
        if wandb:
            try:
                import wandb as client
            except ImportError as error:
                raise ValueError("log.wandb needs the package wandb: pip install wandb") from error
            self._wandb = client.init(project=wandb, config=settings, dir=str(folder), resume="allow")

    def __enter__(self) -> Report:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
        if self._writes:
            self._lines.close()
            if self._tensorboard:
                self._tensorboard.close()
            if self._wandb:
                self._wandb.finish()

    def step(self, step: int, note: str = "") -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)
        if note:
            self._bar.update(self._task, note=note)

    def numbers(self, step: int, values: dict[str, float], *, note: str) -> None:
        """Writes numbers to every sink, and a line where no bar is shown."""
        self.step(step, note)
        if self._live is None:
            logger.info("step %d: %s", step, note)
        if not self._writes:
            return
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._lines.flush()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def experts(self, step: int, counts: np.ndarray) -> None:
        """Writes the tokens that went to each expert of each layer [L, E]; for TensorBoard over their mean."""
        if not self._writes:
            return
        self._lines.write(json.dumps({"step": step, "expert_tokens": counts.astype(int).tolist()}) + "\n")
        self._lines.flush()
        if self._tensorboard:
            for layer, each in enumerate(counts):
                self._tensorboard.add_histogram(f"expert_load/{layer}", each / max(each.mean(), 1e-9), step)

    def text(self, step: int, text: str) -> None:
        """Shows a sample."""
        logger.info("step %d writes: %s", step, text)
        if self._writes:
            self._lines.write(json.dumps({"step": step, "sample": text}) + "\n")
            self._lines.flush()
            if self._tensorboard:
                self._tensorboard.add_text("sample", text, step)
