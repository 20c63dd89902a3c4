"""Tokens to the ranks of ep whose experts they chose, and what these make of them back; a token goes to a rank once at most.

Of a device: N tokens, k chosen experts of each; e ranks, which have as many experts each; S = N·min(k, e) rows, as many as can
leave; R = N·e rows, as many as can come; D embed. The table [e, e] says how many rows go from a rank (first dim) to another.

An all-gather shows every token to every rank. Here those travel that have business there, and the rest of R stays empty.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtp.mesh import platform
from jaxtp.ops.experts import FEW_TOKENS, sorted_rows, unsorted_rows
from jaxtp.parallel.regions import behind
from jaxtp.sharding import varying_as

Mix = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Send = Callable[..., jax.Array]
NOBODY = -1  # in place of an expert


def exchange(
    mix: Mix, x: jax.Array, chosen: jax.Array, weights: jax.Array, *, experts: int, mesh: Mesh, axis: str = "ep"
) -> jax.Array:
    """x [N, D], chosen and weights [N, k] -> [N, D]: what the experts of all ranks make of this device's tokens. In a region.

    mix(rows, chosen, weights) -> rows, on every rank with its own of all `experts`, counted from 0; what is not among them adds
    nothing. By XLA's ragged all-to-all, which is for GPUs; elsewhere each rank looks at all that leave and takes what is its
    own. Few tokens go to all ranks: for these a message is a matter of its latency.
    """
    (N, k), ranks = chosen.shape, jax.lax.axis_size(axis)
    each = experts // ranks
    if N * ranks <= FEW_TOKENS:
        return everywhere(mix, x, chosen, weights, experts=experts, mesh=mesh, axis=axis)
    own = chosen[:, None] - each * jnp.arange(ranks)[:, None]
    own = jnp.where((own >= 0) & (own < each), own, NOBODY)  # [N, e, k], as each rank counts
    goes = (own != NOBODY).any(axis=-1)
    order = jnp.argsort(jnp.where(goes, jnp.arange(ranks), ranks).reshape(-1), stable=True)  # by rank; what stays comes last
    place, order = jnp.argsort(order), order[: N * min(k, ranks)]
    table = jax.lax.all_gather(goes.sum(axis=0, dtype=jnp.int32), axis)
    come, left, ragged = N * ranks, len(order), platform(mesh) == "gpu"

    # choices and weights travel together, as numbers; one more, so that what stays empty is nobody's
    numbers = (own.reshape(-1, k)[order] - NOBODY).astype(weights.dtype)
    told = jnp.concatenate([numbers, sorted_rows(weights, order, place, ranks)], axis=1)
    there = functools.partial(_carried, size=come, left=left, forth=True, axis=axis, ragged=ragged)
    home = functools.partial(_carried, size=left, left=come, forth=False, axis=axis, ragged=ragged)
    rows, told = _in_turn(there, home, (sorted_rows(x, order, place, ranks), told), table, table)
    made = mix(rows, told[:, :k].astype(jnp.int32) + NOBODY, told[:, k:])
    (back,) = _in_turn(home, there, (made,), told, table)
    return unsorted_rows(back, order, place).reshape(N, ranks, -1).sum(axis=1, dtype=jnp.float32).astype(x.dtype)


def everywhere(
    mix: Mix, x: jax.Array, chosen: jax.Array, weights: jax.Array, *, experts: int, mesh: Mesh, axis: str = "ep"
) -> jax.Array:
    """The same, every token to every rank: an all-gather, and a reduce-scatter of what is made of them."""
    first = experts // jax.lax.axis_size(axis) * jax.lax.axis_index(axis)
    chosen = jax.lax.all_gather(chosen, axis, tiled=True)

    def show(a: jax.Array) -> jax.Array:
        return jax.lax.all_gather(a, axis, tiled=True)

    def add(a: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(a, axis, tiled=True)

    rows, weights = _in_turn(show, add, (x, weights), chosen)
    return _in_turn(add, show, (mix(rows, chosen - first, weights),), weights)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_turn(
    send: Send, back: Send, parts: tuple[jax.Array, ...], ready: jax.Array, *given: jax.Array
) -> tuple[jax.Array, ...]:
    """send(part, *given) of each; their gradients go `back`. On CPUs one after another, either way the first after `ready`: see
    `regions.after`.
    """
    sent = []
    for part in parts:
        sent.append(send(behind(part, ready), *given))
        ready = sent[-1]
    return tuple(sent)


def _in_turn_forward(send: Send, back: Send, parts: tuple[jax.Array, ...], *others: jax.Array) -> tuple[Any, Any]:
    return _in_turn(send, back, parts, *others), others


def _in_turn_backward(send: Send, back: Send, others: Any, grads: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    return _in_turn(back, send, grads, *others), *(None for _ in others)


_in_turn.defvjp(_in_turn_forward, _in_turn_backward)


def _carried(rows: jax.Array, table: jax.Array, *, size: int, left: int, forth: bool, axis: str, ragged: bool) -> jax.Array:
    """`left` rows in the order of the ranks that they go to -> [size, ...], those that came in the order of where from, and 0.
    forth: as the table says; else the same rows on their way back.
    """
    me = jax.lax.axis_index(axis)
    leave, come = _before(table, 1), _before(table, 0)  # where rows from one rank to another begin with the one, and there
    if not forth:
        table, leave, come = table.T, come.T, leave.T
    empty = varying_as(jnp.zeros((size, *rows.shape[1:]), rows.dtype), rows, table)
    if ragged:
        return jax.lax.ragged_all_to_all(rows, empty, leave[me], table[me], come[me], table[:, me], axis_name=axis)
    out, at = empty, jnp.arange(size)
    for rank, held in enumerate(jax.lax.all_gather(rows, axis)):
        past = at - come[rank, me]
        mine = ((past >= 0) & (past < table[rank, me])).reshape(-1, *[1] * (rows.ndim - 1))
        out = jnp.where(mine, held[jnp.clip(leave[rank, me] + past, 0, left - 1)], out)
    return out


def _before(table: jax.Array, dim: int) -> jax.Array:
    return jnp.cumsum(table, axis=dim) - table
