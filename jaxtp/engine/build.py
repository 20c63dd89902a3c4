"""An engine for a model: how many pages there are, how they are read, how large a step is."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxtp.engine.buckets import Buckets
from jaxtp.engine.engine import Engine
from jaxtp.engine.programs import Programs
from jaxtp.engine.scheduler import Limits, Policy
from jaxtp.log import logger
from jaxtp.mesh import platform
from jaxtp.model import Llama
from jaxtp.ops.pages import Read, attend_pages
from jaxtp.text import Tokenizer

PAGE = 64  # slots
ONE_SHOT_BYTES = 4 << 20  # the largest all-reduce that XLA:GPU does in one kernel of its own; beyond it calls NCCL
CHUNK = {"cpu": 32, "gpu": 128}
TOKENS = {"cpu": 512, "gpu": 2048}


def build(
    model: Llama,
    programs: Programs,
    *,
    cache_tokens: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int | None = None,
    page_size: int = PAGE,
    read: Read | None = None,
    policy: Policy = "fcfs",
    max_num_queued: int | None = None,
    prefix_caching: bool = True,
    tokenizer: Tokenizer | None = None,
    eos: Sequence[int] = (),
) -> Engine:
    """cache_tokens: that the pages of all groups may hold. max_num_batched_tokens: of a step, of all groups (default: what a
    step can have before it takes longer). read: how the cache is read (default: `choose_read`).
    """
    groups, where = model.layout.parts("batch"), platform(model.layout.mesh)
    read = read or choose_read(model)
    rows = -(-max_num_seqs // groups)
    size = max_model_len if read == "slab" else page_size
    width = -(-max_model_len // size)
    pages = min(cache_tokens // groups // size, rows * width)
    if read == "slab":
        rows = min(rows, pages)
    limits = Limits(
        groups=groups,
        rows=rows,
        pages=pages,
        size=size,
        chunk=CHUNK.get(where, 128),
        tokens=-(-max_num_batched_tokens // groups) if max_num_batched_tokens else step_tokens(model),
        stages=model.stages,
        policy=policy,
        queue=max_num_queued,
        caching=prefix_caching and read != "slab",
        slab=read == "slab",
    )
    logger.info("the cache has %d pages of %d tokens, read by %s%s", pages * groups, size, read, _cached(limits))
    buckets = Buckets(limits, read, width)
    return Engine(model, programs, limits, buckets=buckets, max_model_len=max_model_len, tokenizer=tokenizer, eos=eos)


def choose_read(model: Llama) -> Read:
    """How the cache is read on the model's devices."""
    mesh, config = model.layout.mesh, model.config
    if platform(mesh) == "cpu":
        return "rows"
    fits = jnp.dtype(model.layout.dtype).itemsize == 2 and config.head_dim % 8 == 0 and config.head_dim <= 128
    device = mesh.devices.flat[0]
    if fits and (device.process_index != jax.process_index() or _cudnn_reads(device, layout_of(model))):
        return "cudnn"
    return "gather" if model.stacks else "slab"


def layout_of(model: Llama) -> tuple[str, int, int, int]:
    """What cuDNN is asked for: dtype, KV heads of a device, query heads of each, head_dim."""
    heads = model.empty_cache(model.layout.parts("batch"), 1).layers[0][0]
    held = heads.sharding.shard_shape(heads.shape)[-3]
    return str(model.layout.dtype), held, model.config.num_heads // heads.shape[-3], model.config.head_dim


@functools.cache
def _cudnn_reads(device: jax.Device, layout: tuple[str, int, int, int]) -> bool:
    """Whether cuDNN's attention over pages runs on this device and gives what the reference does: it is run once."""
    dtype, K, G, H = layout
    rng, (B, N) = np.random.default_rng(0), (3, 4)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    q, keys, values = (draw(shape) for shape in ((B, 1, K, G, H), (B * N, K, PAGE, H), (B * N, K, PAGE, H)))
    table = rng.permutation(B * N).astype(np.int32).reshape(B, N)
    lengths = np.array([1, PAGE + 7, N * PAGE], np.int32)

    def run(q: jax.Array, keys: jax.Array, values: jax.Array, *, read: Read) -> jax.Array:
        q, keys, values = (a.astype(dtype) for a in (q, keys, values))
        return attend_pages(
            q, keys, values, table, lengths[:, None] - 1, lengths, read=read, reach=N * PAGE, kernel="xla"
        ).astype(jnp.float32)

    found = {}
    try:
        with jax.default_device(device):
            for read in ("gather", "cudnn"):
                found[read] = np.asarray(jax.jit(functools.partial(run, read=read))(q, keys, values))
    except Exception as error:  # whatever it is that the driver, cuDNN or this JAX do not know
        logger.warning("cuDNN does not read pages here: %s", str(error).splitlines()[0])
        return False
    worst = float(np.abs(found["gather"] - found["cudnn"]).max())
    if not worst < 0.02:  # 16-bit results around 1
        logger.warning("cuDNN reads pages wrongly here (off by %.3g); the cache is read otherwise", worst)
        return False
    return True


def step_tokens(model: Llama) -> int:
    """Tokens of a group in one step: on GPUs that share layers so many that what they send each other stays one kernel."""
    layout, where = model.layout, platform(model.layout.mesh)
    if where == "gpu" and layout.parts("mlp") > 1:
        return ONE_SHOT_BYTES // (model.config.hidden_size * jnp.dtype(layout.dtype).itemsize)
    return TOKENS.get(where, 2048)


def _cached(limits: Limits) -> str:
    return ", shared by texts that begin alike" if limits.caching else ""
