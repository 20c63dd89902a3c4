"""Cross-entropy over a vocabulary that is sharded over tp, in chunks of tokens: full logits never exist.

B batch, T tokens, D embed, V' vocabulary as held (padded to what the mesh divides).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtp.buckets import LOGITS_TOKENS, logits_chunk
from jaxtp.model.stacked import Params, Stacked
from jaxtp.sharding import Layout, mesh_of, spec_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of tokens to learn from, all [B, T].

    tokens, labels int32: what is seen, and what comes next. weights float32: how much each label counts, 0 for none.
    positions int32: within the document. segment_ids int32: attention stays within one; None where rows are not packed.
    """

    tokens: jax.Array
    labels: jax.Array
    weights: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None = None


@jax.named_scope("head")
def cross_entropy(
    stacked: Stacked, params: Params, x: jax.Array, batch: Batch, *, z_loss: float = 0.0, chunk: int = LOGITS_TOKENS
) -> tuple[jax.Array, jax.Array]:
    """(loss, nats) [B]: each row's sums of weight · (-log p(label) + z_loss · log² Z), and of the first term alone.

    x [B, T, D] comes from `Stacked.hidden`; Z is the softmax's denominator (the z-loss of PaLM, arXiv:2204.02311, §5).
    Everything is float32 from the logits on. The logits of a chunk are computed again in the backward pass.
    """
    layout = stacked.layout
    x, parts = layout.gather(x), layout.parts("tokens")
    each = x.shape[1] // parts
    size = logits_chunk(each, most=chunk)
    whole = functools.partial(_sums, stacked, params, z_loss=z_loss)
    if size == each:
        loss, nats = whole(x, batch.labels, batch.weights)
        return loss.sum(axis=1), nats.sum(axis=1)
    one = jax.checkpoint(whole, prevent_cse=False)
    own = [_by_part(a, layout) for a in (x, batch.labels, batch.weights)]

    def body(sums: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        def part(a: jax.Array, whole: jax.Array) -> jax.Array:
            a = jax.lax.dynamic_slice_in_dim(a, start, size, axis=2)
            return a.reshape(a.shape[0], parts * size, *a.shape[3:], out_sharding=jax.typeof(whole).sharding)

        new = one(*(part(a, whole) for a, whole in zip(own, (x, batch.labels, batch.weights), strict=True)))
        return (sums[0] + new[0], sums[1] + new[1]), None

    zero = jnp.zeros_like(own[2].sum(axis=2))  # (a slice of a single row would lose its place on the mesh)
    (loss, nats), _ = jax.lax.scan(body, (zero, zero), jnp.arange(0, each, size))
    return loss.sum(axis=1), nats.sum(axis=1)


def _sums(
    stacked: Stacked, params: Params, x: jax.Array, labels: jax.Array, weights: jax.Array, *, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """Of the tokens of each rank of cp: [B, parts]."""
    logits = stacked.whole(params).logits(x)
    ids = jnp.arange(logits.shape[-1])
    logits = jnp.where(ids < stacked.config.vocab_size, logits, -jnp.inf)
    # each device reduces its part of the vocabulary; three numbers a token cross devices, never the logits
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    log_z = top + jnp.log(jnp.exp(logits - top[..., None]).sum(axis=-1))
    label = jnp.where(ids == labels[..., None], logits, 0.0).sum(axis=-1)
    nats = weights * (log_z - label)
    loss = nats + z_loss * weights * log_z**2
    return _by_part(loss, stacked.layout).sum(axis=2), _by_part(nats, stacked.layout).sum(axis=2)


def _by_part(a: jax.Array, layout: Layout) -> jax.Array:
    """[B, T, ...] -> [B, parts, T / parts, ...], the parts over cp."""
    spec, parts = spec_of(a), layout.parts("tokens")
    apart = PartitionSpec(*spec.partitions[:2], None, *spec.partitions[2:], reduced=spec.reduced)
    laid = NamedSharding(mesh_of(a, layout.mesh), apart)
    return a.reshape(a.shape[0], parts, a.shape[1] // parts, *a.shape[2:], out_sharding=laid)
