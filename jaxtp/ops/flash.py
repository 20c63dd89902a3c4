"""cuDNN's flash attention to a part of the keys, and that part's gradients: what `attention.attend_blocks` is on CPUs; and to
keys in pages.

JAX's public call neither differentiates log_z nor takes one, and wants as many pages as tables have places, which a pool that
rows share has not. So this goes to the primitives below it, which are imported when they are asked for.

B batch, T query tokens, S keys, K KV heads, G query heads per KV head, H head_dim.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp


def attend_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    queries: jax.Array | None = None,
    keys: jax.Array | None = None,
    seen: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """q [B, T, K, G, H], k and v [B, S, K, H] in 16 bits -> [B, T, K, G, H], and log_z [B, K, G, T, 1] float32.

    causal: query i sees the keys 0…i (the last `window` of them). keys [B]: only the first so many are seen, and with `queries`
    [B] only the first so many ask; what others give means nothing. seen [B, T, S]: a mask, which is read from memory.
    """
    B, T, K, G, H = q.shape
    arrays, static = _settings(q, k, scale, causal, window, queries, keys, seen)
    heads = q.reshape(B, T, K * G, H)
    out, log_z = _cudnn()._dot_product_attention_fwd_p.bind(heads, k, v, *arrays, **static, is_training=True)
    return out.reshape(q.shape), log_z.reshape(B, K, G, T, 1)


def gradients_of_part(
    q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, log_z: jax.Array, grad: jax.Array, **asked: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of q, k and v, in their dtype. out, log_z: of the whole attention, of which this is a part; asked: as `attend_part`."""
    B, T, K, G, H = q.shape
    settings = {"causal": False, "window": None, "queries": None, "keys": None, "seen": None, **asked}
    arrays, static = _settings(q, k, **settings)
    q, out, grad = (a.reshape(B, T, K * G, H) for a in (q, out, grad))
    log_z = log_z.reshape(B, K * G, T)
    to_q, to_k, to_v, *_ = _cudnn()._dot_product_attention_bwd_p.bind(q, k, v, *arrays, log_z, out, grad, **static)
    return to_q.reshape(B, T, K, G, H), to_k, to_v


def attend_paged(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    stats: bool = False,
) -> tuple[jax.Array, ...]:
    """One query a row, [B, 1, K, G, H], of pools [P, K, S, H] whose table [B, N] says where a row's pages are, to the first
    `lengths` [B] of them (a length of 0 gives something that means nothing). stats: and log_z [B, K, G, 1, 1].
    """
    B, _, K, G, H = q.shape
    layout = _cudnn().AttentionLayout.BNTH.value
    (*arrays, _, _), static = _settings(q, q, scale, False, None, None, jnp.maximum(lengths, 1), None)
    tables = table[:, None, :, None]
    found = _cudnn()._dot_product_attention_fwd_p.bind(
        q.reshape(B, K * G, 1, H), keys, values, *arrays, tables, tables, **{**static, "layout": layout}, is_training=stats
    )
    return (found[0].reshape(q.shape), *(log_z.reshape(B, K, G, 1, 1) for log_z in found[1:]))


def _cudnn() -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _settings(
    q: jax.Array,
    k: jax.Array,
    scale: float,
    causal: bool,
    window: int | None,
    queries: jax.Array | None,
    keys: jax.Array | None,
    seen: jax.Array | None,
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """What both primitives take beside q, k and v: arrays, and static settings."""
    cudnn, none = _cudnn(), jnp.zeros(0, q.dtype)
    padded, lengths = keys is not None, (none, none)
    if keys is not None:
        lengths = (jnp.full_like(keys, q.shape[1]) if queries is None else queries, keys)
    kinds = cudnn.MaskType
    plain, limited = (kinds.CAUSAL, kinds.PADDING_CAUSAL) if causal else (kinds.NO_MASK, kinds.PADDING)
    hidden = cudnn.get_large_negative_number(q.dtype)
    bias = none if seen is None else jnp.where(seen[:, None], jnp.zeros((), q.dtype), hidden)
    static = {
        "scale": scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (seen is not None, False),
        "mask_type": limited if padded else plain,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": window,
    }
    # newer JAX: what else may be done to scores, of which nothing is
    known = inspect.signature(cudnn._dot_product_attention_fwd_cuda_lowering).parameters
    static |= {name: None for name in ("score_mod_name", "score_mod_jaxpr") if name in known}
    return (bias, *lengths, none, none, none, none), static
