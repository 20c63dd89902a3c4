"""Pipeline parallelism: blocks in stages over the mesh axis pp, microbatches in the order of a schedule, in one program.

A rank's part of every array is an element of a dim that is sharded over pp, and the stage is mapped over that dim: one
program, in which each rank computes another stage, and the products inside a stage are sharded over tp by the model's own
rules. Data parallelism is a second such dim, so that each group's gradients stay its own until the end of the step. What is
a rank's own business (which microbatch, which chunk, where its input is kept) stands in regions without communication; what
a stage computes goes to the next one by a collective-permute. The model knows nothing of this.

The ranks hold the vocabulary together (over pp and tp), so that none computes a whole head: tokens enter and losses leave on
all of them at once.

P ranks, v chunks, n slots of a chunk, M microbatches, d groups of dp, S places for inputs; B rows, b of each group (B/d),
T tokens, D embed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtp.mesh import platform
from jaxtp.model.stacked import Spec
from jaxtp.parallel.schedules import Kind, Name, Schedule
from jaxtp.parallel.stages import Stages
from jaxtp.sharding import specs_of

Arrays = dict[str, jax.Array]
NEVER = 0x7F912345  # as a token out of every vocabulary, as a float a NaN that nothing computes


@dataclass(frozen=True)
class Parts:
    """A model cut in three, `micro` being one microbatch of [B, T] arrays.

    enter(tables, micro) -> x [B, T, D]. stage(weights [n, ...], filled [n] bool, x [b, T, D], micro) -> x; it sees one rank's
    and one group's arrays, and of `micro` what `needed` takes of it. leave(tables, x, micro) -> sums of each row [B], of which
    the first is what is learned from.
    """

    enter: Callable[[Arrays, Any], jax.Array]
    stage: Callable[[Arrays, jax.Array, jax.Array, Any], jax.Array]
    leave: Callable[[Arrays, jax.Array, Any], tuple[jax.Array, ...]]
    needed: Callable[[Any], Any]


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

    def arrange(self, stack: jax.Array) -> jax.Array:
        """[L, ...] in the model's order -> [P·v·n, ...] in the order of the stages; empty slots hold zeros."""
        rows = self.stages.rows
        taken = stack[np.array([row or 0 for row in rows])]
        filled = np.array([row is not None for row in rows]).reshape(-1, *[1] * (stack.ndim - 1))
        return jnp.where(filled, taken, jnp.zeros((), stack.dtype))

    def restore(self, stack: jax.Array) -> jax.Array:
        """The other way round."""
        return stack[np.array(self.stages.places)]

    @property
    def in_order(self) -> bool:
        """Whether the order of the stages is the model's, with no empty slot: `arrange` changes nothing."""
        return self.stages.rows == tuple(range(len(self.stages.rows)))

    def specs(self, specs: Mapping[str, Spec]) -> dict[str, Spec]:
        """Parameters as a pipeline holds them: the stacks arranged, and each rank with its own part."""

        def held(spec: Spec) -> Spec:
            if spec.dims[0] != "layers":
                return spec
            return replace(
                spec, shape=(len(self.stages.rows), *spec.shape[1:]), spec=PartitionSpec("pp", *spec.spec.partitions[1:])
            )

        return {path: held(spec) for path, spec in specs.items()}

    def _cut(self, stack: jax.Array) -> jax.Array:
        """[P·v·n, ...] over pp -> [d, P, v, n, ...]: every group's own copy, which it has already."""
        rest = jax.typeof(stack).sharding.spec.partitions[1:]
        v, n = self.stages.chunks, self.stages.slots
        return locally(lambda w: w.reshape(1, 1, v, n, *w.shape[1:]), stack, out=PartitionSpec("dp", "pp", None, None, *rest))

    def _uncut(self, grads: jax.Array) -> jax.Array:
        """[d, P, v, n, ...] -> [P·v·n, ...] over pp: each group's share of a sum that is still to be made."""
        rest = jax.typeof(grads).sharding.spec.partitions[4:]
        return locally(lambda g: g.reshape(-1, *g.shape[4:]), grads, out=PartitionSpec("pp", *rest, unreduced={"dp"}))

    # -- programs ------------------------------------------------------------------------------------------------------

    def gradients(
        self, parts: Parts, tables: Arrays, stacks: Arrays, *, fixed: tuple[Arrays, Arrays], batch: Any, over: jax.Array
    ) -> tuple[Arrays, Arrays, tuple[jax.Array, ...]]:
        """(gradients of tables, of stacks, sums): of what `parts.leave` gives, over all rows and microbatches of `batch`
        [M, B, T], divided by `over`.

        tables: what all ranks use, typed `reduced` over dp. stacks: of the blocks' weights, as `arrange` makes them, whole
        over dp. fixed: (tables, stacks) that get none. Gradients are float32, and not yet summed over dp.
        """
        run = self._run(self.schedule(_micros(batch)), parts, fixed, batch, over)
        stacks = {path: self._cut(w) for path, w in stacks.items()}
        state = run.begin(tables, stacks)
        first = 0
        for kind, ticks in run.schedule.phases:
            body = functools.partial(run.tick, kind=kind, tables=tables, stacks=stacks)
            state, _ = jax.lax.scan(body, state, run.orders.during(first, first + ticks))
            first += ticks
        sums = tuple(s.sum() / over for s in state.sums)
        return state.tables, {path: self._uncut(g) for path, g in state.stacks.items()}, sums

    def sums(self, parts: Parts, tables: Arrays, stacks: Arrays, batch: Any) -> tuple[jax.Array, ...]:
        """What `parts.leave` gives, summed over the microbatches, without gradients."""
        schedule = replace(self.schedule(_micros(batch)), name="forward")
        run = self._run(schedule, parts, (tables, stacks), batch)
        body = functools.partial(run.tick, kind="F", tables={}, stacks={})
        return tuple(s.sum() for s in jax.lax.scan(body, run.begin({}, {}), run.orders)[0].sums)

    def _run(
        self, schedule: Schedule, parts: Parts, fixed: tuple[Arrays, Arrays], batch: Any, over: jax.Array | float = 1.0
    ) -> _Run:
        tables, stacks = fixed
        return _Run(parts, self.stages, schedule, (tables, {path: self._cut(w) for path, w in stacks.items()}), batch, over)


