"""Few rows times a kernel of NF4's levels on GPUs: by a kernel in Pallas (Triton), which looks the levels up as it multiplies.

XLA takes nothing into a product that uses a value twice on its way, and a choice among 16 levels does: it would write the
weights in 16 bits at every step.

B rows, O outputs, I inputs, n groups of the inputs, P parts into which they are cut.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec

from jaxtp.sharding import specs_of

# NormalFloat's 16 levels (https://arxiv.org/abs/2305.14314, appendix E), the first of which is the value -8
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
ROWS = 256  # at most: what many rows are multiplied with may be written out
TILE_ROWS, TILE_OUTPUTS, TILE_BYTES = 128, 32, 128  # at most, of a product inside; a byte is two inputs
LEAST = 16  # rows, outputs and bytes of one
STEPS, PARTS = 4, 16  # products that a block of threads makes one after the other, if that does not take more parts than these


def fits(rows: jax.Array, values: jax.Array, scale: jax.Array) -> bool:
    """Whether there is such a kernel for what one device has of a product."""
    (B, _), (outputs, inputs), (_, n) = (jax.typeof(a).sharding.shard_shape(a.shape) for a in (rows, values, scale))
    group, step = inputs // n, _step(inputs)
    return (
        B <= ROWS
        and rows.dtype.itemsize == 2
        and math.gcd(outputs, TILE_OUTPUTS) >= LEAST
        and step >= LEAST
        and group % 2 == 0
        and step % (group // 2) == 0
    )


def product(rows: jax.Array, values: jax.Array, scale: jax.Array, *, rounded: Any = None, interpret: bool = False) -> jax.Array:
    """rows [B, I] in 16 bits, values [O, I] int4, scale [O, n] float32 -> [P, B, O] float32, whose sum over P is the product
    with scale · level, rounded as `rounded` (default: as rows) before it is multiplied. For what `fits`, on every device;
    devices that share the inputs share the parts.
    """

    def region(*args: jax.Array, stages: bool) -> jax.Array:
        def own(*args: jax.Array) -> jax.Array:
            return product_of_one(*args, rounded=rounded, interpret=interpret)

        mesh, specs = jax.typeof(args[0]).sharding.mesh, specs_of(args)
        (*stage, batch, summed), outer = specs[0].partitions, specs[1].partitions[-2]

        def of_stage(*args: jax.Array) -> jax.Array:
            return own(*(a[0] for a in args))[None]

        out = PartitionSpec(*stage, summed, batch, outer)
        return jax.shard_map(of_stage if stages else own, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*args)

    run = custom_vmap(functools.partial(region, stages=False))

    @run.def_vmap
    def of_stages(size: int, batched: Any, *args: jax.Array) -> tuple[jax.Array, bool]:  # left to vmap, XLA would gather them
        return region(*args, stages=True), True

    return run(rows, values, scale)


def product_of_one(
    rows: jax.Array, values: jax.Array, scale: jax.Array, *, rounded: Any = None, interpret: bool = False
) -> jax.Array:
    """`product` of one device's own arrays."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (B, inputs), outputs = rows.shape, len(values)
    group, step = inputs // scale.shape[-1], _step(inputs)
    P = _parts(inputs // 2 // step)
    part = inputs // 2 // P
    high, wide = min(max(LEAST, 1 << (B - 1).bit_length()), TILE_ROWS), math.gcd(outputs, TILE_OUTPUTS)
    pairs = jax.lax.bitcast_convert_type(values.astype(jnp.int4).reshape(outputs, -1, 2), jnp.uint8)
    call = pl.pallas_call(
        functools.partial(_tile, high=high, group=group // 2, step=step, rounded=rounded or rows.dtype),
        out_shape=jax.ShapeDtypeStruct((P, B, outputs), jnp.float32),
        grid=(outputs // wide, P, -(-B // high)),
        in_specs=[
            pl.BlockSpec((B, 2 * part), lambda o, i, b: (0, i)),
            pl.BlockSpec((wide, part), lambda o, i, b: (o, i)),
            pl.BlockSpec((wide, 2 * part // group), lambda o, i, b: (o, i)),
            pl.BlockSpec((len(LEVELS),), lambda o, i, b: (0,)),
        ],
        out_specs=pl.BlockSpec((None, high, wide), lambda o, i, b: (i, b, o)),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="nf4",
    )
    return call(rows, pairs, scale, jnp.asarray(np.roll(LEVELS, 8), jnp.float32))  # by the bits of a value: 0 … 7, -8 … -1


def _step(inputs: int) -> int:
    """How many bytes of a row a product inside takes."""
    return math.gcd(inputs // 2, TILE_BYTES) if inputs % 2 == 0 else 0


def _parts(steps: int) -> int:
    """In how many parts so many products inside are summed."""
    legal = [k for k in range(1, PARTS + 1) if steps % k == 0]
    return next((k for k in legal if steps // k <= STEPS), legal[-1])


def _tile(rows: Any, pairs: Any, scale: Any, levels: Any, out: Any, *, high: int, group: int, step: int, rounded: Any) -> None:
    """Of references to rows [B, 2 I'], pairs [O', I'], scale [O', n'] and the table: out [high, O'], as many of the rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    B, (wide, inputs) = len(rows), pairs.shape
    own = pl.program_id(2) * high + jnp.arange(high)[:, None]

    def add(i: Any, total: Any) -> Any:
        bits = pairs[:, pl.ds(i * step, step)].astype(jnp.int32)
        scales = scale[:, pl.ds(i * (step // group), step // group)][..., None]
        for first, numbers in enumerate((bits & 15, bits >> 4)):
            weights = (levels[numbers].reshape(wide, -1, group) * scales).reshape(wide, step)
            mine = rows[jnp.minimum(own, B - 1), 2 * (i * step + jnp.arange(step)[None]) + first]
            total += triton.dot(mine, weights.astype(rounded).astype(mine.dtype), trans_b=True)
        return total

    total = jax.lax.fori_loop(0, inputs // step, add, jnp.zeros((high, wide), jnp.float32))
    triton.store(out, total, mask=own < B)
