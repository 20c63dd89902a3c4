"""The device's side of the engine: what stays there, the programs, and how a plan gets there and tokens come back."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxtp.engine import sampler, step
from jaxtp.engine.plan import Shape, empty, fitted, joined
from jaxtp.engine.programs import Programs
from jaxtp.engine.state import State, begin, moved, nothing
from jaxtp.model import Llama
from jaxtp.ops.sampling import Counts, Features
from jaxtp.parallel import circulate
from jaxtp.sharding import put


class Runner:
    """Steps of one model. Every process of a job gives it the same plans in the same order.

    pages, size: of the cache of each group, and of a page. rows: of a group.
    """

    def __init__(self, model: Llama, programs: Programs, *, pages: int, size: int, rows: int) -> None:
        self.model, self.programs, self.rows = model, programs, rows
        self.groups = model.layout.parts("batch")
        self._places = model.layout.sharding(None, "batch", None)  # of plans
        self.state: State = programs.run(begin, pages=pages * self.groups, size=size, rows=rows)
        # plans of the last ticks, the newest first
        self._under_way: deque[tuple[np.ndarray, Shape]] = deque(maxlen=model.stages)
        self._shape: Shape | None = None

    def run(self, plan: np.ndarray, shape: Shape, features: Features, steps: int = 1) -> tuple[step.Made, Shape]:
        """Dispatches a step by a plan [G, shape.size].

        In stages, what it makes is of the plan of so many ticks before, whose lanes are those of the shape that is returned.
        """
        counts = self._counts() if features.penalties else None
        if self.model.stacks:
            plans, shape = self._staged(plan, shape)
        else:
            plans = plan[None]
        alone = jax.process_count() == 1  # then the call brings it to its devices, in less time
        given, place = (plans, {1: self._places}) if alone else (put(plans, self._places), None)
        state, kept = dataclasses.replace(self.state, counts=counts), self.state.counts
        state, made = self.programs.run(
            _step(shape), state, given, np.int32(steps), donate=(0,), place=place, shape=shape, features=features
        )
        # a step without penalties is not told of counts: it is the same program before and after anybody asked for them
        self.state = state if features.penalties else dataclasses.replace(state, counts=kept)
        return made, shape

    def compile(self, shape: Shape, features: Features) -> None:
        """Compiles the step of a shape, without running it."""
        counts = sampler.abstract_counts(self.model, rows=self.rows) if features.penalties else None
        state: Any = dataclasses.replace(self.state, counts=counts)  # type: ignore[arg-type]
        if self.model.stacks:
            between: Any = circulate.between(self.model, shape.tokens)
            state = dataclasses.replace(state, between=between)
        plan = jax.ShapeDtypeStruct((self.model.stages, self.groups, shape.size), np.int32, sharding=self._places)
        args = state, plan, jax.ShapeDtypeStruct((), np.int32)
        self.programs.compile(_step(shape), *args, donate=(0,), shape=shape, features=features)

    def recount(self, group: int, row: int, prompt: list[int], output: list[int]) -> None:
        """Counts of a row that begins anew, for penalties."""
        ids = [np.full(1 << max(len(each) - 1, 31).bit_length(), -1, np.int32) for each in (prompt, output)]
        ids[0][: len(prompt)], ids[1][: len(output)] = prompt, output
        counts = self.programs.run(sampler.recount, self._counts(), np.array([group, row], np.int32), *ids, donate=(0,))
        self._set(counts=counts)

    def _staged(self, plan: np.ndarray, shape: Shape) -> tuple[np.ndarray, Shape]:
        """The plans of all ranks, in a shape that holds them."""
        while len(self._under_way) < self.model.stages:
            self._under_way.append((empty(shape, self.groups), shape))
        self._under_way.appendleft((plan, shape))
        larger = joined([shape for _, shape in self._under_way])
        if self.state.between is None:
            self._set(between=self.programs.run(nothing, shape=larger))
        elif self._shape is not None and (self._shape.rows, self._shape.chunks) != (larger.rows, larger.chunks):
            self._set(between=self.programs.run(moved, self.state.between, old=self._shape, new=larger))
        self._shape = larger
        return np.stack([fitted(plan, shape, larger) for plan, shape in self._under_way]), larger

    def _counts(self) -> Counts:
        """What penalties need, of every row; made when they are first asked for."""
        if self.state.counts is None:
            self._set(counts=self.programs.run(sampler.uncounted, rows=self.rows))
        assert self.state.counts is not None
        return self.state.counts

    def _set(self, **changes: Any) -> None:
        self.state = dataclasses.replace(self.state, **changes)


def _step(shape: Shape) -> Callable[..., tuple[State, step.Made]]:
    return step.mixed if shape.chunks else step.decode
