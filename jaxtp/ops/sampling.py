"""Sampling, per row, on logits that may be sharded over the vocabulary: what crosses devices are sums and maxima of a row.

B batch rows, V vocabulary as held. The filters follow vLLM's definitions and order: bias and forbidden tokens, penalties,
temperature, min_p, top_k, top_p. Truncation is by threshold, so tokens that tie with the last one kept are kept too.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The sampling parameters of each row of a batch (arrays of length B unless said).

    temperature float32, 0 greedy; top_k int32, 0 off; top_p, min_p float32; repetition, presence, frequency float32;
    seed uint32 [B, 2]: the request's seed and the sample's number in it; bias_ids int32, bias float32 [B, N]: added to
    these logits (padding: id -1); stop_ids int32 [B, E] (padding: -1); min_tokens, max_tokens int32.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    seed: jax.Array
    bias_ids: jax.Array
    bias: jax.Array
    stop_ids: jax.Array
    min_tokens: jax.Array
    max_tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """How often each token stands in a row: in the prompt (bool [B, V]) and in what was generated (int32 [B, V])."""

    prompt: jax.Array
    output: jax.Array


@dataclass(frozen=True)
class Features:
    """What any row of the batch asks for; the rest is left out of the program.

    random: a temperature above 0; truncate: top_k or top_p; logprobs: how many alternatives (None: no logprobs at all).
    """

    random: bool = False
    min_p: bool = False
    truncate: bool = False
    penalties: bool = False
    bias: bool = False
    min_tokens: bool = False
    logprobs: int | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities before any filter: of the token taken [B], its rank (1 is best) [B], of the best k [B, k] and
    their ids [B, k].
    """

    chosen: jax.Array
    rank: jax.Array
    best: jax.Array
    ids: jax.Array


def sample(
    logits: jax.Array,
    rows: Rows,
    counts: Counts | None,
    produced: jax.Array,
    *,
    features: Features,
    vocab_size: int,
    by_maximum: bool = False,
) -> tuple[jax.Array, Logprobs | None]:
    """The next token of each row, int32 [B]; logits [B, V] float32, produced [B]: tokens generated so far. by_maximum: in a way
    that is quicker on CPUs, but where devices share the vocabulary would take them one message more.

    Greedy ties go to the lowest id. The noise of a token depends only on the row's seed, `produced` and the token's id.
    """
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    raw = jnp.where(ids < vocab_size, logits, -jnp.inf)
    scores = raw
    if features.bias:
        scores = scores + _scattered(rows.bias_ids, rows.bias, ids)
    if features.min_tokens:
        early = produced < rows.min_tokens
        stops = (rows.stop_ids[:, :, None] == ids).any(axis=1)
        scores = jnp.where(early[:, None] & stops, -jnp.inf, scores)
    if features.penalties:
        assert counts is not None
        scores = _penalised(scores, rows, counts)
    token = _best(scores, ids, by_maximum)
    if features.random:
        drawn = _best(_filtered(scores, rows, features) + _noise(rows.seed, produced, len(ids)), ids, by_maximum)
        token = jnp.where(rows.temperature > 0, drawn, token)
    return token, None if features.logprobs is None else _logprobs(raw, token, ids, features.logprobs)


def _best(scores: jax.Array, ids: jax.Array, by_maximum: bool) -> jax.Array:
    """The lowest id of the largest score of each row, int32 [B]. XLA:CPU takes seven times as long for an argmax as for a
    maximum, and then a minimum.
    """
    if not by_maximum:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    largest = scores >= scores.max(axis=-1, keepdims=True)
    return jnp.where(largest, ids, len(ids)).min(axis=-1) % len(ids)  # (of NaN alone, 0)


def _penalised(scores: jax.Array, rows: Rows, counts: Counts) -> jax.Array:
    """Repetition over prompt and output (CTRL, https://arxiv.org/abs/1909.05858), frequency and presence over output."""
    repetition = jnp.where(counts.prompt | (counts.output > 0), rows.repetition[:, None], 1.0)
    scores = jnp.where(scores > 0, scores / repetition, scores * repetition)
    scores = scores - rows.frequency[:, None] * counts.output.astype(jnp.float32)
    return scores - rows.presence[:, None] * (counts.output > 0).astype(jnp.float32)


def _filtered(scores: jax.Array, rows: Rows, features: Features) -> jax.Array:
    """Scores at the row's temperature, -inf where a filter drops the token."""
    scores = scores / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    if features.min_p:
        floor = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(rows.min_p)[:, None]
        scores = jnp.where(scores < floor, -jnp.inf, scores)
    if features.truncate:
        keys = _sortable(scores)
        wanted = jnp.where(rows.top_k > 0, rows.top_k, scores.shape[-1]).astype(jnp.float32)
        kept = keys >= _threshold(keys, jnp.ones_like(scores), wanted)[:, None]
        scores = jnp.where(kept, scores, -jnp.inf)
        mass = jax.nn.softmax(scores, axis=-1)
        kept = keys >= _threshold(keys, mass, rows.top_p)[:, None]
        scores = jnp.where(kept | (rows.top_p >= 1.0)[:, None], scores, -jnp.inf)
    return scores


def _noise(seed: jax.Array, produced: jax.Array, size: int) -> jax.Array:
    """Gumbel noise [B, V]: the argmax of scores + noise is a draw from softmax(scores)."""

    def row(seed: jax.Array, produced: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), produced)
        return jax.random.gumbel(key, (size,))

    return jax.vmap(row)(seed, produced)


def _sortable(x: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))


def _threshold(keys: jax.Array, weight: jax.Array, target: jax.Array) -> jax.Array:
    """The largest t [B] such that the weights of all keys >= t sum to at least `target` [B] (0 where none does).

    A search from the highest bits down, four at a time: eight passes over the row, and eight small sums over the devices
    that share it, where a sort would gather the row.
    """
    digits = jnp.arange(1, 16, dtype=jnp.uint32)

    def narrow(i: jax.Array, found: jax.Array) -> jax.Array:
        shift = (28 - 4 * i).astype(jnp.uint32)
        candidates = found[:, None] | (digits << shift)
        sums = jnp.where(keys[:, None, :] >= candidates[:, :, None], weight[:, None, :], 0.0).sum(axis=-1)
        digit = (sums >= target[:, None]).sum(axis=-1).astype(jnp.uint32)
        return found | (digit << shift)

    return jax.lax.fori_loop(0, 8, narrow, jnp.zeros(keys.shape[0], jnp.uint32))


def _scattered(ids: jax.Array, values: jax.Array, vocab: jax.Array) -> jax.Array:
    """[B, V] with `values` [B, N] added up at `ids` [B, N], one at a time so that nothing of size N·V is made."""

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + jnp.where(ids[:, i, None] == vocab, values[:, i, None], 0.0)

    return jax.lax.fori_loop(0, ids.shape[1], add, jnp.zeros((ids.shape[0], vocab.shape[0]), jnp.float32))


def _logprobs(raw: jax.Array, token: jax.Array, ids: jax.Array, k: int) -> Logprobs:
    norm = jax.nn.logsumexp(raw, axis=-1)
    score = jnp.max(jnp.where(ids == token[:, None], raw, -jnp.inf), axis=-1)
    rank = (raw > score[:, None]).sum(axis=-1).astype(jnp.int32) + 1
    best, places = jax.lax.top_k(raw, max(k, 1))
    return Logprobs(score - norm, rank, (best - norm[:, None])[:, :k], places.astype(jnp.int32)[:, :k])
