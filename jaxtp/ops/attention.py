"""Grouped-query attention, on one device or on that device's share of heads and rows.

B batch, T query tokens, S cached tokens, K KV heads, G query heads per KV head, H head_dim.
Queries are [B, T, K, G, H]; fresh keys and values [B, T, K, H]; those of a cache [B, K, S, H].

No function here communicates: attention splits by rows (dp) and by KV heads (tp).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtp.ops import flash
from jaxtp.ops.coded import Coded, Held, apart

# reference: the formula, all at once. xla: the same in blocks of queries, which leaves out what stands after a block (on a
# CPU 1.5 to 2 times faster than the XLA form of jax.nn.dot_product_attention). cudnn: flash attention on GPUs.
Kernel = Literal["reference", "xla", "cudnn"]
BLOCK, MAX_BLOCKS = 128, 8  # queries of a block at least, and blocks at most
NOTHING = -1e30  # in place of the logarithm of 0


def choose_kernel(
    *, platform: str, dtype: jnp.dtype, head_dim: int, softcap: float | None = None, override: Kernel | None = None
) -> Kernel:
    """Which kernel attends among fresh tokens (training and prefill).

    cuDNN's flash attention takes 16-bit types and head_dims that are multiples of 8 up to 128 on every GPU since Ampere, and
    knows no soft cap of scores; everything else is left to XLA. Raises ValueError where cuDNN is asked for in spite of a cap.
    """
    if override == "cudnn" and softcap is not None:
        raise ValueError("kernel='cudnn' has no soft cap of attention scores, which this model has; use xla, or leave it out")
    if override is not None:
        return override
    return "cudnn" if platform == "gpu" and cudnn_fits(dtype, head_dim, softcap) else "xla"


def cudnn_fits(dtype: jnp.dtype, head_dim: int, softcap: float | None) -> bool:
    """Whether cuDNN's attention computes such heads."""
    return jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128 and softcap is None


