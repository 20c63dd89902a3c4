"""An engine for a model: how many pages there are, how they are read, how large a step is."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxtp import buckets as sizes
from jaxtp.buckets import PAGE
from jaxtp.engine.buckets import Buckets
from jaxtp.engine.engine import Engine
from jaxtp.engine.programs import Programs
from jaxtp.engine.read import choose_read
from jaxtp.engine.work import Limits, Policy
from jaxtp.log import logger
from jaxtp.mesh import platform
from jaxtp.model import Llama
from jaxtp.ops.pages import Read
from jaxtp.text import Tokenizer


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
    groups, rope = model.layout.parts("batch"), model.config.rope
    read = read or choose_read(model)
    rows = -(-max_num_seqs // groups)
    size = page_tokens(model, read, max_model_len, page_size)
    width = -(-max_model_len // size)
    pages = min(cache_tokens // groups // size, rows * width)
    if read == "slab":
        rows = min(rows, pages)
    limits = Limits(
        groups=groups,
        rows=rows,
        pages=pages,
        size=size,
        chunk=chunk_tokens(model),
        tokens=-(-max_num_batched_tokens // groups) if max_num_batched_tokens else step_tokens(model),
        stages=model.stages,
        policy=policy,
        queue=max_num_queued,
        caching=prefix_caching and read != "slab",
        slab=read == "slab",
        turn=rope.original_max_position if rope.kind == "longrope" else None,
    )
    logger.info("the cache has %d pages of %d tokens, read by %s%s", pages * groups, size, read, _cached(limits))
    if moe := next((block.moe for block in model.layers if block.sparse), None):
        ep = model.layout.mesh.shape["ep"]
        forms = " and ".join(f"{moe.form(n * ep)} for {n}" for n in (rows, limits.tokens))
        logger.info("experts multiply by %s tokens of a group", forms)
    buckets = Buckets(limits, read, width, host_loops=platform(model.layout.mesh) == "gpu")
    return Engine(
        model, programs, limits, buckets=buckets, max_model_len=max_model_len, tokenizer=tokenizer, eos=eos,
        # on CPUs they take so long that whoever comes would wait for the step after the next
        prompts_first=platform(model.layout.mesh) == "cpu" and model.stages == 1,
    )  # fmt: skip


def page_tokens(model: Llama, read: Read, longest: int, size: int = PAGE) -> int:
    """Tokens of a page: of a slab a whole row's, `longest`. Over cp each rank has `size` slots of it, or an even number."""
    ranks = model.layout.parts("cached")
    if read != "slab":
        return size * ranks
    return longest if ranks == 1 else -(-longest // (2 * ranks)) * 2 * ranks


def chunk_tokens(model: Llama) -> int:
    """Tokens of a chunk of a prompt."""
    return sizes.chunk_tokens(platform(model.layout.mesh))


def step_tokens(model: Llama) -> int:
    """Tokens of a group in one step."""
    layout = model.layout
    each = model.config.hidden_size * jnp.dtype(layout.dtype).itemsize
    return sizes.step_tokens(platform(layout.mesh), token_bytes=each, shared=layout.parts("mlp") > 1)


def _cached(limits: Limits) -> str:
    return ", shared by texts that begin alike" if limits.caching else ""
