"""The router of a mixture of experts (https://arxiv.org/abs/1701.06538; Switch Transformer, https://arxiv.org/abs/2101.03961).

B batch, T tokens, E experts, k of them a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxtp.config import Experts
from jaxtp.sharding import Region


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """What a layer's router did, summed over the tokens of each row that count, float32.

    counts [B, E]: tokens that went to each expert. probabilities [B, E]: of the softmax over all experts. z [B]: the square of
    the logarithm of the softmax's denominator. entropy [B]: of the softmax, in nats. tokens [B]: how many tokens counted.
    dropped [B]: of their choices those beyond an expert's capacity.
    """

    counts: jax.Array
    probabilities: jax.Array
    z: jax.Array
    entropy: jax.Array
    tokens: jax.Array
    dropped: jax.Array


def route(
    logits: jax.Array, experts: Experts, capacity: float | None = None, *, region: Region | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(chosen [B, T, k] int32, their weights [B, T, k] float32, kept) from logits [B, T, E] float32; of equals the lower one.

    capacity: an expert takes the first ⌈capacity · T k / E⌉ of a row's tokens at most. kept [B, T, k] bool: which choices are
    among them; None without a capacity. region: on a mesh, that in which each device chooses for its own tokens (XLA would
    gather all logits for it).
    """
    p = jax.nn.softmax(logits, axis=-1)

    def best(p: jax.Array) -> jax.Array:
        return jax.lax.top_k(p, experts.per_token)[1]

    scores = jax.lax.stop_gradient(p)
    chosen = best(scores) if region is None else region(best, (scores,), lambda p: p)
    weights = jnp.where(chosen[..., None] == jnp.arange(p.shape[-1]), p[..., None, :], 0.0).sum(axis=-1)
    if experts.renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    if capacity is None:
        return chosen, weights, None
    (_, T, k), E = chosen.shape, experts.count
    hit = (chosen[..., None] == jnp.arange(E)).astype(jnp.int32)
    before = jnp.cumsum(hit.sum(axis=2), axis=1)  # of each expert, with this token (which chooses it once)
    place = (hit * before[:, :, None]).sum(axis=-1)
    kept = place <= math.ceil(capacity * T * k / E)
    return chosen, weights, kept


def watched(logits: jax.Array, chosen: jax.Array, counted: jax.Array | None, kept: jax.Array | None = None) -> Routing:
    """The sums over tokens of each row. counted [B, T] float32: the weight of each token, 0 or 1 (default: all count). kept: of
    `route`.
    """
    counted = jnp.ones(logits.shape[:2], jnp.float32) if counted is None else counted
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    log_p = logits - log_z
    p = jnp.exp(log_p)
    hit = (chosen[..., None] == jnp.arange(logits.shape[-1])).sum(axis=2).astype(jnp.float32)
    each, tokens = counted[..., None], counted.sum(axis=1)
    return Routing(
        counts=jax.lax.stop_gradient((hit * each).sum(axis=1)),
        probabilities=(p * each).sum(axis=1),
        z=(log_z[..., 0] ** 2 * counted).sum(axis=1),
        entropy=jax.lax.stop_gradient((-(p * log_p).sum(axis=-1) * counted).sum(axis=1)),
        tokens=tokens,
        dropped=jnp.zeros_like(tokens) if kept is None else ((~kept).sum(axis=-1, dtype=jnp.float32) * counted).sum(axis=1),
    )
