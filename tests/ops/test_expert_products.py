"""Experts' products: every form is the formula, whatever the routing, in values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtp.config import Experts
from jaxtp.config.quantization import Scheme
from jaxtp.ops.experts import FORMS, block_rows, choose_products, mix
from jaxtp.ops.quantized import quantize
from jaxtp.ops.router import route, watched

E, F, D, K = 8, 12, 16, 3
HERE = [form for form in FORMS if form != "grouped"]  # which is for GPUs alone


def kernels():
    a, b = jax.random.split(jax.random.key(0))
    return 0.1 * jax.random.normal(a, (E, F, 2, D)), 0.1 * jax.random.normal(b, (E, D, F))


def routing(kind, tokens):
    """(chosen, weights): at random; all tokens on the same experts; on few, so that some get none; as seen from devices that
    hold later experts or none that was chosen.
    """
    logits = jax.random.normal(jax.random.key(1), (1, tokens, E))
    if kind == "one":
        logits = jnp.broadcast_to(logits[:, :1], logits.shape)
    if kind == "few":
        logits = logits.at[..., 4:].add(-100.0)
    chosen, weights, _ = route(logits, Experts(E, K, F, renormalize=True))
    return chosen[0] - {"later": 3, "elsewhere": E}.get(kind, 0), weights[0]


def in_float64(x, chosen, weights, gate_up, down):
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    out = np.zeros_like(x)
    for n, (row, experts) in enumerate(zip(x, np.asarray(chosen), strict=True)):
        for expert, weight in zip(experts, weights[n], strict=True):
            if 0 <= expert < E:
                gate, up = gate_up[expert, :, 0] @ row, gate_up[expert, :, 1] @ row
                out[n] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("tokens", [1, 5, 150])
@pytest.mark.parametrize("kind", ["random", "one", "few", "later", "elsewhere"])
@pytest.mark.parametrize("form", HERE)
def test_every_form_is_the_formula(form, kind, tokens):
    x = jax.random.normal(jax.random.key(2), (tokens, D))
    args = x, *routing(kind, tokens), *kernels()
    out = jax.jit(lambda *args: mix(*args, products=form))(*args)
    np.testing.assert_allclose(out, in_float64(*args), atol=2e-6)


MANY = 1500  # tokens, of which blocks are larger
GRADIENTS = [
    (form, kind, 150) for form in ("every", "chosen", "blocks", "runs", "batched") for kind in ("random", "one", "few", "later")
]


def test_blocks_grow_with_what_experts_get():
    """From 64 to 512 rows, about a quarter of an expert's."""
    asked = [(150 * K, E), (MANY * K, E), (2048, 32), (16384, 8), (10**6, 8)]
    assert [block_rows(*each) for each in asked] == [64, 128, 64, 512, 512]


@pytest.mark.parametrize(("form", "kind", "tokens"), [*GRADIENTS, ("blocks", "random", MANY), ("blocks", "few", MANY)])
def test_gradients(form, kind, tokens):
    x, (chosen, weights) = jax.random.normal(jax.random.key(2), (tokens, D)), routing(kind, tokens)

    def gradients(form):
        def loss(x, weights, gate_up, down):
            return (mix(x, chosen, weights, gate_up, down, products=form) ** 2).sum() * 150 / tokens

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(x, weights, *kernels())

    for mine, expected in zip(gradients(form), gradients("reference"), strict=True):
        np.testing.assert_allclose(mine, expected, atol=2e-5)


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", group=4), Scheme("int4", group=4, zeros=True)], ids=str)
@pytest.mark.parametrize("form", HERE)
def test_kernels_in_few_bits(form, scheme):
    x, gate_up, down = jax.random.normal(jax.random.key(2), (40, D)), *(quantize(kernel, scheme) for kernel in kernels())
    if scheme.zeros:
        gate_up, down = (
            dataclasses.replace(k, shift=0.1 * jnp.cos(jnp.arange(k.scale.size)).reshape(k.scale.shape))
            for k in (gate_up, down)
        )
    plain = [np.asarray(kernel.plain(jnp.float32), np.float64) for kernel in (gate_up, down)]
    args = x, *routing("random", 40)
    np.testing.assert_allclose(mix(*args, gate_up, down, products=form), in_float64(*args, *plain), atol=2e-6)


def test_the_router_of_a_tie_takes_the_lower_number():
    chosen, weights, _ = route(jnp.zeros((1, 2, E)), Experts(E, K, F))
    assert chosen.tolist() == [[[0, 1, 2]] * 2]
    np.testing.assert_allclose(weights, np.full((1, 2, K), 1 / E), rtol=1e-6)


def test_what_is_told_of_a_router():
    logits = jax.random.normal(jax.random.key(3), (2, 7, E))
    chosen, _, _ = route(logits, Experts(E, K, F))
    counted = jnp.ones((2, 7)).at[1, 4:].set(0)
    told, p = watched(logits, chosen, counted), np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    for row, tokens in enumerate((7, 4)):
        hits = np.bincount(np.asarray(chosen)[row, :tokens].ravel(), minlength=E)
        np.testing.assert_array_equal(told.counts[row], hits)
        np.testing.assert_allclose(told.probabilities[row], p[row, :tokens].sum(axis=0), rtol=1e-5)
        np.testing.assert_allclose(told.entropy[row], -(p[row, :tokens] * np.log(p[row, :tokens])).sum(), rtol=1e-5)
        z = np.log(np.exp(np.asarray(logits, np.float64)[row, :tokens]).sum(axis=-1))
        np.testing.assert_allclose(told.z[row], (z**2).sum(), rtol=1e-5)
        assert told.tokens[row] == tokens


def test_the_form_follows_the_tokens():
    def form(platform, tokens):
        return choose_products(platform=platform, tokens=tokens, pairs=8 * tokens, experts=128)

    assert [form("gpu", n) for n in (1, 15, 16, 256, 257)] == ["chosen", "chosen", "every", "every", "blocks"]
    assert [form("cpu", n) for n in (1, 2, 15, 16)] == ["pairs", "runs", "runs", "batched"]
