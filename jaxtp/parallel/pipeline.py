"""Pipeline parallelism: blocks in stages over the mesh axis pp, microbatches in the order of a schedule, in one program.

A rank's part of every array is an element of a dim that is sharded over pp, and the stage is mapped over that dim: one
program, in which each rank computes another stage, and the products inside a stage are sharded over tp by the model's own
rules. Data parallelism is a second such dim, and ep and the parts of rows over cp with it, so that each group's gradients stay
its own until the end of the step. The model knows nothing of this. `ticks` holds what is done at each tick, `orders` the
schedule as a program reads it.

The ranks hold the vocabulary together (over pp and tp), so that none computes a whole head: tokens enter and losses leave on
all of them at once.

P ranks, v chunks, n slots of a chunk (of a stack, those with rows), M microbatches, d groups (see `regions`), L layers; B rows,
T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxtp.model.stacked import Spec
from jaxtp.parallel.regions import after, groups, locally
from jaxtp.parallel.schedules import Name, Schedule
from jaxtp.parallel.stages import Stages
from jaxtp.parallel.ticks import Arrays, Parts, Pass
from jaxtp.sharding import joined, names, spec_of


@dataclass(frozen=True)
class Pipeline:
    """How a stack of blocks is run over pp. name: of the schedule of a training step."""

    mesh: Mesh
    stages: Stages
    name: Name

    def schedule(self, microbatches: int) -> Schedule:
        """The schedule of a training step."""
        return Schedule(self.name, self.stages.ranks, microbatches, self.stages.chunks)

    # -- the stack -----------------------------------------------------------------------------------------------------

    def arrange(self, stack: jax.Array, layers: Sequence[int]) -> jax.Array:
        """[L, ...] in the model's order -> [P·v·n, ...] in the order of the stages; empty slots hold zeros."""
        rows = self.stages.rows_of(layers)
        taken = stack[np.array([row or 0 for row in rows])]
        filled = np.array([row is not None for row in rows]).reshape(-1, *[1] * (stack.ndim - 1))
        return jnp.where(filled, taken, jnp.zeros((), stack.dtype))

    def restore(self, stack: jax.Array, layers: Sequence[int]) -> jax.Array:
        """The other way round."""
        return stack[np.array(self.stages.places_of(layers))]

    @property
    def in_order(self) -> bool:
        """Whether the order of the stages is the model's, with no empty slot: `arrange` changes nothing."""
        return self.stages.rows == tuple(range(len(self.stages.rows)))

    def specs(self, specs: Mapping[str, Spec]) -> dict[str, Spec]:
        """Parameters as a pipeline holds them: the stacks arranged, and each rank with its own part."""

        def held(spec: Spec) -> Spec:
            if spec.dims[0] != "layers":
                return spec
            shape = len(self.stages.rows_of(spec.layers)), *spec.shape[1:]
            return replace(spec, shape=shape, spec=PartitionSpec("pp", *spec.spec.partitions[1:]))

        return {path: held(spec) for path, spec in specs.items()}

    def _cut(self, stack: jax.Array) -> jax.Array:
        """[P·v·n, ...] over pp -> [d, P, v, n, ...]: every group's own copy, which it has already; of experts its own ones."""
        over = groups(self.mesh)
        rest = [joined(*(axis for axis in names(axes) if axis not in names(over))) for axes in spec_of(stack).partitions[1:]]
        v, out = self.stages.chunks, PartitionSpec(over, "pp", None, None, *rest)
        return locally(lambda w: w.reshape(1, 1, v, -1, *w.shape[1:]), stack, out=out)

    def _uncut(self, grads: jax.Array, like: jax.Array) -> jax.Array:
        """[d, P, v, n, ...] -> [P·v·n, ...] as `like` lies: each group's share of a sum that is still to be made."""
        spec = spec_of(like).partitions
        shares = {*names(groups(self.mesh))} - {axis for axes in spec for axis in names(axes)}
        return locally(lambda g: g.reshape(-1, *g.shape[4:]), grads, out=PartitionSpec(*spec, unreduced=shares))

    # -- programs ------------------------------------------------------------------------------------------------------

    def gradients(
        self, parts: Parts, tables: Arrays, stacks: Arrays, *, fixed: tuple[Arrays, Arrays], batch: Any, over: jax.Array
    ) -> tuple[Arrays, Arrays, tuple[jax.Array, ...], Any]:
        """(gradients of tables, of stacks, sums, told): of what `parts.leave` gives, over all rows and microbatches of `batch`
        [M, B, T], divided by `over`; and what stages told, added up over microbatches and groups, [P, v, ...].

        tables: what all ranks use, typed `reduced` over the groups. stacks: of the blocks' weights, as `arrange` makes them,
        whole over these, but for experts. fixed: (tables, stacks) that get none. Gradients are float32, and not yet summed.
        """
        batch = functools.reduce(after, (over, *tables.values()), batch)
        run = self._pass(self.schedule(_micros(batch)), parts, fixed, batch, over)
        whole, stacks = stacks, {path: self._cut(w) for path, w in stacks.items()}
        state = run.begin(tables, stacks)
        first = 0
        for kind, ticks in run.schedule.phases:
            body = functools.partial(run.tick, kind=kind, tables=tables, stacks=stacks)
            state, _ = jax.lax.scan(body, state, run.orders.during(first, first + ticks))
            first += ticks
        sums = tuple(s.sum() / over for s in state.sums)
        told = jax.tree.map(lambda a: a.sum(axis=0), state.told)
        return state.tables, {path: self._uncut(g, whole[path]) for path, g in state.stacks.items()}, sums, told

    def sums(self, parts: Parts, tables: Arrays, stacks: Arrays, batch: Any) -> tuple[jax.Array, ...]:
        """What `parts.leave` gives, summed over the microbatches, without gradients."""
        schedule = replace(self.schedule(_micros(batch)), name="forward")
        run = self._pass(schedule, parts, (tables, stacks), batch)
        body = functools.partial(run.tick, kind="F", tables={}, stacks={})
        return tuple(s.sum() for s in jax.lax.scan(body, run.begin({}, {}), run.orders)[0].sums)

    def _pass(
        self, schedule: Schedule, parts: Parts, fixed: tuple[Arrays, Arrays], batch: Any, over: jax.Array | float = 1.0
    ) -> Pass:
        tables, stacks = fixed
        batch = functools.reduce(after, tables.values(), batch)  # no loop begins before what it may not wait for is there
        return Pass(parts, self.stages, schedule, (tables, {path: self._cut(w) for path, w in stacks.items()}), batch, over)


def _micros(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]
