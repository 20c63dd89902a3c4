"""Training with rows in parts over cp is training on one device: losses, gradients, curves."""

import numpy as np
import pytest
import tiny
from runs import packed, rows, run

from jaxtp.config import Experts
from jaxtp.train.lora import Lora
from jaxtp.train.routers import Routers

# mesh, rows, what else
CASES = {
    "gathered": ({"cp": 2}, packed, {"strategy": "gathered"}),
    "ring": ({"cp": 4}, rows, {"strategy": "ring"}),
    "by heads": ({"cp": 4}, packed, {"strategy": "heads"}),
    "cp 8": ({"cp": 8}, packed, {}),
    "cp 2 × tp 4": ({"cp": 2, "tp": 4}, packed, {"sequence_parallel": True, "remat": "save-attention"}),
    "dp 2 × cp 2 × tp 2, ZeRO 3": (
        {"dp": 2, "cp": 2, "tp": 2},
        packed,
        {"sequence_parallel": True, "zero": 3, "remat": "full"},
    ),
    "dp 2 × cp 4, ZeRO 2": ({"dp": 2, "cp": 4}, packed, {"zero": 2, "accumulate": 2}),
    "ring, cp 2 × tp 2, ZeRO 1": ({"cp": 2, "tp": 2}, rows, {"zero": 1, "strategy": "ring", "remat": "save-dots"}),
    "by heads, dp 2 × cp 2, ZeRO 1": ({"dp": 2, "cp": 2}, packed, {"zero": 1, "strategy": "heads", "accumulate": 2}),
    "pp 2 × cp 2 × tp 2": ({"pp": 2, "cp": 2, "tp": 2}, packed, {"accumulate": 2, "sequence_parallel": True, "zero": 1}),
    "ring, dp 2 × pp 2 × cp 2": ({"dp": 2, "pp": 2, "cp": 2}, rows, {"accumulate": 2, "strategy": "ring"}),
}


@pytest.fixture(scope="module")
def alone():
    """Gradients and losses of one device, by the rows."""
    kept = {}

    def of(make, **changes):
        key = make, *changes.items()
        if key not in kept:
            made = run(tiny.config(**changes))
            first, grads = made.learn(make(0))
            kept[key] = {path: np.asarray(g) for path, g in grads.items()}, [float(first.nats), float(made.step(make(1)).nats)]
        return kept[key]

    return of


def same(case, alone, **changes):
    mesh, make, options = case
    options = dict(options)
    micros = options.pop("accumulate", 1)
    grads, losses = alone(make, **changes)
    made = run(tiny.config(**changes), mesh=mesh, **options)
    first, found = made.learn(make(0), accumulate=micros)
    found = made.trainer.in_order(found)
    for path, expected in grads.items():
        got = np.asarray(found[path])
        if got.shape != expected.shape:  # KV heads that stand several times
            continue
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0, err_msg=path)
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max(), path
    np.testing.assert_allclose(
        [float(first.nats), float(made.step(make(1), accumulate=micros).nats)], losses, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_losses_are_those_of_one_device(case, alone):
    same(CASES[case], alone)


MIXTRAL = {"model_type": "mixtral", "experts": Experts(8, 2, 24, renormalize=True, balance=0.05)}
KINDS = {
    "windows": ({"windows": (5, None)}, {"cp": 4, "tp": 2}, packed, {"zero": 3}),
    "experts": (MIXTRAL, {"cp": 2, "ep": 2, "tp": 2}, packed, {"zero": 1}),
    "adapters": ({}, {"dp": 2, "cp": 2, "tp": 2}, packed, {"lora": Lora(rank=4), "sequence_parallel": True}),
    "qk norm, a soft cap": ({"qk_norm": True, "attention_softcap": 3.0}, {"cp": 4}, rows, {"strategy": "ring"}),
    "one kv head": ({"num_kv_heads": 1}, {"cp": 2, "tp": 4}, rows, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_curves_of_other_models(kind):
    changes, mesh, make, options = KINDS[kind]
    config = tiny.config(**changes)
    alone, split = run(config, lora=options.get("lora")), run(config, mesh=mesh, **options)
    for step in range(3):
        assert float(split.step(make(step)).nats) == pytest.approx(float(alone.step(make(step)).nats), abs=1e-5)


def test_twenty_steps_are_the_same():
    alone, split = run(), run(mesh={"dp": 2, "cp": 4}, zero=1)
    losses = [[float(made.step(packed(i)).nats) for i in range(20)] for made in (alone, split)]
    np.testing.assert_allclose(*losses, atol=1e-5, rtol=0)


def test_what_needs_whole_rows_is_refused():
    with pytest.raises(ValueError, match=r"cp=2 with routers.capacity=1.5: whole rows .*leave the capacity out"):
        run(tiny.config(**MIXTRAL), mesh={"cp": 2}, routers=Routers(capacity=1.5))
