"""A step's plan: one int32 array that the host sends, in which each lane has what the device must know of it.

A lane is a row that makes a token, or a chunk of a prompt. G groups of data parallelism, R rows and P chunks of each, L = R + P
lanes, C tokens of a chunk, N pages of a table.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtp.engine.sequence import Sequence
from jaxtp.engine.work import Work
from jaxtp.ops.pages import Read

NOBODY = -1
INTS = ("row", "start", "count", "prompt", "ends", "produced", "top_k", "seed", "sample", "min_tokens", "max_tokens")
FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
AT = {name: i for i, name in enumerate((*INTS, *FLOATS))}


@dataclass(frozen=True)
class Shape:
    """What is static of a step: its lanes, the widths of a lane's lists, and how the cache is read (see `ops.pages`).

    stops, biases: stop ids and biases of a lane. loop: whether rows alone may go on for several steps in one call.
    """

    rows: int
    chunks: int
    chunk: int
    pages: int
    stops: int
    biases: int
    read: Read
    reach: int
    loop: bool = True

    @property
    def lanes(self) -> int:
        """L."""
        return self.rows + self.chunks

    @property
    def tokens(self) -> int:
        """Tokens of a group in a step."""
        return self.rows + self.chunks * self.chunk

    @property
    def fields(self) -> int:
        """int32s of a lane before its table."""
        return len(AT) + self.stops + 2 * self.biases

    @property
    def size(self) -> int:
        """int32s of a group's plan."""
        return self.lanes * (self.fields + self.pages) + self.chunks * self.chunk


class Cards:
    """What lanes say, kept for each row and brought up to date when something changes, so that a plan is a few copies."""

    def __init__(self, *, groups: int, rows: int, pages: int, slab: bool) -> None:
        self.groups, self.rows, self.pages, self.slab = groups, rows, pages, slab
        self.stops, self.biases = 4, 0
        self._cards = self._empty()

    def _empty(self) -> np.ndarray:
        return np.zeros((self.groups, self.rows, len(AT) + self.stops + 2 * self.biases + self.pages), np.int32)

    def widen(self, running: Iterable[Sequence], *, stops: int, biases: int) -> None:
        """Room for longer lists of stop ids and biases, in powers of two; the cards of who is running are written anew."""
        stops, biases = max(self.stops, _power(stops)), max(self.biases, _power(biases))
        if (stops, biases) != (self.stops, self.biases):
            self.stops, self.biases = stops, biases
            self._cards = self._empty()
            for sequence in running:
                sequence.tabled = 0

    def card(self, sequence: Sequence) -> np.ndarray:
        """The card of a sequence that has a row."""
        card = self._cards[sequence.group, sequence.row]
        if not sequence.tabled:
            self._write(card, sequence)
        if sequence.tabled < len(sequence.pages):
            at = len(card) - self.pages
            card[at + sequence.tabled : at + len(sequence.pages)] = sequence.pages[sequence.tabled :]
            sequence.tabled = len(sequence.pages)
        return card

    def _write(self, card: np.ndarray, sequence: Sequence) -> None:
        params, floats = sequence.request.params, card.view(np.float32)
        card[:] = 0
        for name, value in {
            "row": sequence.row,
            "count": 1,
            "prompt": sequence.span,
            "ends": 1,
            "top_k": max(params.top_k, 0),
            "seed": np.uint32(sequence.request.seed).astype(np.int32),
            "sample": sequence.index,
            "min_tokens": params.min_tokens,
            "max_tokens": sequence.max_tokens,
        }.items():
            card[AT[name]] = value
        for name, real in {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition": params.repetition_penalty,
            "presence": params.presence_penalty,
            "frequency": params.frequency_penalty,
        }.items():
            floats[AT[name]] = real
        at = len(AT)
        card[at : at + self.stops + self.biases] = NOBODY
        card[at : at + len(sequence.stop_ids)] = sequence.stop_ids
        at += self.stops
        bias = params.logit_bias
        card[at : at + len(bias)] = list(bias)
        floats[at + self.biases : at + self.biases + len(bias)] = list(bias.values())

    def pack(self, work: list[Work], shape: Shape) -> np.ndarray:
        """[G, shape.size]: the plan of a step."""
        plan = empty(shape, self.groups)
        lanes, tokens = apart(plan, shape)
        for group, mine in enumerate(work):
            if mine.rows:
                for sequence in mine.rows:
                    if sequence.tabled != len(sequence.pages):
                        self.card(sequence)
                rows = [sequence.row for sequence in mine.rows]
                at = np.array(rows) if self.slab else np.arange(len(rows))
                lanes[group, at] = self._cards[group, rows, : lanes.shape[-1]]
                lanes[group, at, AT["start"]] = mine.starts
                lanes[group, at, AT["produced"]] = mine.produced
            for i, chunk in enumerate(mine.chunks):
                lane = lanes[group, shape.rows + i]
                lane[:] = self.card(chunk.sequence)[: lane.size]
                for name in ("start", "count", "ends", "produced"):
                    lane[AT[name]] = getattr(chunk, name)
                tokens[group, i, : chunk.count] = chunk.sequence.ids[chunk.start : chunk.start + chunk.count]
        return plan


def empty(shape: Shape, groups: int) -> np.ndarray:
    """[G, shape.size]: the plan of a step in which nobody does anything."""
    plan = np.zeros((groups, shape.size), np.int32)
    apart(plan, shape)[0][:, :, AT["row"]] = NOBODY
    return plan


def apart(plan: Any, shape: Shape) -> tuple[Any, Any]:
    """A plan's lanes [G, L, fields and table] and the tokens of its chunks [G, P, C]; on the host they are views of it."""
    width = shape.fields + shape.pages
    lanes = plan[:, : shape.lanes * width].reshape(len(plan), shape.lanes, width)
    return lanes, plan[:, shape.lanes * width :].reshape(len(plan), shape.chunks, shape.chunk)


def joined(shapes: list[Shape]) -> Shape:
    """The shape that holds plans of each of these."""
    names = ("rows", "chunks", "stops", "biases", "reach")
    return dataclasses.replace(shapes[0], **{name: max(getattr(shape, name) for shape in shapes) for name in names})


def fitted(plan: np.ndarray, shape: Shape, larger: Shape) -> np.ndarray:
    """A plan in a shape with more lanes, or longer lists in them."""
    if dataclasses.replace(shape, reach=larger.reach) == larger:
        return plan
    out = empty(larger, len(plan))
    (lanes, tokens), (into, ids) = apart(plan, shape), apart(out, larger)
    wide = np.zeros((*lanes.shape[:2], into.shape[-1]), np.int32)
    ours, theirs = _columns(shape), _columns(larger)
    wide[:, :, theirs[1].start : theirs[2].stop] = NOBODY
    for mine, its in zip(ours, theirs, strict=True):
        wide[:, :, its.start : its.start + mine.stop - mine.start] = lanes[:, :, mine]
    into[:, : shape.rows] = wide[:, : shape.rows]
    into[:, larger.rows : larger.rows + shape.chunks] = wide[:, shape.rows :]
    ids[:, : shape.chunks] = tokens
    return out


def _columns(shape: Shape) -> list[slice]:
    """Where in a lane its fields are, its stop ids, the ids of its biases, these, and its table."""
    ends = np.cumsum([0, len(AT), shape.stops, shape.biases, shape.biases, shape.pages]).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length() if n else 0
