"""The router of a mixture of experts (https://arxiv.org/abs/1701.06538; Switch Transformer, https://arxiv.org/abs/2101.03961).

B batch, T tokens, E experts, k of them a token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxtp.config import Experts


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["counts", "probabilities", "z", "entropy", "tokens"], meta_fields=[]
)
@dataclass(frozen=True)
class Routing:
    """What a layer's router did, summed over the tokens of each row that count, float32.

    counts [B, E]: tokens that went to each expert. probabilities [B, E]: of the softmax over all experts. z [B]: the square of
    the logarithm of the softmax's denominator. entropy [B]: of the softmax, in nats. tokens [B]: how many tokens counted.
    """

    counts: jax.Array
    probabilities: jax.Array
    z: jax.Array
    entropy: jax.Array
    tokens: jax.Array


def route(logits: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """(chosen [B, T, k] int32, their weights [B, T, k] float32) from logits [B, T, E] float32; of equals the lower number."""
    p = jax.nn.softmax(logits, axis=-1)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(p), experts.per_token)
    weights = jnp.where(chosen[..., None] == jnp.arange(p.shape[-1]), p[..., None, :], 0.0).sum(axis=-1)
    if experts.renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return chosen, weights


def watched(logits: jax.Array, chosen: jax.Array, counted: jax.Array | None) -> Routing:
    """The sums over tokens of each row. counted [B, T] float32: the weight of each token, 0 or 1 (default: all count)."""
    counted = jnp.ones(logits.shape[:2], jnp.float32) if counted is None else counted
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    log_p = logits - log_z
    p = jnp.exp(log_p)
    hit = (chosen[..., None] == jnp.arange(logits.shape[-1])).sum(axis=2).astype(jnp.float32)
    each = counted[..., None]
    return Routing(
        counts=jax.lax.stop_gradient((hit * each).sum(axis=1)),
        probabilities=(p * each).sum(axis=1),
        z=(log_z[..., 0] ** 2 * counted).sum(axis=1),
        entropy=jax.lax.stop_gradient((-(p * log_p).sum(axis=-1) * counted).sum(axis=1)),
        tokens=counted.sum(axis=1),
    )