# -- one pass over a batch -----------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """Between ticks. forth, back [d, P, b, T, D]: what came from the neighbours. kept [d, P, S, b, T, D]: inputs of chunks.
    tables, stacks: gradients so far, in float32. sums: of the losses.
    """

    forth: jax.Array
    back: jax.Array
    kept: jax.Array
    tables: Arrays
    stacks: Arrays
    sums: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Order:
    """What each rank does at each tick, all [ticks, P] int32: whether anything; with what, and where its input is kept."""

    busy: jax.Array
    micro: jax.Array
    chunk: jax.Array
    slot: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Orders:
    """A schedule as arrays. What passes the model's ends at each tick, all [ticks, 2] int32, a microbatch and whether there is
    one: `enters` the first stage's F, `leaves` the last stage's F, `turns` in the last stage's B, `returns` from the first's.
    """

    forward: _Order
    backward: _Order
    enters: jax.Array
    leaves: jax.Array
    turns: jax.Array
    returns: jax.Array

    @classmethod
    def of(cls, schedule: Schedule, mesh: jax.sharding.AbstractMesh) -> _Orders:
        """All ticks of a schedule."""
        ticks, ranks, last = len(schedule.kinds), schedule.ranks, schedule.chunks - 1
        slots = [schedule.slots(rank) for rank in range(ranks)]
        orders, ends = np.zeros((2, 4, ticks, ranks), np.int32), np.zeros((2, 2, ticks, 2), np.int32)
        for tick in range(ticks):
            for rank in range(ranks):
                for way, work in enumerate((schedule.forward(tick, rank), schedule.backward(tick, rank))):
                    if work is None:
                        continue
                    orders[way, :, tick, rank] = 1, work.microbatch, work.chunk, slots[rank][work]
                    if (rank, work.chunk) == (0, 0):
                        ends[way, 0, tick] = work.microbatch, 1
                    if (rank, work.chunk) == (ranks - 1, last):
                        ends[way, 1, tick] = work.microbatch, 1

        def lay(a: np.ndarray, spec: PartitionSpec) -> jax.Array:
            return jax.sharding.reshard(jnp.asarray(a), NamedSharding(mesh, spec))

        forward, backward = (_Order(*(lay(a, PartitionSpec(None, "pp")) for a in way)) for way in orders)
        enters, leaves, returns, turns = (lay(end, PartitionSpec()) for way in ends for end in way)
        return cls(forward, backward, enters, leaves, turns, returns)

    def during(self, first: int, last: int) -> _Orders:
        """Those ticks."""
        return jax.tree.map(lambda a: a[first:last], self)


class _Run:
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
        self.parts, self.stages, self.schedule, self.batch, self.over = parts, stages, schedule, batch, over
        self.tables, self.stacks = fixed
        self.mesh = jax.typeof(jax.tree.leaves(batch)[0]).sharding.mesh
        self.orders = _Orders.of(schedule, self.mesh)
        filled = np.array([row is not None for row in stages.rows]).reshape(stages.ranks, stages.chunks, stages.slots)
        filled = np.broadcast_to(filled, (self.mesh.shape["dp"], *filled.shape))
        self.filled = jax.sharding.reshard(jnp.asarray(filled), NamedSharding(self.mesh, PartitionSpec("dp", "pp", None, None)))

    def begin(self, tables: Arrays, stacks: Arrays) -> _State:
        """Nothing under way."""
        nothing = jnp.zeros((2,), jnp.int32)
        x = jax.eval_shape(self._enter, tables, nothing)
        sums = jax.eval_shape(self._leave, tables, x, nothing)

        def zeros(shape: tuple[int, ...], dtype: jnp.dtype, spec: PartitionSpec) -> jax.Array:
            return jnp.zeros(shape, dtype, out_sharding=NamedSharding(self.mesh, spec))

        batch, tokens, _ = x.sharding.spec.partitions
        (B, T, D), groups, ranks = x.shape, self.mesh.shape["dp"], self.stages.ranks
        # what is only evaluated is kept nowhere
        places = max(self.schedule.in_flight(rank) for rank in range(ranks)) if self.schedule.name != "forward" else 0
        flow = zeros((groups, ranks, B // groups, T, D), x.dtype, PartitionSpec(batch, "pp", None, tokens, None))
        kept = (groups, ranks, places, B // groups, T, D)
        return _State(
            forth=flow,
            back=flow,
            kept=zeros(kept, x.dtype, PartitionSpec(batch, "pp", None, None, tokens, None)),
            tables={path: zeros(w.shape, jnp.dtype(jnp.float32), _dual(w)) for path, w in tables.items()},
            stacks={path: zeros(w.shape, jnp.dtype(jnp.float32), _dual(w)) for path, w in stacks.items()},
            sums=jax.tree.map(lambda a: zeros(a.shape, a.dtype, a.sharding.spec), sums),
        )

    def tick(self, state: _State, orders: _Orders, *, kind: Kind, tables: Arrays, stacks: Arrays) -> tuple[_State, None]:
        """One tick, the same on all ranks."""
        if "F" in kind:
            state = self._forward(state, orders, tables, stacks)
        if "B" in kind:
            state = self._backward(state, orders, tables, stacks)
        return state, None

    def _forward(self, state: _State, orders: _Orders, tables: Arrays, stacks: Arrays) -> _State:
        entering, beside = self._enter(tables, after(orders.enters, state.back)), self.parts.needed(self.batch)
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
        y = self._stage(self._chunk(stacks, orders.forward), x, orders.forward, micro)
        state = replace(state, forth=_shift(y, 1), kept=kept)
        if keep:
            return state
        sums = self._leave(tables, _from(after(y, state.forth), self.stages.ranks - 1), orders.leaves)
        return replace(state, sums=jax.tree.map(jnp.add, state.sums, sums))

    def _backward(self, state: _State, orders: _Orders, tables: Arrays, stacks: Arrays) -> _State:
        order, beside, ranks, chunks = orders.backward, self.parts.needed(self.batch), self.stages.ranks, self.stages.chunks

        def recall(order, kept, beside):
            return kept[0, 0, order.slot[0]][None, None], _picked(beside, order)

        x, micro = locally(recall, order, state.kept, beside, out=(spec_of(state.back), jax.tree.map(_apart, beside)))
        # the chunk once more, now with what its backward pass needs
        x = after(x, state.forth)
        y, pull = jax.vjp(lambda w, x: self._stage(w, x, order, micro), self._chunk(stacks, order), x)

        sums, learn = jax.vjp(lambda tables, y: self._leave(tables, y, orders.turns), tables, _from(y, ranks - 1))
        loss, *others = sums
        to_tables, to_y = learn((jnp.ones_like(loss) / self.over, *(jnp.zeros_like(other) for other in others)))

        def turn(order, to_y, back):
            last = (jax.lax.axis_index("pp") == ranks - 1) & (order.chunk[0] == chunks - 1)
            grad = jnp.where(last, to_y, back[0, 0])
            return jnp.where(order.busy[0] != 0, grad, jnp.zeros((), grad.dtype))[None, None]  # idle: nothing is learned

        to_stacks, to_x = pull(locally(turn, order, to_y, state.back, out=spec_of(state.back)))
        _, enter = jax.vjp(lambda tables: self._enter(tables, orders.returns), tables)
        to_before = _shift(to_x, -1)
        entered = _from(after(to_x, to_before), 0)
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

    def _stage(self, weights: Arrays, x: jax.Array, order: _Order, micro: Any) -> jax.Array:
        """The same on every rank and in every group, with its own weights [d, P, n, ...] and x [d, P, b, T, D]."""
        weights, filled = {**self._chunk(self.stacks, order), **weights}, self._chunk(self.filled, order)
        inner = jax.vmap(self.parts.stage, spmd_axis_name="pp")
        return jax.vmap(inner, spmd_axis_name="dp")(weights, filled, x, micro)

    def _chunk(self, stacks: Any, order: _Order) -> Any:
        """Of stacks [d, P, v, n, ...] each rank's chunk: [d, P, n, ...]."""
        if self.stages.chunks == 1:
            return jax.tree.map(lambda w: w[:, :, 0], stacks)

        def pick(stacks, order):
            return jax.tree.map(lambda w: w[:, :, order.chunk[0]], stacks)

        out = jax.tree.map(lambda w: PartitionSpec(*spec_of(w).partitions[:2], *spec_of(w).partitions[3:]), stacks)
        return locally(pick, stacks, order, out=out)

    def _micro(self, which: jax.Array) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, which[0], keepdims=False), self.batch)


