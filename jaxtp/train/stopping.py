"""When a run has learned what it can: the best validation so far, and how long none was better."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


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
