"""A schedule as arrays: what a compiled program reads of it, tick by tick."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp.parallel.schedules import Schedule


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Order:
    """What each rank does at each tick, all [ticks, P] int32: whether anything; with what, and where its input is kept."""

    busy: jax.Array
    micro: jax.Array
    chunk: jax.Array
    slot: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Orders:
    """A schedule as arrays. What passes the model's ends at each tick, all [ticks, 2] int32, a microbatch and whether there is
    one: `enters` the first stage's F, `leaves` the last stage's F, `turns` in the last stage's B, `returns` from the first's.
    """

    forward: Order
    backward: Order
    enters: jax.Array
    leaves: jax.Array
    turns: jax.Array
    returns: jax.Array

    @classmethod
    def of(cls, schedule: Schedule, mesh: jax.sharding.AbstractMesh) -> Orders:
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

        forward, backward = (Order(*(lay(a, PartitionSpec(None, "pp")) for a in way)) for way in orders)
        enters, leaves, returns, turns = (lay(end, PartitionSpec()) for way in ends for end in way)
        return cls(forward, backward, enters, leaves, turns, returns)

    def during(self, first: int, last: int) -> Orders:
        """Those ticks."""
        return jax.tree.map(lambda a: a[first:last], self)
