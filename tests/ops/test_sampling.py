"""Sampling against plain numpy, the same on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtp import make_mesh
from jaxtp.ops.sampling import Counts, Features, Rows, sample

V = 64
OFF = {
    "temperature": (jnp.float32, 1.0),
    "top_k": (jnp.int32, 0),
    "top_p": (jnp.float32, 1.0),
    "min_p": (jnp.float32, 0.0),
    "repetition": (jnp.float32, 1.0),
    "presence": (jnp.float32, 0.0),
    "frequency": (jnp.float32, 0.0),
    "min_tokens": (jnp.int32, 0),
    "max_tokens": (jnp.int32, 100),
}


def rows(count: int, **values) -> Rows:
    fields = {name: jnp.broadcast_to(jnp.asarray(values.pop(name, off), dtype), count) for name, (dtype, off) in OFF.items()}
    fields["seed"] = jnp.stack([jnp.arange(count, dtype=jnp.uint32), jnp.zeros(count, jnp.uint32)], axis=1)
    fields["bias_ids"] = jnp.full((count, 2), -1, jnp.int32)
    fields["bias"] = jnp.zeros((count, 2), jnp.float32)
    fields["stop_ids"] = jnp.full((count, 1), -1, jnp.int32)
    return Rows(**{**fields, **values})


def draw(logits, wanted: Rows, *, produced=0, counts=None, vocab_size=V, **how):
    step = jnp.full(len(logits), produced, jnp.int32)
    return sample(jnp.asarray(logits, jnp.float32), wanted, counts, step, vocab_size=vocab_size, **how)


def kept(logits: np.ndarray, wanted: Rows, **features) -> list[set[int]]:
    """The tokens that many draws of each row give."""
    found: list[set[int]] = [set() for _ in logits]
    run = jax.jit(
        lambda n: sample(jnp.asarray(logits), wanted, None, n, features=Features(random=True, **features), vocab_size=V)[0]
    )
    for n in range(400):
        for row, token in enumerate(np.asarray(run(jnp.full(len(logits), n, jnp.int32)))):
            found[row].add(int(token))
    return found


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 1, (4, V)).astype(np.float32)


@pytest.mark.parametrize("by_maximum", [False, True])
def test_greedy_takes_the_lowest_of_equal_ids(by_maximum):
    """Where there is nothing but NaN, any id that is one."""
    tied = np.zeros((4, V), np.float32)
    tied[0, [7, 9, 63]] = 5
    tied[2, :-1], tied[3] = -np.inf, np.nan
    token, _ = draw(tied, rows(4, temperature=0.0), features=Features(), by_maximum=by_maximum)
    assert token.tolist() == [7, 0, V - 1, 0]


def test_top_k(logits):
    for row, tokens in enumerate(kept(logits, rows(4, top_k=np.array([1, 2, 3, 5])), truncate=True)):
        assert tokens == set(np.argsort(-logits[row])[: [1, 2, 3, 5][row]].tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_it(logits):
    shares = np.array([0.05, 0.3, 0.5, 0.25], np.float32)
    for row, tokens in enumerate(kept(logits * 2, rows(4, top_p=shares), truncate=True)):
        mass = np.exp(2 * logits[row].astype(np.float64))
        order = np.argsort(-mass)
        count = int(np.searchsorted(np.cumsum(mass[order]) / mass.sum(), shares[row])) + 1
        assert tokens <= set(order[:count].tolist())
        assert len(tokens) >= count - 1  # the rarest of them may not come up


def test_min_p(logits):
    for row, tokens in enumerate(kept(logits, rows(4, min_p=0.4), min_p=True)):
        assert tokens == set(np.flatnonzero(logits[row] >= logits[row].max() + np.log(0.4)).tolist())


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    many = np.repeat(logits, 4000, axis=0)
    token, _ = draw(many, rows(4000), features=Features(random=True), vocab_size=4)
    shares = np.bincount(np.asarray(token), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_temperature_sharpens():
    many = np.repeat(np.array([[1.0, 0.0]]), 4000, axis=0)
    for temperature in (0.5, 2.0):
        token, _ = draw(many, rows(4000, temperature=temperature), features=Features(random=True), vocab_size=2)
        expected = 1 / (1 + np.exp(-1 / temperature))
        assert np.mean(np.asarray(token) == 0) == pytest.approx(expected, abs=0.03)


def test_greedy_rows_stay_greedy_among_random_ones(logits):
    token, _ = draw(logits, rows(4, temperature=np.array([0, 1, 0, 1])), features=Features(random=True))
    assert token[0] == logits[0].argmax()
    assert token[2] == logits[2].argmax()


def test_penalties(logits):
    prompt, output = np.zeros((4, V), bool), np.zeros((4, V), np.int32)
    prompt[:, 3], output[:, 5], output[:, 6] = True, 1, 3
    wanted = rows(4, temperature=0.0, repetition=1.5, presence=0.25, frequency=0.5)
    counts = Counts(jnp.asarray(prompt), jnp.asarray(output))
    token, _ = draw(logits, wanted, features=Features(penalties=True), counts=counts)
    expected = logits.copy()
    for i in (3, 5, 6):
        expected[:, i] = np.where(expected[:, i] > 0, expected[:, i] / 1.5, expected[:, i] * 1.5)
    expected[:, 5] -= 0.5 + 0.25
    expected[:, 6] -= 1.5 + 0.25
    assert token.tolist() == expected.argmax(axis=1).tolist()
    # and they can change the choice
    boosted = logits.copy()
    boosted[:, 6] = logits.max() + 0.5
    token, _ = draw(boosted, wanted, features=Features(penalties=True), counts=counts)
    assert 6 not in token.tolist()


def test_bias_adds_and_forbids(logits):
    wanted = rows(4, temperature=0.0)
    best = logits.argmax(axis=1)
    ids = np.stack([best, np.full(4, 11)], axis=1).astype(np.int32)
    wanted = dataclasses.replace(wanted, bias_ids=jnp.asarray(ids), bias=jnp.asarray([[-100.0, 50.0]] * 4, jnp.float32))
    token, _ = draw(logits, wanted, features=Features(bias=True))
    assert token.tolist() == [11] * 4


def test_min_tokens_forbids_the_stop_ids_until_then(logits):
    best = logits.argmax(axis=1).astype(np.int32)
    wanted = rows(4, temperature=0.0, min_tokens=3, stop_ids=jnp.asarray(best[:, None]))
    early, _ = draw(logits, wanted, features=Features(min_tokens=True), produced=2)
    late, _ = draw(logits, wanted, features=Features(min_tokens=True), produced=3)
    assert late.tolist() == best.tolist()
    assert all(a != b for a, b in zip(early.tolist(), best.tolist(), strict=True))


def test_logprobs_are_those_of_the_unfiltered_logits(logits):
    wanted = rows(4, top_k=2, temperature=3.0)
    token, found = draw(logits, wanted, features=Features(random=True, truncate=True, logprobs=3))
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    order = np.argsort(-logits, axis=1)
    np.testing.assert_array_equal(found.ids, order[:, :3])
    np.testing.assert_allclose(found.best, np.take_along_axis(expected, order[:, :3], 1), atol=1e-5)
    for row in range(4):
        assert found.chosen[row] == pytest.approx(expected[row, token[row]], abs=1e-5)
        assert found.rank[row] == order[row].tolist().index(int(token[row])) + 1


def test_padding_of_the_vocabulary_is_never_drawn():
    logits = np.zeros((4, V), np.float32)
    logits[:, 60:] = 100
    token, found = draw(logits, rows(4), features=Features(random=True, logprobs=2), vocab_size=60)
    assert max(token.tolist()) < 60
    assert np.asarray(found.ids).max() < 60


@pytest.mark.parametrize("sizes", [{"tp": 8}, {"dp": 2, "tp": 4}, {"dp": 4}], ids=str)
def test_the_same_on_every_mesh(logits, sizes):
    features = Features(random=True, truncate=True, min_p=True, logprobs=4)
    wanted = rows(4, top_k=20, top_p=0.9, min_p=0.01)
    step = jnp.arange(4, dtype=jnp.int32)

    def run(logits, wanted, step):
        return sample(logits, wanted, None, step, features=features, vocab_size=V)

    one = run(jnp.asarray(logits), wanted, step)
    mesh = make_mesh(**sizes)

    def put(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    spread = jax.tree.map(lambda a: put(a, "dp"), (wanted, step))
    auto = jax.sharding.auto_axes(run, out_sharding=jax.tree.map(lambda a: NamedSharding(mesh.abstract_mesh, P("dp")), one))
    many = jax.jit(auto)(put(logits, "dp", "tp"), *spread)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_noise_does_not_depend_on_the_padded_size(logits):
    features = Features(random=True)
    narrow, _ = draw(logits, rows(4), features=features)
    wide, _ = draw(np.pad(logits, ((0, 0), (0, 6))), rows(4), features=features)
    assert narrow.tolist() == wide.tolist()
