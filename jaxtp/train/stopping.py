"""What ends a run before its last step: validations that no longer improve, SIGTERM, losses that are not finite."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75  # the exit code after SIGTERM: saved, start me again (EX_TEMPFAIL)
NON_FINITE = 76  # the exit code of a run that diverged


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Preempted(RuntimeError):
    """SIGTERM came; the state is saved."""


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """A run ends when validations no longer improve; the best of them is kept as a checkpoint."""

    patience: int = 0
    """Validations in a row without improvement, after which the run stops; 0: it goes on to its last step."""
    min_delta: float = 0.0
    """Nats per token by which the loss must fall to count as improvement."""

    def __post_init__(self) -> None:
        if self.patience < 0 or not 0 <= self.min_delta < math.inf:
            raise ValueError(f"early_stopping: patience={self.patience} and min_delta={self.min_delta} must be at least 0")


@dataclass
class Best:
    """What validations came to: the lowest loss and its step, and how many in a row did not improve on `mark`."""

    nats: float = math.inf
    step: int = 0
    mark: float = math.inf
    waited: int = 0

    def add(self, nats: float, step: int, min_delta: float) -> bool:
        """Counts a validation; whether it is the best so far. One that is not finite never is."""
        if nats < self.mark - min_delta:
            self.mark, self.waited = nats, 0
        else:
            self.waited += 1
        if nats < self.nats:
            self.nats, self.step = nats, step
            return True
        return False

    def stops(self, wanted: EarlyStopping) -> bool:
        """Whether the run is to end."""
        return 0 < wanted.patience <= self.waited

    def told(self) -> dict[str, Any]:
        """For a checkpoint, from which `Best(**told)` goes on."""
        return asdict(self) if self.step else {}


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[int], bool]]:
    """Whether SIGTERM came: asked after every step, answered alike on all processes."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    except ValueError:  # not in the main thread: nobody can tell us
        yield lambda step: False
        return
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
