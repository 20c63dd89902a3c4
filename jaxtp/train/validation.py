"""What a model makes of data that it does not learn from: every token counted once, in windows of a fixed length."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtp.train.data import Batches, Corpus, Windows, best_fit
from jaxtp.train.loss import Batch


class Spans(Windows):
    """Rows in which each token of a document, but the first, is a label that counts exactly once.

    A document is cut into windows of `length` tokens, each `stride` tokens behind the one before (default: the length); a token
    sees what its window holds before it. Where windows overlap, the first counts: so every token but those of a document's
    first window sees length - stride others at least. Short windows share rows, apart from each other.
    """

    def __init__(self, corpus: Corpus, length: int, *, stride: int | None = None) -> None:
        """Raises ValueError where no document has two tokens, and for a stride that would leave tokens out."""
        stride = length if stride is None else stride
        if not 1 <= stride <= length:
            raise ValueError(f"stride={stride} must be from 1 to the sequence length of {length}")
        self.corpus, self.length, self.pack = corpus, length, True
        self._windows = list(_windows(corpus.bounds, length, stride))
        self._rows = best_fit(np.array([end - start - 1 for start, end, _ in self._windows], int), length)
        self.count = len(self._rows)
        if not self.count:
            raise ValueError(f"{len(corpus)} tokens in {len(corpus.bounds) - 1} documents have none that follows another")

    @property
    def shared(self) -> bool:
        """Whether any row holds several windows."""
        return any(len(row) > 1 for row in self._rows)

    def sample(self, i: int, *, shift: int = 0) -> dict[str, np.ndarray]:
        """The row, as that of `Windows`; nothing is shifted."""
        row = {name: np.zeros(self.length, np.int32) for name in ("tokens", "labels", "positions", "segment_ids")}
        row["weights"] = np.zeros(self.length, np.float32)
        tokens, learn, at = self.corpus.tokens, self.corpus.learn, 0
        for segment, window in enumerate(self._rows[i], 1):
            start, end, counted = self._windows[window]
            into = slice(at, at := at + end - start - 1)
            row["tokens"][into], row["labels"][into] = tokens[start : end - 1], tokens[start + 1 : end]
            row["weights"][into] = np.arange(start + 1, end) >= counted
            if learn is not None:
                row["weights"][into] *= learn[start + 1 : end]
            row["positions"][into] = np.arange(end - start - 1)
            row["segment_ids"][into] = segment
        return row


def _windows(bounds: np.ndarray, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first token, end, first label that counts) of each window."""
    for first, last in itertools.pairwise(bounds.tolist()):
        counted = first + 1
        for start in range(first, last, stride):
            if counted >= last:
                break
            end = min(start + length + 1, last)
            yield start, end, counted
            counted = end


@dataclass(frozen=True)
class Score:
    """nats: the sum of -log p over the tokens that count. characters: what these spell, 0 where that is not known."""

    nats: float
    tokens: float
    characters: float

    @property
    def nats_per_token(self) -> float:
        """Cross-entropy."""
        return self.nats / max(self.tokens, 1.0)

    @property
    def nats_per_character(self) -> float | None:
        """The same for each character, where it is text."""
        return self.nats / self.characters if self.characters else None


def score(
    evaluate: Callable[[Batch], tuple[jax.Array, jax.Array]], batches: Batches, *, seen: Callable[[], Any] = lambda: None
) -> Score:
    """The sums over every sample. evaluate: (nats, tokens) of a batch. seen: called after each."""
    sums = []
    for batch in batches.once():
        sums.append(evaluate(batch))
        if len(sums) > 1:  # one batch ahead of what is waited for
            jax.block_until_ready(sums[-2])
        seen()
    nats, tokens = (float(sum(np.float64(s[i]) for s in sums)) for i in range(2))
    corpus = batches.windows.corpus
    # the first token of a document is in its text, but not counted
    known = corpus.characters if corpus.learn is None else 0
    return Score(nats, tokens, known * tokens / len(corpus))