def attend_fresh(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    kernel: Kernel,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Causal attention among the tokens at hand: q [B, T, K, G, H], k and v [B, T, K, H] -> [B, T, K, G, H].

    A query sees itself and what stands before it: within `window` tokens and in its own segment (segment_ids [B, T])
    where these are given. Scores are scale · q·k (default 1/√H), and with a soft cap, which cuDNN has not, `capped`.
    """
    B, T, K, G, H = q.shape
    if kernel == "cudnn":
        same = None if segment_ids is None else segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        span = None if window is None else (window - 1, 0)
        heads = q.reshape(B, T, K * G, H)
        out = jax.nn.dot_product_attention(
            heads, k, v, mask=same, scale=scale, is_causal=True, local_window_size=span, implementation="cudnn"
        )
        return out.reshape(q.shape)
    block = T if kernel == "reference" else block_size(T)
    scoring = Scoring(H**-0.5 if scale is None else scale, softcap)
    return _blocked(q, k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids, block, window, scoring)


def attend_seen(
    q: jax.Array,
    k: Held,
    v: Held,
    seen: jax.Array,
    *,
    kernel: Kernel,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention where `seen` [B, T, S] says so: q [B, T, K, G, H], k and v [B, K, S, H] -> [B, T, K, G, H].

    A single token is a matter of reading keys and values once, which plain products do; more go through `kernel`. scale,
    softcap: as of `attend_fresh`.
    """
    B, T, K, G, H = q.shape
    if T == 1 or kernel != "cudnn":
        return _attend(q, k, v, seen, Scoring(H**-0.5 if scale is None else scale, softcap), dims="BTKGH")[0]
    plain = (a.plain(q.dtype) if isinstance(a, Coded) else a for a in (k, v))
    keys, values = (a.swapaxes(1, 2) for a in plain)
    heads = q.reshape(B, T, K * G, H)
    out = jax.nn.dot_product_attention(heads, keys, values, mask=seen[:, None], scale=scale, implementation="cudnn")
    return out.reshape(q.shape)


def attend_seen_part(
    q: jax.Array, k: Held, v: Held, seen: jax.Array, *, kernel: Kernel, scale: float, softcap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """The same where k and v are a part of all keys, of which a query may see none: also the logarithm of the softmax's
    denominator, [B, K, G, T, 1] float32, which is then `NOTHING`.
    """
    if q.shape[1] == 1 or kernel != "cudnn":
        return _attend(q, k, v, seen, Scoring(scale, softcap), dims="BTKGH", some=False)
    keys, values = ((a.plain(q.dtype) if isinstance(a, Coded) else a).swapaxes(1, 2) for a in (k, v))
    out, log_z = flash.attend_part(q, keys, values, scale=scale, seen=seen)
    some = seen.any(axis=-1)
    out = jnp.where(some[:, :, None, None, None], out, jnp.zeros((), out.dtype))
    return out, jnp.where(some[:, None, None, :, None], log_z, NOTHING)


def capped(x: jax.Array, softcap: float | None) -> jax.Array:
    """softcap · tanh(x / softcap): x where it is small, and never beyond the cap (Gemma 2, arXiv:2408.00118, §2); None: x."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def visible(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """Which positions of keys a query at its position sees."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


class Scoring(NamedTuple):
    """What makes scores of q·k."""

    scale: float
    softcap: float | None


def _attend(
    q: jax.Array, k: Held, v: Held, seen: jax.Array | None, scoring: Scoring, *, dims: str, some: bool = True
) -> tuple[jax.Array, jax.Array]:
    """softmax(scores)·v in float32 between the two products; k and v [B, K, S, H], seen [B, T, S] (None: all). Returns it in
    the dtype of q, [B, T, K, G, H], and the logarithm of the softmax's denominator, [B, K, G, T, 1] float32.

    dims: the order of q's. For a cache as it is in the decode loop ("BTKGH"), XLA:CPU copies the keys in the other order.
    some: every query sees some key; else the result of one that sees none is 0, and its logarithm NOTHING.
    """
    scores = _where(seen, _scores(q, k, scoring, dims=dims))
    top = scores.max(axis=-1, keepdims=True)
    top = top if some else jnp.maximum(top, NOTHING)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    total = total if some else jnp.where(total == 0, 1.0, total)
    # dividing by the sum comes last: T·H values instead of T·S
    v, of_weights = apart(v, q.dtype)
    weights = weights if of_weights is None else weights * of_weights[:, :, None, None]
    out = _product("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v) / total
    return jnp.einsum("BKGTH->BTKGH", out).astype(q.dtype), top + jnp.log(total)


def _scores(q: jax.Array, k: Held, scoring: Scoring, *, dims: str = "BKGTH") -> jax.Array:
    k, of_scores = apart(k, q.dtype)
    scores = _product(f"{dims},BKSH->BKGTS", q.astype(k.dtype), k) * scoring.scale
    return capped(scores if of_scores is None else scores * of_scores[:, :, None, None], scoring.softcap)


def _where(seen: jax.Array | None, scores: jax.Array) -> jax.Array:
    return scores if seen is None else jnp.where(seen[:, None, None], scores, -jnp.inf)


def _product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


# -- attention among fresh tokens in blocks of queries, and its gradient -----------------------------------------------
# As flash attention does (arXiv:2205.14135), the backward pass keeps the result and one number a query, the logarithm of the
# softmax's denominator (log_z), and computes the weights again from them. So a part of the keys has a result of its own and a
# log_z, those of several parts can be merged, and of the merged ones each part has its share of the gradients.


Block = tuple[slice, slice, jax.Array | None]  # queries, the keys that any sees, which one sees which [B or 1, block, keys]


def block_size(T: int) -> int:
    """Queries of a block, of so many."""
    return max(BLOCK, -(-T // MAX_BLOCKS))


def causal_blocks(T: int, block: int, window: int | None, segment_ids: jax.Array | None) -> Iterator[Block]:
    """Of queries and keys at the same T places: a block sees what stands up to its end."""
    place = jnp.arange(T)
    for start in range(0, T, block):
        stop = min(start + block, T)
        queries, keys = slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)
        seen = visible(place[queries, None], place[None, keys], window)[None]
        if segment_ids is not None:
            seen = seen & (segment_ids[:, queries, None] == segment_ids[:, None, keys])
        yield queries, keys, seen


def attend_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, blocks: Iterable[Block], scoring: Scoring, *, some: bool = True
) -> tuple[jax.Array, jax.Array]:
    """q [B, T, K, G, H], k and v [B, K, S, H] -> [B, T, K, G, H], and log_z [B, K, G, T, 1] float32. some: as of `_attend`."""
    heads = jnp.einsum("BTKGH->BKGTH", q)
    parts = [
        _attend(heads[:, :, :, queries], k[:, :, keys], v[:, :, keys], seen, scoring, dims="BKGTH", some=some)
        for queries, keys, seen in blocks
    ]
    return jnp.concatenate([part for part, _ in parts], axis=1), jnp.concatenate([part for _, part in parts], axis=3)


def gradients_of_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    log_z: jax.Array,
    grad: jax.Array,
    blocks: Iterable[Block],
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of q, in its dtype, and of k and v, in float32. out, log_z: of the whole attention, of which k and v may be a part."""
    S, dtype = k.shape[2], q.dtype
    q, grad, out = (jnp.einsum("BTKGH->BKGTH", a) for a in (q, grad, out))
    along = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    to_q, to_k, to_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for queries, keys, seen in blocks:
        asked, mine = q[:, :, :, queries], grad[:, :, :, queries]
        scores = _scores(asked, k[:, :, keys], scoring)
        weights = jnp.exp(_where(seen, scores) - log_z[:, :, :, queries])
        to_weights = _product("BKGTH,BKSH->BKGTS", mine, v[:, :, keys])
        to_scores = weights * (to_weights - along[:, :, :, queries]) * scoring.scale
        if scoring.softcap is not None:  # the slope of the cap: 1 - tanh²
            to_scores = to_scores * (1 - (scores / scoring.softcap) ** 2)
        to_scores = to_scores.astype(dtype)
        to_q.append(_product("BKGTS,BKSH->BKGTH", to_scores, k[:, :, keys]).astype(dtype))
        beyond = [(0, 0), (0, 0), (keys.start, S - keys.stop), (0, 0)]
        to_k = to_k + jnp.pad(_product("BKGTS,BKGTH->BKSH", to_scores, asked), beyond)
        to_v = to_v + jnp.pad(_product("BKGTS,BKGTH->BKSH", weights.astype(dtype), mine), beyond)
    return jnp.einsum("BKGTH->BTKGH", jnp.concatenate(to_q, axis=3)), to_k, to_v


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _blocked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    block: int,
    window: int | None,
    scoring: Scoring,
) -> jax.Array:
    """q [B, T, K, G, H], k and v [B, K, T, H] -> [B, T, K, G, H]."""
    return _blocked_forward(q, k, v, segment_ids, block, window, scoring)[0]


def _blocked_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    block: int,
    window: int | None,
    scoring: Scoring,
) -> tuple[jax.Array, Any]:
    out, log_z = attend_blocks(q, k, v, causal_blocks(q.shape[1], block, window, segment_ids), scoring)
    out, log_z = checkpoint_name(out, "attention"), checkpoint_name(log_z, "attention")  # what training may keep
    return out, (q, k, v, segment_ids, out, log_z)


def _blocked_backward(
    block: int, window: int | None, scoring: Scoring, kept: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segment_ids, out, log_z = kept
    blocks = causal_blocks(q.shape[1], block, window, segment_ids)
    to_q, to_k, to_v = gradients_of_blocks(q, k, v, out, log_z, grad, blocks, scoring)
    return to_q, to_k.astype(k.dtype), to_v.astype(v.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)
