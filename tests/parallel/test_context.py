"""Attention over cp, by each strategy and kernel, is attention on one device: values and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtp import Llama, Rules, make_mesh
from jaxtp.ops import flash
from jaxtp.ops.attention import attend_fresh, visible
from jaxtp.parallel.context import Context, choose_strategy
from jaxtp.sharding import on_each_device

LENGTH = 32


@functools.cache
def case(window, packed, softcap=None):
    """q, k, v, segment ids and a gradient; what one device makes of them: the result and gradients of q, k and v."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, LENGTH, 4, *rest, 8)).astype(np.float32) for rest in ((2,), (), ()))
    segments = np.array([[1] * 5 + [2] * 24 + [0] * 3, [1] * 16 + [2] * 8 + [3] * 8], np.int32) if packed else None
    grad = rng.standard_normal(q.shape).astype(np.float32)
    plain = functools.partial(attend_fresh, kernel="reference", window=window, softcap=softcap, segment_ids=segments)
    out, back = jax.vjp(plain, *map(jnp.asarray, (q, k, v)))
    return (q, k, v), segments, grad, [np.asarray(a) for a in (out, *back(jnp.asarray(grad)))]


def check(context, *, kernel="xla", window=None, packed=False, softcap=None):
    arrays, segments, grad, expected = case(window, packed, softcap)
    mesh, order = make_mesh(cp=context.size), context.order(LENGTH)

    def attend(q, k, v, segments):
        return context.attend(q, k, v, kernel=kernel, window=window, softcap=softcap, segment_ids=segments)

    def both(q, k, v, segments, grad):
        out, back = jax.vjp(lambda *qkv: on_each_device(attend, (*qkv, segments), lambda q, *_: q), q, k, v)
        return out, *back(grad)

    def put(a, spec):
        return None if a is None else jax.device_put(a[:, order], NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        own = [put(a, P(None, "cp")) for a in (*arrays, grad)]
        found = jax.jit(both)(*own[:3], put(segments, P()), own[3])
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(got), want[:, order], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "strategy"), [(2, "gathered"), (4, "gathered"), (4, "ring"), (2, "heads"), (4, "heads")])
def test_every_strategy(size, strategy):
    check(Context(size, strategy))


@pytest.mark.parametrize("strategy", ["gathered", "ring"])
def test_a_soft_cap_of_scores(strategy):
    check(Context(2, strategy), softcap=2.0)


WINDOWS = (1, 2, 5, 9, 20, LENGTH)  # chunks are of 4 and 8 tokens


@pytest.mark.parametrize(("size", "window"), [(4, w) for w in WINDOWS] + [(2, 5), (2, 9)])
@pytest.mark.parametrize("packed", [False, True])
def test_windows_and_documents(size, window, packed):
    check(Context(size, "gathered"), window=window, packed=packed)


@pytest.mark.parametrize("strategy", ["gathered", "heads"])
def test_documents(strategy):
    check(Context(4, strategy), packed=True)


# -- the same by cuDNN's calls, with the formula in their place -------------------------------------------------------


def scores_of(q, k, causal, window, keys, queries, seen):
    T, S = q.shape[1], k.shape[1]
    at, there = jnp.arange(T)[:, None], jnp.arange(S)[None]
    shown = jnp.ones((q.shape[0], T, S), bool)
    shown = shown & visible(at, there, window) if causal else shown
    shown = shown if keys is None else shown & (there < keys[:, None, None])
    shown = shown if queries is None else shown & (at < queries[:, None, None])
    return shown if seen is None else shown & seen


def part(q, k, v, *, scale, causal=False, window=None, queries=None, keys=None, seen=None):
    """As `flash.attend_part`; what means nothing is nonsense."""
    shown = scores_of(q, k, causal, window, keys, queries, seen)[:, None, None]
    scores = jnp.where(shown, jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * scale, -1e9)
    log_z = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", jnp.exp(scores - log_z), v)
    none = jnp.einsum("BKGTI->BTKGI", ~shown.any(axis=-1, keepdims=True) & jnp.ones_like(log_z, bool))
    return jnp.where(none, 1e3, out), log_z


