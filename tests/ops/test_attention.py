"""Attention with its own scale, a soft cap of scores, a window and documents: the formula's, in float64, in every form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtp.ops.attention import attend_fresh, choose_kernel
from jaxtp.ops.pages import attend_pages, choose_read

B, T, K, G, H, S = 2, 300, 2, 2, 8, 16
SCALE, CAP = 0.7, 2.0


def formula(q, k, v, seen, *, scale, softcap, grad=None):
    """q [B, T, K, G, H], k and v [B, S, K, H], seen [B, T, S]; with the result's gradient also those of q, k and v."""
    scores = np.einsum("btkgh,bskh->bkgts", q, k) * scale
    capped = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.where(seen[:, None, None], np.exp(capped), 0.0)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bkgts,bskh->btkgh", weights, v)
    if grad is None:
        return out
    to_weights = np.einsum("btkgh,bskh->bkgts", grad, v)
    to_scores = weights * (to_weights - (weights * to_weights).sum(axis=-1, keepdims=True)) * scale
    to_scores = to_scores if softcap is None else to_scores / np.cosh(scores / softcap) ** 2
    to_v = np.einsum("bkgts,btkgh->bskh", weights, grad)
    return out, np.einsum("bkgts,bskh->btkgh", to_scores, k), np.einsum("bkgts,btkgh->bskh", to_scores, q), to_v


def drawn(seed=0, tokens=T):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((B, tokens, K, G, H)), *(rng.standard_normal((B, T, K, H)) for _ in range(2))


def seen_by(positions, window):
    """positions [B, T]."""
    keys = np.arange(T)
    return (keys <= positions[..., None]) & (keys > positions[..., None] - (window or T))


OPTIONS = [(None, None, None), (SCALE, None, 40), (None, CAP, None), (SCALE, CAP, 40)]


