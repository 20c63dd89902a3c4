"""The products of a mixture of experts, on one device's own experts: each token goes through those that its router chose.

N tokens, k chosen experts of each, P = N·k pairs of both; E experts that are here, D embed, F width of an expert. Kernels are
gate_up [E, F, 2, D] and down [E, D, F]. Experts count from the first that is here: a pair whose number is below 0, or E and
above, is another device's, and adds nothing.

No function here communicates, and no token is dropped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtp.ops.grouped import grouped
from jaxtp.ops.quantized import Quantized, levels, product
from jaxtp.ops.swiglu import gated
from jaxtp.sharding import varying_as

# chosen: the experts of each pair, read where they stand (few tokens); pairs: the same in a loop, for CPUs. every: all experts
# on all tokens, those not chosen with a weight of 0, which is as fast as reading all weights once. blocks: pairs sorted by
# expert, a block of them at a time; runs: all that an expert has at a time, on CPUs; batched: all experts at once, each with as
# many rows as the busiest has, on CPUs; both are blocks where gradients are wanted. grouped: the same in one kernel (Hopper
# GPUs). reference: the formula, in float32.
Products = Literal["reference", "chosen", "pairs", "every", "blocks", "runs", "batched", "grouped"]
Kernel = jax.Array | Quantized

FEW_TOKENS = 256  # on GPUs, the time of a step of so many is that of reading the weights
FEW_PAIRS = 8  # on CPUs, so many have hardly an expert twice


def choose_products(
    *, platform: str, tokens: int, pairs: int, experts: int, kernels: bool = False, override: Products | None = None
) -> Products:
    """Which form `tokens` tokens take, of `pairs` pairs with `experts` experts in all. kernels: whether `grouped` runs."""
    if override is not None:
        return override
    if platform == "gpu":
        if pairs < experts:
            return "chosen"
        if tokens <= FEW_TOKENS:
            return "every"
        return "grouped" if kernels else "blocks"
    if pairs < experts:  # many experts have none
        return "pairs" if pairs <= FEW_PAIRS else "runs"
    return "batched"


def mix(x: jax.Array, chosen: jax.Array, weights: jax.Array, gate_up: Kernel, down: Kernel, *, products: Products) -> jax.Array:
    """x [N, D], chosen and weights [N, k] -> [N, D]: the sum of each token's experts that are here, by weight."""
    return FORMS[products](x, chosen, weights, gate_up, down)


def _here(chosen: jax.Array, experts: int) -> jax.Array:
    return (chosen >= 0) & (chosen < experts)


def _plain(kernel: Kernel, dtype: jnp.dtype) -> jax.Array:
    return kernel.plain(dtype) if isinstance(kernel, Quantized) else kernel.astype(dtype)