def part_gradients(q, k, v, out, log_z, grad, *, scale, **asked):
    names = ("causal", "window", "keys", "queries", "seen")
    shown = scores_of(q, k, *({"causal": False, **asked}.get(name) for name in names))[:, None, None]
    weights = jnp.where(shown, jnp.exp(jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * scale - log_z), 0.0)
    to_weights = jnp.einsum("BTKGH,BSKH->BKGTS", grad, v)
    to_scores = weights * (to_weights - jnp.einsum("BTKG->BKGT", (grad * out).sum(axis=-1))[..., None]) * scale
    to_q = jnp.einsum("BKGTS,BSKH->BTKGH", to_scores, k)
    to_k, to_v = jnp.einsum("BKGTS,BTKGH->BSKH", to_scores, q), jnp.einsum("BKGTS,BTKGH->BSKH", weights, grad)
    keys = asked.get("keys")
    if keys is not None:
        beyond = (jnp.arange(k.shape[1]) >= keys[:, None])[:, :, None, None]
        to_k, to_v = (jnp.where(beyond, 1e3, a) for a in (to_k, to_v))
    return to_q, to_k, to_v


@pytest.fixture
def formula(monkeypatch):
    monkeypatch.setattr(flash, "attend_part", part)
    monkeypatch.setattr(flash, "gradients_of_part", part_gradients)


@pytest.mark.parametrize(("size", "window", "packed"), [*itertools.product((2, 4), (None, 5, 20), (False, True))])
def test_what_cudnn_is_asked_for(formula, size, window, packed):
    check(Context(size, "gathered"), kernel="cudnn", window=window, packed=packed)


def test_the_ring_by_cudnn(formula):
    check(Context(4, "ring"), kernel="cudnn")


# -- choices ----------------------------------------------------------------------------------------------------------


def test_the_strategy_that_sends_the_least():
    assert choose_strategy(cp=2, kv_heads=8, group=4) == "gathered"
    assert choose_strategy(cp=8, kv_heads=8, group=4) == "heads"
    assert choose_strategy(cp=4, kv_heads=32, group=1) == "heads"
    assert choose_strategy(cp=8, kv_heads=2, group=4) == "gathered"


def test_strategies_that_cannot_be():
    with pytest.raises(
        ValueError, match="'heads' gives each of cp=4 ranks whole KV heads, of which a device has 2; use gathered"
    ):
        choose_strategy(cp=4, kv_heads=2, group=1, override="heads")
    with pytest.raises(ValueError, match=r"'ring' knows nothing of rows of several documents.*use gathered or heads"):
        choose_strategy(cp=4, kv_heads=4, group=1, packed=True, override="ring")
    with pytest.raises(ValueError, match="'ring' knows nothing of a window of 7 tokens"):
        choose_strategy(cp=4, kv_heads=4, group=1, window=7, override="ring")
    with pytest.raises(ValueError, match="context_strategy='rings' is none of gathered, ring, heads"):
        Context(2, "rings")


def test_zigzag_gives_every_rank_the_same_work():
    """Pairs of a query and a key that it sees: those of the busiest rank over the mean, and of parts in the row's order."""
    for size in (2, 4, 8):
        for order, most in ((Context(size).order(4096), 1.0001), (np.arange(4096), 1.4)):
            work = (order + 1).reshape(size, -1).sum(axis=1)
            assert (work.max() / work.mean() <= most) == (most < 1.1)


# -- the model --------------------------------------------------------------------------------------------------------

MESHES = ({"cp": 2}, {"cp": 8}, {"dp": 2, "cp": 2, "tp": 2}, {"cp": 2, "tp": 4})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_logits_are_those_of_one_device(sizes):
    tokens = np.random.default_rng(0).integers(0, 128, (4, 37)).astype(np.int32)  # of a length that no cp divides
    segments = np.repeat([[1] * 20 + [2] * 17], 4, axis=0).astype(np.int32)
    config = tiny.config()
    alone = Llama.random(config, mesh=make_mesh(devices=jax.devices()[:1]))
    rules = Rules().sequence_parallel().context_parallel()
    model = Llama.random(config, mesh=make_mesh(**sizes), rules=rules, context=Context(sizes["cp"]))
    for of in (None, segments):
        np.testing.assert_allclose(np.asarray(model(tokens, None, of)), np.asarray(alone(tokens, None, of)), atol=1e-5, rtol=0)


def test_rules_without_a_context():
    with pytest.raises(ValueError, match=r"cut the tokens of a row into 2 parts.*context=parallel.context.Context\(2\)"):
        Llama(tiny.config(), mesh=make_mesh(cp=2), rules=Rules().context_parallel())