@pytest.mark.parametrize(("scale", "softcap", "window"), OPTIONS)
@pytest.mark.parametrize("kernel", ["reference", "xla"])
def test_among_fresh_tokens_and_its_gradient(kernel, scale, softcap, window):
    q, k, v = drawn()
    documents = np.repeat(np.arange(3), T // 3)[None].repeat(B, axis=0)
    seen = seen_by(np.arange(T)[None].repeat(B, axis=0), window) & (documents[:, :, None] == documents[:, None])
    grad = np.random.default_rng(1).standard_normal(q.shape)
    exact = formula(q, k, v, seen, scale=scale or H**-0.5, softcap=softcap, grad=grad)

    def ours(q, k, v):
        return attend_fresh(
            q, k, v, kernel=kernel, window=window, scale=scale, softcap=softcap, segment_ids=jnp.asarray(documents, jnp.int32)
        )

    out, back = jax.vjp(ours, *(jnp.asarray(a, jnp.float32) for a in (q, k, v)))
    for found, expected in zip((out, *back(jnp.asarray(grad, jnp.float32))), exact, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scale", "softcap", "window"), OPTIONS)
@pytest.mark.parametrize("new", [1, 20])
@pytest.mark.parametrize("read", ["gather", "rows", "slab"])
def test_over_pages(read, new, scale, softcap, window):
    q, k, v = drawn(tokens=new)
    lengths = np.array([T, 150])
    positions = lengths[:, None] - new + np.arange(new)
    expected = formula(q, k, v, seen_by(positions, window), scale=scale or H**-0.5, softcap=softcap)
    # slot s of row b lies in a page of its own, or, of a slab, row b is page b
    size, each = (T, 1) if read == "slab" else (S, -(-T // S))
    table = np.arange(B * each).reshape(B, each)
    table = table if read == "slab" else np.random.default_rng(2).permutation(table.ravel()).reshape(B, each)
    pools = []
    for cached in (k, v):
        padded = np.pad(cached, ((0, 0), (0, each * size - T), (0, 0), (0, 0))).reshape(B, each, size, K, H)
        pool = np.zeros((B * each, K, size, H), np.float32)
        pool[table] = padded.swapaxes(2, 3)
        pools.append(jnp.asarray(pool))
    found = attend_pages(
        jnp.asarray(q, jnp.float32), *pools, *(jnp.asarray(a, jnp.int32) for a in (table, positions, lengths)),
        read=read, reach=T, kernel="xla", window=window, scale=scale, softcap=softcap,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_chunks_of_a_prompt_side_by_side_are_what_each_is_alone(window):
    """6 of one prompt, 1 of another, 5 of a third that begins within its pages, 4 of a fourth that come backwards; 1 of a
    fifth, which idle lanes follow.
    """
    rng, chunk, pages = np.random.default_rng(0), 8, 16
    lanes = [(0, i) for i in range(6)] + [(1, 3)] + [(2, i + 2) for i in range(5)] + [(3, i) for i in (7, 6, 5, 4)]
    lanes += [(4, i) for i in (2, 3, 4, 5)]
    table = rng.permutation(5 * pages).reshape(5, pages)[[row for row, _ in lanes]]
    positions = np.array([chunk * i + np.arange(chunk) for _, i in lanes])
    lengths = np.array([chunk * (i + 1) for _, i in lanes])
    lengths[-3:] = 0
    q = rng.normal(size=(len(lanes), chunk, K, G, H))
    pools = [jnp.asarray(rng.normal(size=(5 * pages, K, S, H)), jnp.float32) for _ in range(2)]

    @functools.partial(jax.jit, static_argnums=4)
    def attend(q, table, positions, lengths, window):
        options = {"read": "rows", "reach": pages * S, "kernel": "xla", "window": window}
        return attend_pages(q, *pools, table, positions, lengths, **options)

    args = [jnp.asarray(q, jnp.float32), *(jnp.asarray(a, jnp.int32) for a in (table, positions, lengths))]
    together = attend(*args, window)
    for lane in range(len(lanes) - 3):
        np.testing.assert_allclose(together[lane], attend(*(a[lane : lane + 1] for a in args), window)[0], atol=1e-6)


@pytest.mark.parametrize("window", [None, 20])
def test_rows_together_are_what_each_is_among_others(window):
    """6 rows of a token each, one of them idle; then the same among longer ones, in another order: bit by bit."""
    rng, pages = np.random.default_rng(0), 12
    pools = [jnp.asarray(rng.normal(size=(11 * pages, K, S, H)), jnp.float32) for _ in range(2)]
    tables = rng.permutation(11 * pages).reshape(11, pages)
    lengths = np.array([1, 190, 17, 0, 64, 33, 192, 192, 150, 0, 5])
    q = rng.normal(size=(11, 1, K, G, H))

    @jax.jit
    def attend(rows):
        positions = jnp.maximum(jnp.asarray(lengths)[rows] - 1, 0)[:, None]
        options = {"read": "rows", "reach": pages * S, "kernel": "xla", "window": window}
        args = jnp.asarray(tables)[rows], positions, jnp.asarray(lengths)[rows]
        return attend_pages(jnp.asarray(q, jnp.float32)[rows], *pools, *args, **options)

    few, many = np.arange(6), np.array([8, 5, 7, 4, 9, 2, 6, 1, 10, 0, 3])
    alone, among = attend(few), attend(many)
    for row in few[lengths[few] > 0]:
        np.testing.assert_array_equal(alone[row], among[list(many).index(row)])
        k, v = (np.asarray(pool, float)[tables[row]].swapaxes(1, 2).reshape(1, -1, K, H) for pool in pools)
        at = np.array([[lengths[row] - 1]])
        seen = (np.arange(pages * S) <= at[..., None]) & (np.arange(pages * S) > at[..., None] - (window or pages * S))
        expected = formula(q[row][None], k, v, seen, scale=H**-0.5, softcap=None)
        np.testing.assert_allclose(alone[row], expected[0], atol=2e-6)


def test_cudnn_is_not_chosen_for_a_soft_cap():
    fits = {"platform": "gpu", "dtype": jnp.bfloat16, "head_dim": 128}
    assert (choose_kernel(**fits), choose_kernel(**fits, softcap=50.0)) == ("cudnn", "xla")
    assert choose_kernel(**{**fits, "head_dim": 256}) == "xla"
    reads = {**fits, "windows": False, "stages": False}
    assert (choose_read(**reads), choose_read(**reads, softcap=50.0)) == ("cudnn", "slab")
    assert choose_read(**{**reads, "stages": True}, softcap=50.0) == "gather"
    with pytest.raises(ValueError, match="kernel='cudnn' has no soft cap of attention scores"):
        choose_kernel(**fits, softcap=50.0, override="cudnn")
