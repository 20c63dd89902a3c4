"""Which layers stand on which stage of a pipeline. Pure arithmetic.

p ranks, v chunks of layers on each; chunk c of rank r is stage c·p + r of the model. On a device mesh every stage is of the
same form, so all have the slots of the largest: a stage with fewer layers leaves slots empty, whose work is done in vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LISTED = 8  # legal sizes that a message lists; of more it says from where to where


@dataclass(frozen=True)
class Stages:
    """sizes: the layers of each stage, in the model's order."""

    ranks: int
    chunks: int
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        asked = f"layers_per_stage={list(self.sizes)}"
        if len(self.sizes) != self.ranks * self.chunks:
            raise ValueError(f"{asked} must name {self.ranks * self.chunks} stages: pp={self.ranks} × {self.chunks} a rank")
        if min(self.sizes) < 1:
            raise ValueError(f"{asked}: every stage needs a layer at least")

    @classmethod
    def split(cls, layers: int, *, ranks: int, chunks: int = 1, sizes: Sequence[int] | None = None) -> Stages:
        """Balanced stages, or those of `sizes`. Raises ValueError, with the legal values, where layers do not fit."""
        if ranks < 1:
            raise ValueError(f"pp={ranks} must be at least 1")
        stages = ranks * chunks
        if stages > layers:
            most = layers // chunks
            legal = f"1 to {most}" if most > LISTED else ", ".join(str(n) for n in range(1, most + 1))
            raise ValueError(
                f"pp={ranks}{f' with {chunks} chunks a rank' * (chunks > 1)} makes {stages} stages of {layers} layers; "
                + (f"legal pp with them: {legal}" if legal else f"the most chunks for {layers} layers: {layers}")
            )
        if sizes is None:
            # the last stage has the least: of all, the head's work comes with it
            sizes = [layers // stages + (i < layers % stages) for i in range(stages)]
        if sum(sizes) != layers:
            raise ValueError(f"layers_per_stage={list(sizes)} makes {sum(sizes)} layers; the model has {layers}")
        return cls(ranks, chunks, tuple(sizes))

    @property
    def slots(self) -> int:
        """Layers of the largest stage: the slots of each."""
        return max(self.sizes)

    @property
    def even(self) -> bool:
        """Whether no slot is empty."""
        return min(self.sizes) == self.slots

    @property
    def waste(self) -> float:
        """Work in vain over work: what empty slots add to a step."""
        return self.slots * len(self.sizes) / sum(self.sizes) - 1.0

    @property
    def rows(self) -> tuple[int | None, ...]:
        """The layer in each slot, rank by rank, chunk by chunk; None where it is empty."""
        p, found = self.ranks, []
        for stage in (chunk * p + rank for rank in range(p) for chunk in range(self.chunks)):
            first, size = sum(self.sizes[:stage]), self.sizes[stage]
            found += [first + i if i < size else None for i in range(self.slots)]
        return tuple(found)

    def rows_of(self, layers: Sequence[int]) -> tuple[int | None, ...]:
        """Of a stack of these layers (all, or those of some kinds, which stand in the same slots of every stage): its row in
        each slot that has one, in the order of `rows`; None where it is empty.
        """
        at = {layer: row for row, layer in enumerate(layers)}
        mine = {i % self.slots for i, layer in enumerate(self.rows) if layer in at}
        return tuple(None if layer is None else at[layer] for i, layer in enumerate(self.rows) if i % self.slots in mine)

    def places_of(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Where each of them is among those slots: `rows_of` the other way round."""
        at = {row: place for place, row in enumerate(self.rows_of(layers))}
        return tuple(at[row] for row in range(len(layers)))

    def alike(self, kinds: Sequence[Any]) -> tuple[Any, ...]:
        """The kind of layer in each slot, from those of all layers: one program runs on every rank, so it must be the same on
        every stage. Raises ValueError where it is not.
        """
        first = [sum(self.sizes[:stage]) for stage in range(len(self.sizes))]
        slots = [{kinds[f + i] for f, size in zip(first, self.sizes, strict=True) if i < size} for i in range(self.slots)]
        if any(len(found) > 1 for found in slots):
            raise ValueError(
                f"pp={self.ranks}: layers that stand in the same place of their stages differ ({list(kinds)}); a stage must "
                "hold a whole number of the pattern that they repeat"
            )
        return tuple(found.pop() for found in slots)

    def told(self) -> str:
        """The split and its cost, in words."""
        sizes = ", ".join(map(str, self.sizes))
        cost = "" if self.even else f"; uneven: empty slots add {self.waste:.1%} to the blocks' time and memory"
        return f"{sum(self.sizes)} layers on {len(self.sizes)} stages ({sizes}){cost}"
