"""Rows of tokens, by the step: windows of a corpus, and the batches of a run.

Everything is addressed by one global sample index, so the state of the data is (seed, step): a run that goes on with
another number of devices or hosts sees the same samples, and each process makes only its own rows. Shuffling, repetition
and reading ahead are grain's.

    corpus   tokens of all documents in one array, with the documents' bounds: train/corpus.py
    windows  the samples of T tokens: a running text cut up, or whole documents packed side by side
    batches  of B samples for each step, on the mesh
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtp.log import logger
from jaxtp.model.layers import Context
from jaxtp.train.corpus import Corpus, Format, check_vocabulary, read
from jaxtp.train.loss import Batch

__all__ = ["Batches", "Corpus", "Format", "Windows", "best_fit", "check_vocabulary", "read"]


class Windows:
    """Samples of `length` tokens, found by index: what a packed row holds.

    Running text (`pack=False`): sample i is tokens [i·T, i·T + T], the last one a label only. Documents (`pack=True`): each
    is cut to T, and rows are filled best-fit; no document is spread over rows, and those in which nothing is learned have none.
    """

    def __init__(self, corpus: Corpus, length: int, *, pack: bool) -> None:
        """Raises ValueError where there are too few tokens for a single sample, and where nothing in the samples is learned."""
        self.corpus, self.length, self.pack = corpus, length, pack
        if pack:
            sizes = np.diff(corpus.bounds)
            starts, stops = corpus.bounds[:-1], np.minimum(corpus.bounds[1:], corpus.bounds[:-1] + length + 1)
            cut = int((sizes > length + 1).sum())
            if cut:
                logger.warning("%d of %d documents have more than %d tokens and are cut", cut, len(sizes), length + 1)
        else:
            starts = np.arange((len(corpus) - 1) // length) * length + 1
            stops = starts + length
        learned = corpus.learned(starts, stops)
        if pack:
            self._rows = best_fit(np.where(learned > 0, stops - starts - 1, 0), length)
        self.count = len(self._rows) if pack else len(starts)
        if len(learned) and not learned.any() and (stops - starts).max() > 1:
            within = f" in the first {length + 1} tokens of a document; give more length" if pack and cut else ""
            raise ValueError(f"{corpus.name}: with sequence_length={length}, nothing is learned{within}")
        if self.count == 0:
            raise ValueError(f"{len(corpus)} tokens give no sample of sequence_length={length}; give more text, or less length")
        if idle := int((learned == 0).sum()):
            kind, end = ("documents", " and are left out") if pack else ("rows", "")
            logger.warning("%d of %d %s hold nothing that is learned%s", idle, len(learned), kind, end)

    def __len__(self) -> int:
        return self.count

    def sample(self, i: int, *, shift: int = 0) -> dict[str, np.ndarray]:
        """The row: tokens, labels, positions, segment_ids [T] int32 and weights [T] float32. `shift` moves running text."""
        corpus, T = self.corpus, self.length
        bounds = corpus.bounds
        if self.pack:
            spans = [(bounds[d], min(bounds[d + 1], bounds[d] + T + 1)) for d in self._rows[i]]
        else:
            start = min(i * T + shift, len(corpus) - T - 1)
            end = start + T + 1
            inner = bounds[np.searchsorted(bounds, start, "right") : np.searchsorted(bounds, end, "left")]
            marks = [start, *inner.tolist(), end]
            spans = list(itertools.pairwise(marks))
        row = {name: np.zeros(T, np.int32) for name in ("tokens", "labels", "positions", "segment_ids")}
        row["weights"] = np.zeros(T, np.float32)
        at = 0
        for segment, (first, last) in enumerate(spans, 1):
            # a document's last token is a label of the one before it, and predicts nothing itself
            n = min(last - first - 1, T - at) if self.pack else min(last - first, T - at)
            into = slice(at, at + n)
            row["tokens"][into] = corpus.tokens[first : first + n]
            known = min(n, last - first - 1)  # labels that lie in the same document
            row["labels"][at : at + known] = corpus.tokens[first + 1 : first + 1 + known]
            learn = 1 if corpus.learn is None else corpus.learn[first + 1 : first + 1 + known]
            row["weights"][at : at + known] = learn
            row["positions"][into] = np.arange(n)
            row["segment_ids"][into] = segment
            at += n
        return row


def best_fit(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Indices of `sizes` (each at most `room`) in rows that hold at most `room`: largest first, where they fit tightest."""
    order = [int(i) for i in np.argsort(-sizes, kind="stable") if sizes[i] > 0]
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows
    for i in order:
        size = int(sizes[i])
        left = next((n for n in range(size, room) if open_rows.get(n)), None)
        if left is None:
            rows.append([i])
            open_rows.setdefault(room - size, []).append(len(rows) - 1)
        else:
            row = open_rows[left].pop()
            rows[row].append(i)
            open_rows.setdefault(left - size, []).append(row)
    return rows


