"""How the cache is read on a model's devices: one choice, made once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtp.buckets import PAGE
from jaxtp.log import logger
from jaxtp.mesh import platform
from jaxtp.model import Llama
from jaxtp.ops import pages as paged
from jaxtp.ops.attention import NOTHING
from jaxtp.ops.pages import Read, Share, attend_pages, attend_share


def choose_read(model: Llama) -> Read:
    """How the cache is read on the model's devices. GPUs that are only compiled for are taken at their word."""
    layout, config, stages = model.layout, model.config, bool(model.stacks)
    where, windows = platform(layout.mesh), any(config.windows)
    read = paged.choose_read(
        platform=where,
        dtype=layout.dtype,
        head_dim=config.head_dim,
        windows=windows,
        stages=stages,
        softcap=config.attention_softcap,
        bits=model.kv_cache_dtype,
    )
    if config.attention_softcap and where == "gpu":
        logger.info("attention scores have a soft cap, which cuDNN's kernels have not: XLA computes attention, in blocks")
    here = [device for device in layout.mesh.devices.flat if device in jax.local_devices()]
    if read == "cudnn" and here and not cudnn_reads(here[0], layout_of(model), ranks=layout.parts("cached")):
        return "gather" if stages else "slab"
    return read


def layout_of(model: Llama) -> tuple[str, int, int, int]:
    """What cuDNN is asked for: dtype, KV heads of a device, query heads of each, head_dim."""
    heads = model.empty_cache(model.layout.parts("batch"), model.layout.parts("cached")).layers[0][0]
    held = heads.sharding.shard_shape(heads.shape)[-3]
    return str(model.layout.dtype), held, model.config.num_heads // heads.shape[-3], model.config.head_dim


@functools.cache
def cudnn_reads(device: jax.Device, layout: tuple[str, int, int, int], *, ranks: int = 1) -> bool:
    """Whether cuDNN's attention over pages runs on this device and gives what the reference does: it is run once. ranks: of
    devices that have a share of the slots each; then the last one's share, and what it tells of the softmax.
    """
    dtype, K, G, H = layout
    rng, (B, N) = np.random.default_rng(0), (3, 4)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    q, keys, values = (draw(shape) for shape in ((B, 1, K, G, H), (B * N, K, PAGE, H), (B * N, K, PAGE, H)))
    table = rng.permutation(B * N).astype(np.int32).reshape(B, N)
    lengths = np.array([1, PAGE + 7, N * PAGE * ranks], np.int32)

    def run(q: jax.Array, keys: jax.Array, values: jax.Array, read: Read) -> jax.Array:
        q, keys, values = (a.astype(dtype) for a in (q, keys, values))
        places = jnp.asarray(table), jnp.asarray(lengths[:, None] - 1), jnp.asarray(lengths)
        how: Any = {"read": read, "reach": N * PAGE * ranks, "kernel": "xla"}
        if ranks == 1:
            return attend_pages(q, keys, values, *places, **how).astype(jnp.float32)
        out, log_z = attend_share(q, keys, values, *places, Share(ranks, jnp.int32(ranks - 1)), **how)
        both = jnp.concatenate([out.astype(jnp.float32), jnp.einsum("BKGTI->BTKGI", log_z)], axis=-1)
        return jnp.where(both[..., -1:] == NOTHING, 0.0, both)  # of a row that has nothing here

    found: dict[Read, np.ndarray] = {}
    reads: tuple[Read, ...] = "gather", "cudnn"
    try:
        with jax.default_device(device):
            for read in reads:
                found[read] = np.asarray(jax.jit(run, static_argnames="read")(q, keys, values, read=read))
    except Exception as error:  # whatever it is that the driver, cuDNN or this JAX do not know
        logger.warning("cuDNN does not read pages here: %s", str(error).splitlines()[0])
        return False
    worst = float(np.abs(found["gather"] - found["cudnn"]).max())
    if not worst < 0.02:  # 16-bit results around 1
        logger.warning("cuDNN reads pages wrongly here (off by %.3g); the cache is read otherwise", worst)
        return False
    return True
