"""One pass of a pipeline over a batch, tick by tick.

What is a rank's own business (which microbatch, which chunk, where its input is kept) stands in regions without communication;
what a stage computes goes to the next one by a collective-permute.

P ranks, v chunks, n slots of a chunk, M microbatches, d groups (see `regions.groups`), S places for inputs; B rows, T tokens,
b and t of each group, D embed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp.parallel.orders import Order, Orders
from jaxtp.parallel.regions import after, groups, locally, of_rank, shift
from jaxtp.parallel.schedules import Kind, Schedule
from jaxtp.parallel.stages import Stages
from jaxtp.sharding import dual, joined, names, size, spec_of, specs_of

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Parts:
    """A model cut in three, `micro` being one microbatch of [B, T] arrays.

    enter(tables, micro) -> x [B, T, D]. stage(weights [n, ...], filled [n] bool, x [b, t, D], micro) -> (x, told); it sees one
    rank's and one group's arrays, and of `micro` the group's part of what `needed` takes. told: None, or (what a stage costs
    [], which is learned from as a mean over microbatches and groups, and other numbers). leave(tables, x, micro) -> sums of
    each row [B], of which the first is what is learned from.
    """

    enter: Callable[[Arrays, Any], jax.Array]
    stage: Callable[[Arrays, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
    leave: Callable[[Arrays, jax.Array, Any], tuple[jax.Array, ...]]
    needed: Callable[[Any], Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Between ticks. forth, back [d, P, b, t, D]: what came from the neighbours. kept [d, P, S, b, t, D]: inputs of chunks.
    tables, stacks: gradients so far, in float32. sums: of the losses. told [d, P, v, ...]: by stages.
    """

    forth: jax.Array
    back: jax.Array
    kept: jax.Array
    tables: Arrays
    stacks: Arrays
    sums: tuple[jax.Array, ...]
    told: Any