@dataclass(frozen=True)
class Batches:
    """The batches of a run: step s holds the samples s·B … s·B + B - 1 of the endless shuffled order.

    sharding: of arrays [A, B/A, T], A microbatches. segments: whether rows hold several documents. context: of rows in parts,
    which are filled up to parts of one size with tokens that do not count, and lie in its order.
    """

    windows: Windows
    batch_size: int
    accumulate: int
    seed: int
    sharding: NamedSharding
    segments: bool
    context: Context | None = None

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches from `step` on, without end. Each process reads the rows that its devices hold, and no others."""
        windows, B = self.windows, self.batch_size
        order = grain.MapDataset.range(len(windows)).seed(self.seed).shuffle().repeat()
        each = np.arange(B).reshape(self.shape[:2])
        places = self.sharding.addressable_devices_indices_map(self.shape).values()
        mine = sorted({int(row) for index in places for row in each[index[:2]].ravel()})  # type: ignore[index]

        def samples(step: int) -> dict[int, dict[str, np.ndarray]]:
            numbers = {row: step * B + row for row in mine}
            return {row: windows.sample(order[n], shift=self._shift(n // len(windows))) for row, n in numbers.items()}

        steps = grain.MapDataset.range(2**40).slice(slice(step, None)).map(samples)
        for rows in steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)):
            yield self._batch(rows)

    def once(self) -> Iterator[Batch]:
        """Every sample once, in order; the last batch is filled with rows that do not count."""
        blank = {name: np.zeros_like(value) for name, value in self.windows.sample(0).items()}
        for start in range(0, len(self.windows), self.batch_size):
            numbers = range(start, start + self.batch_size)
            yield self._batch({i - start: self.windows.sample(i) if i < len(self.windows) else blank for i in numbers})

    @property
    def shape(self) -> tuple[int, int, int]:
        """[A, B/A, T]."""
        T = self.windows.length
        return (self.accumulate, self.batch_size // self.accumulate, self.context.padded(T) if self.context else T)

    def _shift(self, epoch: int) -> int:
        """Each time through, running text is cut up elsewhere."""
        return int(np.random.default_rng((self.seed, epoch)).integers(self.windows.length)) if epoch else 0

    def _batch(self, samples: dict[int, dict[str, np.ndarray]]) -> Batch:
        shape, T = self.shape, self.windows.length
        each = np.arange(self.batch_size).reshape(shape[:2])
        if self.context:
            beyond, order = (0, shape[2] - T), self.context.order(shape[2])
            samples = {i: {name: np.pad(a, beyond)[order] for name, a in row.items()} for i, row in samples.items()}

        def array(name: str) -> jax.Array:
            def block(index: Any) -> np.ndarray:
                rows = each[index[0], index[1]]
                return np.stack([samples[int(row)][name] for row in rows.ravel()]).reshape(*rows.shape, -1)[..., index[2]]

            return jax.make_array_from_callback(shape, self.sharding, block)

        names = ("tokens", "labels", "weights", "positions", *(("segment_ids",) if self.segments else ()))
        return Batch(**{name: array(name) for name in names})