def _apart(kernel: Kernel, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """A kernel [*O, I], and the scales [*O] that are to be multiplied with its product: of one in few bits, whose scales are of
    channels.
    """
    if isinstance(kernel, Quantized) and kernel.groups == 1 and kernel.shift is None:
        return levels(kernel, dtype), kernel.scale[..., 0]
    return _plain(kernel, dtype), None


def _part(kernel: Kernel, take: Callable[[jax.Array], jax.Array]) -> Kernel:
    """What `take` takes of its outputs."""
    return kernel.part(take) if isinstance(kernel, Quantized) else take(kernel)


# -- the formula -----------------------------------------------------------------------------------------------------------


def _reference(x: jax.Array, chosen: jax.Array, weights: jax.Array, gate_up: Kernel, down: Kernel) -> jax.Array:
    f32 = jnp.float32
    scaled = [_plain(kernel, f32) for kernel in (gate_up, down)]
    share = _shares(chosen, weights, len(scaled[0]))
    hidden = gated(jnp.einsum("nd,efcd->nefc", x.astype(f32), scaled[0]))
    return jnp.einsum("ne,nef,edf->nd", share, hidden, scaled[1]).astype(x.dtype)


def _shares(chosen: jax.Array, weights: jax.Array, experts: int) -> jax.Array:
    """[N, E]: the weight of every expert for every token, 0 where it was not chosen."""
    return jnp.where(chosen[..., None] == jnp.arange(experts), weights[..., None], 0.0).sum(axis=1)


# -- all experts -----------------------------------------------------------------------------------------------------------


def _every(x: jax.Array, chosen: jax.Array, weights: jax.Array, gate_up: Kernel, down: Kernel) -> jax.Array:
    """Two plain matrix products; the second sums within an expert first, so that `down` is read as it lies."""
    E, F, _, D = gate_up.shape
    if isinstance(gate_up, Quantized):
        y = product(x, gate_up)
    else:
        y = jnp.einsum("nd,od->no", x, gate_up.reshape(-1, D), preferred_element_type=jnp.float32)
    hidden = gated(y.reshape(-1, E, F, 2).astype(x.dtype)) * _shares(chosen, weights, E)[..., None].astype(x.dtype)
    values, scale = _apart(down, x.dtype)
    z = jnp.einsum("nef,edf->end", hidden, values, preferred_element_type=jnp.float32)
    return (z if scale is None else z * scale[:, None]).sum(axis=0).astype(x.dtype)


# -- the experts of each pair ----------------------------------------------------------------------------------------------


def _chosen(x: jax.Array, chosen: jax.Array, weights: jax.Array, gate_up: Kernel, down: Kernel) -> jax.Array:
    """Products as sums, into which XLA:GPU takes the choice of the kernels: none is copied. Pairs that are elsewhere all look
    at the same expert, which is read once.
    """
    f32, E = jnp.float32, gate_up.shape[0]
    here = _here(chosen, E)
    at = jnp.where(here, chosen, 0)
    (up, up_scale), (out, out_scale) = (_apart(_part(kernel, lambda a: a[at]), x.dtype) for kernel in (gate_up, down))
    y = (up.astype(f32) * x[:, None, None, None, :].astype(f32)).sum(axis=-1)
    y = y if up_scale is None else y * up_scale
    hidden = gated(y.astype(x.dtype)).astype(f32) * jnp.where(here, weights, 0.0)[..., None]
    z = (out.astype(f32) * hidden.astype(x.dtype)[:, :, None, :].astype(f32)).sum(axis=-1)
    return (z if out_scale is None else z * out_scale).sum(axis=1).astype(x.dtype)


def _one_by_one(x: jax.Array, chosen: jax.Array, weights: jax.Array, gate_up: Kernel, down: Kernel) -> jax.Array:
    """The same on CPUs, a pair at a time and a row of zeros with it: XLA gives two rows to all cores, one to one."""
    (N, k), E = chosen.shape, gate_up.shape[0]
    experts, share = chosen.reshape(-1), weights.reshape(-1)

    def pair(i: jax.Array, out: jax.Array) -> jax.Array:
        def add(out: jax.Array) -> jax.Array:
            rows = jnp.pad(jax.lax.dynamic_slice_in_dim(x, i // k, 1), ((0, 1), (0, 0)))
            z = _expert(rows, experts[i], gate_up, down)[0].astype(jnp.float32) * share[i]
            return out.at[i // k].add(z)

        return jax.lax.cond(_here(experts[i], E), add, lambda out: out, out)

    start = varying_as(jnp.zeros(x.shape, jnp.float32), x, chosen, weights, gate_up, down)
    return jax.lax.fori_loop(0, N * k, pair, start).astype(x.dtype)


def _expert(rows: jax.Array, expert: jax.Array, gate_up: Kernel, down: Kernel) -> jax.Array:
    """rows [R, D] through one expert: [R, D]."""
    y = _product(rows, gate_up, expert)
    return _product(gated(y.reshape(len(rows), -1, 2)), down, expert)


def _product(rows: jax.Array, kernel: Kernel, expert: jax.Array) -> jax.Array:
    """rows [R, I] times the expert's part of kernel [E, *O, I]: [R, O]. The part is a slice of rows of a matrix, which XLA
    reads in place; XLA:CPU is quicker with it on the left.
    """
    each = math.prod(kernel.shape[1:-1])

    def mine(a: jax.Array) -> jax.Array:
        a = a.reshape(-1, a.shape[-1])
        return jax.lax.dynamic_slice(a, (expert * each, jnp.zeros_like(expert)), (each, a.shape[-1]))

    values, scale = _apart(_part(kernel, mine), rows.dtype)
    y = jnp.einsum("oi,ri->or", values, rows, preferred_element_type=jnp.float32).T
    return (y if scale is None else y * scale).astype(rows.dtype)


# -- pairs sorted by expert ------------------------------------------------------------------------------------------------


def _by_expert(
    grouped: Callable[[jax.Array, Kernel, jax.Array], jax.Array],
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate_up: Kernel,
    down: Kernel,
) -> jax.Array:
    """grouped(rows [R, I], kernel [E, *O, I], sizes [E]) -> [R, O]: rows of one expert after another, so many of each."""
    (N, k), E = chosen.shape, gate_up.shape[0]
    order, place, sizes = _sorted(chosen, E)
    held = len(order)
    here = (jnp.arange(held) < sizes.sum())[:, None]

    def only(z: jax.Array) -> jax.Array:
        return jnp.where(here, z, jnp.zeros((), z.dtype))

    y = only(grouped(sorted_rows(x, order, place, k), gate_up, sizes))
    z = only(grouped(gated(y.reshape(held, -1, 2)), down, sizes))
    z = unsorted_rows(z, order, place).reshape(N, k, -1).astype(jnp.float32)
    return (z * weights[..., None]).sum(axis=1).astype(x.dtype)


def _sorted(chosen: jax.Array, E: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs by expert, as many as may be here: (order, their numbers; place of each pair in it; sizes [E], of each expert)."""
    N, k = chosen.shape
    flat = jnp.where(_here(chosen, E), chosen, E).reshape(-1)
    order = jnp.argsort(flat, stable=True)  # pairs that are elsewhere come last
    sizes = (flat[:, None] == jnp.arange(E)).sum(axis=0, dtype=jnp.int32)
    return order[: N * min(k, E)], jnp.argsort(order), sizes  # no token has more experts here


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def sorted_rows(x: jax.Array, order: jax.Array, place: jax.Array, k: int) -> jax.Array:
    """The tokens of pairs in that order. Backward a choice of rows, too: a gather's own would add rows up one by one."""
    return x[order // k]


def _sorted_backward(k: int, kept: Any, grad: jax.Array) -> tuple[jax.Array, None, None]:
    order, place = kept
    return unsorted_rows(grad, order, place).reshape(-1, k, grad.shape[-1]).sum(axis=1), None, None


sorted_rows.defvjp(lambda x, order, place, k: (sorted_rows(x, order, place, k), (order, place)), _sorted_backward)


@jax.custom_vjp
def unsorted_rows(z: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """Rows of pairs in that order -> of all pairs, 0 for those that are not among them."""
    return jnp.where((place < len(z))[:, None], z[jnp.minimum(place, len(z) - 1)], jnp.zeros((), z.dtype))


unsorted_rows.defvjp(
    lambda z, order, place: (unsorted_rows(z, order, place), order), lambda order, grad: (grad[order], None, None)
)


# -- the grouped product in blocks of rows, and its gradients ----------------------------------------------------------------

FEWEST, MOST = 64, 512  # rows of a block


def block_rows(rows: int, experts: int) -> int:
    """Of `rows` rows of so many experts: about a quarter of what each has, a power of two, so that few of them are in vain."""
    return min(max(1 << max(rows // (4 * experts), 1).bit_length() - 1, FEWEST), MOST)


@jax.custom_vjp
def _in_blocks(rows: jax.Array, kernel: Kernel, sizes: jax.Array) -> jax.Array:
    """[R, O]. A block may reach into the next expert's rows, whose own blocks come later and write over it."""
    return _over_blocks(_product, rows, kernel, sizes, math.prod(kernel.shape[1:-1]))


def _in_blocks_backward(kept: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, kernel, sizes = kept
    width, size = rows.shape[-1], block_rows(len(rows), len(sizes))
    matrix, padded = kernel.reshape(len(kernel), -1, width), [_padded(a, size) for a in (grad, rows)]

    def to_rows(block: jax.Array, matrix: jax.Array, expert: jax.Array) -> jax.Array:
        mine = jax.lax.dynamic_index_in_dim(matrix, expert, keepdims=False)
        return jnp.einsum("ro,oi->ri", block, mine, preferred_element_type=jnp.float32).astype(rows.dtype)

    def to_kernel(total: jax.Array, at: jax.Array, expert: jax.Array, own: jax.Array) -> jax.Array:
        mine, theirs = (_block(a, at, size) for a in padded)
        mine = jnp.where(own[:, None], mine, jnp.zeros((), mine.dtype))
        return total.at[expert].add(jnp.einsum("ro,ri->oi", mine, theirs, preferred_element_type=jnp.float32))

    total = _each_block(to_kernel, size, sizes, varying_as(jnp.zeros(matrix.shape, jnp.float32), rows, grad))
    return _over_blocks(to_rows, grad, matrix, sizes, width), total.reshape(kernel.shape).astype(kernel.dtype), None


_in_blocks.defvjp(lambda rows, kernel, sizes: (_in_blocks(rows, kernel, sizes), (rows, kernel, sizes)), _in_blocks_backward)


def _over_blocks(
    function: Callable[..., jax.Array], rows: jax.Array, kernel: Kernel, sizes: jax.Array, width: int
) -> jax.Array:
    """function(block [size, I], kernel, expert) -> [size, width], of every block: [R, width]."""
    size = block_rows(len(rows), len(sizes))
    padded = _padded(rows, size)

    def put(out: jax.Array, at: jax.Array, expert: jax.Array, own: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(out, function(_block(padded, at, size), kernel, expert), (at, jnp.zeros_like(at)))

    out = _each_block(put, size, sizes, varying_as(jnp.zeros((len(padded), width), rows.dtype), rows, kernel))
    return out[: len(rows)]


def _each_block(body: Callable[..., jax.Array], size: int, sizes: jax.Array, start: jax.Array) -> jax.Array:
    """body(carry, first row, expert, own [size]: which rows are the expert's) of every block, expert by expert."""
    blocks = -(-sizes // size)
    ends, first = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes

    def step(i: jax.Array, carry: jax.Array) -> jax.Array:
        expert = (ends <= i).sum(dtype=jnp.int32)
        at = first[expert] + (i - (ends - blocks)[expert]) * size
        return body(carry, at, expert, at + jnp.arange(size) < first[expert] + sizes[expert])

    return jax.lax.fori_loop(jnp.int32(0), ends[-1].astype(jnp.int32), step, start)


def _padded(rows: jax.Array, size: int) -> jax.Array:
    return jnp.pad(rows, ((0, size), (0, 0)))


def _block(rows: jax.Array, at: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice(rows, (at, jnp.zeros_like(at)), (size, rows.shape[1]))


# -- all rows of an expert at a time ---------------------------------------------------------------------------------------

HEIGHTS = 2, 8, 32, 64, 96, 128  # that products come in; more rows take several


@jax.custom_vjp
def _in_runs(x: jax.Array, chosen: jax.Array, weights: jax.Array, gate_up: Kernel, down: Kernel) -> jax.Array:
    """A run is padded to the next height, and goes through both products while it is in the processor's cache. What is padding
    in one, the runs of the experts after it write over.
    """
    (N, k), E = chosen.shape, gate_up.shape[0]
    # several: outside of a branch, XLA:CPU takes three times as long for bfloat16
    heights = [height for i, height in enumerate(HEIGHTS) if i < 2 or HEIGHTS[i - 1] < N]
    most = heights[-1]
    order, place, sizes = _sorted(chosen, E)
    padded, share = jnp.pad(order, (0, most)), weights.reshape(-1)

    def run(height: int, at: jax.Array, expert: jax.Array) -> jax.Array:
        pairs = jax.lax.dynamic_slice(padded, (at,), (height,))
        z = _expert(x[pairs // k], expert, gate_up, down).astype(jnp.float32) * share[pairs][:, None]
        return jnp.pad(z, ((0, most - height), (0, 0)))

    def put(out: jax.Array, at: jax.Array, expert: jax.Array, own: jax.Array) -> jax.Array:
        size = own.sum(dtype=jnp.int32)
        height = sum((size > height).astype(jnp.int32) for height in heights[:-1])
        z = jax.lax.switch(height, [functools.partial(run, height) for height in heights], at, expert)
        return jax.lax.dynamic_update_slice(out, z, (at, jnp.zeros_like(at)))

    start = varying_as(jnp.zeros((len(padded), x.shape[1]), jnp.float32), x, chosen, weights, gate_up, down)
    z = _each_block(put, most, sizes, start)[jnp.minimum(place, len(order))]
    return jnp.where((place < sizes.sum())[:, None], z, 0.0).reshape(N, k, -1).sum(axis=1).astype(x.dtype)


def _blocks_forward(x: jax.Array, chosen: jax.Array, *rest: Any) -> tuple[jax.Array, Any]:
    return jax.vjp(lambda x, *rest: _by_expert(_in_blocks, x, chosen, *rest), x, *rest)


def _blocks_backward(backward: Any, grad: jax.Array) -> tuple[Any, ...]:
    to_rows, *others = backward(grad)
    return to_rows, None, *others


_in_runs.defvjp(_blocks_forward, _blocks_backward)

# -- all experts at once, with as many rows each -----------------------------------------------------------------------------

EVEN_HEIGHTS = 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512  # of which the busiest expert's rows take the next


@jax.custom_vjp
def _batched(x: jax.Array, chosen: jax.Array, weights: jax.Array, gate_up: Kernel, down: Kernel) -> jax.Array:
    """One product over all experts, which reads their kernels where they stand. (A loop over runs has each copied before it is
    multiplied, which takes twice as long where cores share no cache: BENCHMARKS.md.) Loads that would be mostly padding go as
    runs, and so do kernels in few bits, which are converted one by one.
    """
    (N, k), E = chosen.shape, gate_up.shape[0]
    mean = N * k // E  # or less, where other devices have other experts
    heights = [height for height in EVEN_HEIGHTS if mean <= height <= max(16, 2 * mean)]
    if isinstance(gate_up, Quantized) or 2 * mean > EVEN_HEIGHTS[-1]:  # (of so many rows a copy is a small part)
        return _in_runs(x, chosen, weights, gate_up, down)
    order, place, sizes = _sorted(chosen, E)
    first, padded = jnp.cumsum(sizes) - sizes, jnp.pad(order, (0, heights[-1]))
    here, expert = _here(chosen, E).reshape(-1, 1), jnp.clip(chosen.reshape(-1), 0, E - 1)

    def even(height: int) -> jax.Array:
        rows = x[padded[first[:, None] + jnp.arange(height)] // k]
        y = jnp.einsum("eod,ehd->eho", gate_up.reshape(E, -1, gate_up.shape[-1]), rows, preferred_element_type=jnp.float32)
        hidden = gated(y.astype(x.dtype).reshape(E, height, -1, 2))
        z = jnp.einsum("edf,ehf->ehd", down, hidden, preferred_element_type=jnp.float32).astype(x.dtype)
        own = z[expert, jnp.clip(place - first[expert], 0, height - 1)].astype(jnp.float32)
        return (jnp.where(here, own, 0.0) * weights.reshape(-1, 1)).reshape(N, k, -1).sum(axis=1).astype(x.dtype)

    forms = [functools.partial(even, height) for height in heights]
    uneven = functools.partial(_in_runs, x, chosen, weights, gate_up, down)
    return jax.lax.switch((sizes.max() > jnp.array(heights)).sum(), [*forms, uneven])


_batched.defvjp(_blocks_forward, _blocks_backward)

FORMS: dict[str, Callable[..., jax.Array]] = {
    "reference": _reference,
    "every": _every,
    "chosen": _chosen,
    "pairs": _one_by_one,
    "blocks": functools.partial(_by_expert, _in_blocks),
    "runs": _in_runs,
    "batched": _batched,
    "grouped": functools.partial(_by_expert, grouped),
}