class Pass:
    """One pass over a batch [M, B, T], while it is traced."""

    def __init__(
        self,
        parts: Parts,
        stages: Stages,
        schedule: Schedule,
        fixed: tuple[Arrays, Arrays],
        batch: Any,
        over: jax.Array | float,
    ) -> None:
        self.parts, self.stages, self.schedule, self.over = parts, stages, schedule, over
        self.beside = parts.needed(batch)
        self.batch = functools.reduce(after, jax.tree.leaves(self.beside), batch)
        self.tables, self.stacks = fixed
        self.mesh = jax.typeof(jax.tree.leaves(batch)[0]).sharding.mesh
        self.orders = Orders.of(schedule, self.mesh)
        filled = np.array([row is not None for row in stages.rows]).reshape(stages.ranks, stages.chunks, stages.slots)
        self.groups = groups(self.mesh)
        self.count = size(self.mesh, self.groups)
        filled = np.broadcast_to(filled, (self.count, *filled.shape))
        place = NamedSharding(self.mesh, PartitionSpec(self.groups, "pp", None, None))
        self.filled = jax.sharding.reshard(jnp.asarray(filled), place)

    def begin(self, tables: Arrays, stacks: Arrays) -> State:
        """Nothing under way."""
        nothing = jnp.zeros((2,), jnp.int32)
        x = jax.eval_shape(self._enter, tables, nothing)
        sums = jax.eval_shape(self._leave, tables, x, nothing)

        def zeros(shape: tuple[int, ...], dtype: jnp.dtype, spec: PartitionSpec) -> jax.Array:
            return jnp.zeros(shape, dtype, out_sharding=NamedSharding(self.mesh, spec))

        batch, tokens, _ = x.sharding.spec.partitions
        over = joined(*(axis for axis in names(tokens) if axis not in names(self.groups)))
        (B, T, D), ranks = x.shape, self.stages.ranks
        rows, part = B // size(self.mesh, batch), T // (self.count // size(self.mesh, batch))
        # what is only evaluated is kept nowhere
        places = max(self.schedule.in_flight(rank) for rank in range(ranks)) if self.schedule.name != "forward" else 0
        flow = zeros((self.count, ranks, rows, part, D), x.dtype, PartitionSpec(self.groups, "pp", None, over, None))
        kept = (self.count, ranks, places, rows, part, D)
        return State(
            forth=flow,
            back=flow,
            kept=zeros(kept, x.dtype, PartitionSpec(self.groups, "pp", None, None, over, None)),
            tables={path: zeros(w.shape, jnp.dtype(jnp.float32), dual(w)) for path, w in tables.items()},
            stacks={path: zeros(w.shape, jnp.dtype(jnp.float32), dual(w)) for path, w in stacks.items()},
            sums=jax.tree.map(lambda a: zeros(a.shape, a.dtype, a.sharding.spec), sums),
            told=jax.tree.map(
                lambda a: zeros((self.count, ranks, self.stages.chunks, *a.shape[2:]), a.dtype, _by_chunk(a.sharding.spec)),
                jax.eval_shape(self._told, stacks, flow) if stacks else None,
            ),
        )

    def _told(self, stacks: Arrays, x: jax.Array) -> Any:
        order, beside = jax.tree.map(lambda a: a[0], self.orders.backward), self.beside
        micro = locally(lambda order, beside: _picked(beside, order), order, beside, out=jax.tree.map(_apart, beside))
        return self._stage(self._chunk(stacks, order), x, order, micro)[1]

    def tick(self, state: State, orders: Orders, *, kind: Kind, tables: Arrays, stacks: Arrays) -> tuple[State, None]:
        """One tick, the same on all ranks."""
        if "F" in kind:
            state = self._forward(state, orders, tables, stacks)
        if "B" in kind:
            state = self._backward(state, orders, tables, stacks)
        return state, None

    def _forward(self, state: State, orders: Orders, tables: Arrays, stacks: Arrays) -> State:
        entering, beside = self._enter(tables, after(orders.enters, state.back)), self.beside
        keep = self.schedule.name != "forward"

        def take(order, entering, forth, kept, beside):
            first = (jax.lax.axis_index("pp") == 0) & (order.chunk[0] == 0)
            x = jnp.where(first, entering, forth[0, 0])
            if keep:
                slot = order.slot[0]
                kept = kept.at[0, 0, slot].set(jnp.where(order.busy[0] != 0, x, kept[0, 0, slot]))
            return x[None, None], kept, _picked(beside, order)

        out = *specs_of((state.forth, state.kept)), jax.tree.map(_apart, beside)
        x, kept, micro = locally(take, orders.forward, entering, state.forth, state.kept, beside, out=out)
        y, _ = self._stage(self._chunk(stacks, orders.forward), x, orders.forward, micro)
        state = replace(state, forth=shift(y, 1), kept=kept)
        if keep:
            return state
        sums = self._leave(tables, of_rank(after(y, state.forth), self.stages.ranks - 1), orders.leaves)
        return replace(state, sums=jax.tree.map(jnp.add, state.sums, sums))

    def _backward(self, state: State, orders: Orders, tables: Arrays, stacks: Arrays) -> State:
        order, beside, ranks, chunks = orders.backward, self.beside, self.stages.ranks, self.stages.chunks

        def recall(order, kept, beside):
            return kept[0, 0, order.slot[0]][None, None], _picked(beside, order)

        x, micro = locally(recall, order, state.kept, beside, out=(spec_of(state.back), jax.tree.map(_apart, beside)))
        # the chunk once more, now with what its backward pass needs
        x = after(x, state.forth)
        (y, told), pull = jax.vjp(lambda w, x: self._stage(w, x, order, micro), self._chunk(stacks, order), x)

        left = of_rank(y if told is None else after(y, told[0]), ranks - 1)
        sums, learn = jax.vjp(lambda tables, y: self._leave(tables, y, orders.turns), tables, left)
        loss, *others = sums
        to_tables, to_y = learn((jnp.ones_like(loss) / self.over, *(jnp.zeros_like(other) for other in others)))
        to_y = functools.reduce(after, sums, to_y)

        def turn(order, to_y, back):
            last = (jax.lax.axis_index("pp") == ranks - 1) & (order.chunk[0] == chunks - 1)
            grad = jnp.where(last, to_y, back[0, 0])
            return jnp.where(order.busy[0] != 0, grad, jnp.zeros((), grad.dtype))[None, None]  # idle: nothing is learned

        def busy(order, told):
            return jax.tree.map(lambda a: jnp.where(order.busy[0] != 0, a, jnp.zeros((), a.dtype)), told)

        told = locally(busy, order, told, out=specs_of(told))
        to_told = jax.tree.map(jnp.zeros_like, told)
        if told is not None:
            each = jnp.full_like(told[0], 1 / (self.schedule.microbatches * self.count))
            to_told = (locally(busy, order, each, out=spec_of(each)), to_told[1])
        to_stacks, to_x = pull((locally(turn, order, to_y, state.back, out=spec_of(state.back)), to_told))
        _, enter = jax.vjp(lambda tables: self._enter(tables, orders.returns), tables)
        to_before = shift(to_x, -1)
        entered = of_rank(after(to_x, to_before), 0)
        (from_entering,) = enter(jnp.where(orders.returns[1] != 0, entered, jnp.zeros((), entered.dtype)))
        total = {
            path: g + to_tables[path].astype(g.dtype) + from_entering[path].astype(g.dtype) for path, g in state.tables.items()
        }

        def add(order, total, new):
            return jax.tree.map(lambda t, g: t.at[0, 0, order.chunk[0]].add(g[0, 0].astype(t.dtype)), total, new)

        return replace(
            state,
            back=to_before,
            tables=total,
            stacks=locally(add, order, state.stacks, to_stacks, out=specs_of(state.stacks)),
            told=locally(add, order, state.told, told, out=specs_of(state.told)),
            sums=jax.tree.map(jnp.add, state.sums, sums),
        )

    # -- the parts -----------------------------------------------------------------------------------------------------

    def _enter(self, tables: Arrays, which: jax.Array) -> jax.Array:
        return self.parts.enter({**self.tables, **tables}, self._micro(which))

    def _leave(self, tables: Arrays, x: jax.Array, which: jax.Array) -> tuple[jax.Array, ...]:
        """Zeros, and zero gradients, where no microbatch is there."""
        there = which[1] != 0
        sums = self.parts.leave({**self.tables, **tables}, jnp.where(there, x, jnp.zeros((), x.dtype)), self._micro(which))
        return tuple(jnp.where(there, s, jnp.zeros((), s.dtype)) for s in sums)

    def _stage(self, weights: Arrays, x: jax.Array, order: Order, micro: Any) -> tuple[jax.Array, Any]:
        """The same on every rank and in every group, with its own weights [d, P, n, ...] and x [d, P, b, t, D]; and what each
        told [d, P, ...].
        """
        weights, filled = {**self._chunk(self.stacks, order), **weights}, self._chunk(self.filled, order)
        inner = jax.vmap(self.parts.stage, spmd_axis_name="pp")
        return jax.vmap(inner, spmd_axis_name=self.groups)(weights, filled, x, micro)

    def _chunk(self, stacks: Any, order: Order) -> Any:
        """Of stacks [d, P, v, n, ...] each rank's chunk: [d, P, n, ...]."""
        if self.stages.chunks == 1:
            return jax.tree.map(lambda w: w[:, :, 0], stacks)

        def pick(stacks, order):
            return jax.tree.map(lambda w: w[:, :, order.chunk[0]], stacks)

        out = jax.tree.map(lambda w: PartitionSpec(*spec_of(w).partitions[:2], *spec_of(w).partitions[3:]), stacks)
        return locally(pick, stacks, order, out=out)

    def _micro(self, which: jax.Array) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, which[0], keepdims=False), self.batch)


def _picked(beside: Any, order: Order) -> Any:
    """Of a group's arrays [M, b, t] a rank's microbatch, [1, 1, b, t]."""
    return jax.tree.map(lambda a: a[order.micro[0]][None, None], beside)


def _by_chunk(spec: PartitionSpec) -> PartitionSpec:
    """[d, P, ...] -> [d, P, v, ...]."""
    return PartitionSpec(*spec[:2], None, *spec[2:])


def _apart(a: jax.Array) -> PartitionSpec:
    """The layout of `_picked` parts of an array [M, B, T]."""
    return PartitionSpec(groups(jax.typeof(a).sharding.mesh), "pp", None, None)