# -- what each rank does by itself ---------------------------------------------------------------------------------------


def mapped(function: Callable[..., Any], args: tuple[Any, ...], like: Callable[..., Any], *, axes: int = 2) -> Any:
    """`sharding.on_each_device` inside a stage, which is mapped over that many axes (dp and pp in training): their parts are
    each device's own as well. (Left to `jax.vmap` they would be XLA's to split, which cuDNN's attention does not survive.)

    The backward pass begins with the forward one; what is kept is `args`.
    """
    leaves, tree = jax.tree.flatten(args)
    floats = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]

    def back(leaves: tuple[jax.Array, ...], grads: Any) -> Any:
        def of(*chosen: jax.Array) -> Any:
            some = iter(chosen)
            return function(*jax.tree.unflatten(tree, [next(some) if f else a for f, a in zip(floats, leaves, strict=True)]))

        return jax.vjp(of, *(a for f, a in zip(floats, leaves, strict=True) if f))[1](grads)

    @jax.custom_vjp
    def run(*leaves: jax.Array) -> Any:
        return _own(function, jax.tree.unflatten(tree, leaves), like, axes)

    def forward(*leaves: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        return jax.tree.map(lambda y: checkpoint_name(y, "attention"), run(*leaves)), leaves

    def backward(leaves: tuple[jax.Array, ...], grads: Any) -> tuple[jax.Array | None, ...]:
        of_floats = iter(
            _own(back, (leaves, grads), lambda leaves, _: tuple(a for f, a in zip(floats, leaves, strict=True) if f), axes)
        )
        return tuple(next(of_floats) if f else None for f in floats)

    run.defvjp(forward, backward)
    return run(*leaves)


def _own(function: Callable[..., Any], args: tuple[Any, ...], like: Callable[..., Any], axes: int) -> Any:
    """`function` in a region that is manual over every axis of the mesh, once all `axes` that are mapped over have come by."""

    @custom_vmap
    def run(*args: Any) -> Any:
        mesh = jax.typeof(jax.tree.leaves(args)[0]).sharding.mesh
        every = {} if axes else {"axis_names": set(mesh.axis_names)}
        region = jax.shard_map(
            function, mesh=mesh, in_specs=specs_of(args), out_specs=specs_of(like(*args)), check_vma=False, **every
        )
        return region(*args)

    @run.def_vmap
    def over(size: int, batched: Any, *args: Any) -> Any:
        assert all(jax.tree.leaves(batched))

        def part(*args: Any) -> Any:
            if jax.tree.leaves(args)[0].shape[0] > 1:  # another axis has yet to come
                return jax.vmap(function)(*args)
            return jax.tree.map(lambda y: y[None], function(*jax.tree.map(lambda a: a[0], args)))

        out = _own(part, args, like, axes - 1)
        return out, jax.tree.map(lambda _: True, out)

    return run(*args)


def locally(function: Callable[..., Any], *args: Any, out: Any) -> Any:
    """`function` of each device's own parts of `args`; out: the layouts of what it returns."""
    mesh = jax.typeof(jax.tree.leaves(args)[0]).sharding.mesh
    return jax.shard_map(function, mesh=mesh, in_specs=specs_of(args), out_specs=out, check_vma=False)(*args)


def after(x: jax.Array, other: jax.Array) -> jax.Array:
    """x; on CPUs only once `other` is there.

    XLA:CPU begins collectives that do not depend on one another in an order that may differ from device to device, and each
    blocks its thread: devices would wait for each other forever. A comparison that never holds makes x depend on the other.
    """
    if platform(jax.typeof(x).sharding.mesh) != "cpu":
        return x

    def local(x, other):
        one = other.ravel()[0]
        bits = one if one.dtype == jnp.int32 else jax.lax.bitcast_convert_type(one.astype(jnp.float32), jnp.int32)
        return jnp.where(bits == NEVER, jnp.zeros((), x.dtype), x)

    return locally(local, x, other, out=spec_of(x))


def _shift(x: jax.Array, by: int) -> jax.Array:
    """[d, P, ...]: each rank's part to the next rank (by=1) or the one before (-1), around."""
    ranks = x.shape[1]
    to = [(rank, (rank + by) % ranks) for rank in range(ranks)]
    return locally(lambda x: jax.lax.ppermute(x, "pp", to), x, out=spec_of(x))


def _from(x: jax.Array, rank: int) -> jax.Array:
    """[d, P, b, T, D]: that rank's part, on all of them: [B, T, D]."""
    batch, _, _, tokens, _ = spec_of(x).partitions

    def tell(x):
        return jax.lax.psum(jnp.where(jax.lax.axis_index("pp") == rank, x[0, 0], jnp.zeros((), x.dtype)), "pp")

    return locally(tell, x, out=PartitionSpec(batch, tokens, None))


def _micros(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def _picked(beside: Any, order: _Order) -> Any:
    """Of arrays [M, b, T] a rank's microbatch, [1, 1, b, T]."""
    return jax.tree.map(lambda a: a[order.micro[0]][None, None], beside)


def _apart(a: jax.Array) -> PartitionSpec:
    """The layout of `_picked` parts of an array [M, B, T]."""
    return PartitionSpec("dp", "pp", None, spec_of(a).partitions[2])


def spec_of(a: jax.Array) -> PartitionSpec:
    """The layout that its type says."""
    return jax.typeof(a).sharding.spec


def _dual(w: jax.Array) -> PartitionSpec:
    """The layout of w's gradient."""
    return PartitionSpec(*spec_of(w).partitions, unreduced=spec_of(w).reduced)
