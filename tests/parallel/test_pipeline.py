"""A pipeline trains as the unpipelined program does: the same losses, gradients and parameters, by every schedule."""

import numpy as np
import pytest
import tiny
from runs import packed, run

from jaxtp.parallel.stages import Stages
from jaxtp.train.optim import Optimizer

# mesh, layers, microbatches, options
CASES = {
    "pp 2, gpipe": ({"pp": 2}, 4, 4, {"schedule": "gpipe"}),
    "pp 2, fewer microbatches than a full pipe": ({"pp": 2}, 4, 1, {}),
    "pp 2, v 2": ({"pp": 2}, 4, 4, {"schedule": "interleaved_1f1b", "chunks": 2}),
    "pp 4": ({"pp": 4}, 4, 8, {}),
    "pp 8, v 2": ({"pp": 8}, 16, 8, {"schedule": "interleaved_1f1b", "chunks": 2, "remat": "full"}),
    "dp 2 × pp 2 × tp 2, ZeRO 1": ({"dp": 2, "pp": 2, "tp": 2}, 4, 4, {"zero": 1, "sequence_parallel": True}),
    "dp 2 × pp 2 × tp 2, v 2": ({"dp": 2, "pp": 2, "tp": 2}, 4, 4, {"zero": 1, "schedule": "interleaved_1f1b", "chunks": 2}),
    "dp 2 × pp 4, gpipe": ({"dp": 2, "pp": 4}, 4, 8, {"zero": 1, "schedule": "gpipe", "z_loss": 1e-2}),
    "pp 4 × tp 2": ({"pp": 4, "tp": 2}, 4, 8, {"zero": 1, "remat": "save-dots"}),
    "uneven": ({"pp": 4}, 7, 4, {"remat": "full"}),
    "uneven, as told": ({"pp": 2, "tp": 2}, 4, 2, {"layers_per_stage": (1, 3), "sequence_parallel": True}),
    "uneven, v 2": ({"dp": 2, "pp": 2}, 5, 4, {"zero": 1, "schedule": "interleaved_1f1b", "chunks": 2}),
}


def alone(layers, *, tied, steps, **options):
    """Gradients and losses of the one-device program."""
    made = run(tiny.config(num_layers=layers, tie_word_embeddings=tied), **options)
    first, grads = made.learn(packed(0, batch=16))
    rest = [float(made.step(packed(i, batch=16)).nats) for i in range(1, steps)]
    return {path: np.asarray(g) for path, g in grads.items()}, [float(first.nats), *rest]


@pytest.fixture(scope="module")
def reference():
    kept = {}

    def of(layers, **options):
        key = layers, *options.items()
        if key not in kept:
            kept[key] = alone(layers, **options)
        return kept[key]

    return of


QUICK = ("pp 2, v 2", "dp 2 × pp 2 × tp 2, ZeRO 1")


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_gradients_and_losses_are_those_of_one_device(case, reference):
    mesh, layers, micros, options = CASES[case]
    tied = list(CASES).index(case) % 2 == 0
    grads, losses = reference(layers, tied=tied, steps=3, z_loss=options.get("z_loss", 0.0))
    made = run(tiny.config(num_layers=layers, tie_word_embeddings=tied), mesh=mesh, **options)
    first, found = made.learn(packed(0, batch=16), accumulate=micros)
    found = made.trainer.in_order(found)
    assert found.keys() == grads.keys()
    for path, expected in grads.items():
        got = np.asarray(found[path])
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0, err_msg=path)
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max(), path  # gradients are small numbers
    rest = [float(made.step(packed(i, batch=16), accumulate=micros).nats) for i in range(1, 3)]
    np.testing.assert_allclose([float(first.nats), *rest], losses, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_other_optimisers_see_the_same_matrices(name, reference):
    settings = Optimizer(name=name, learning_rate=1e-2, warmup_steps=2)
    _, losses = reference(4, tied=False, steps=4, settings=settings)
    options = {"zero": 1, "schedule": "interleaved_1f1b", "chunks": 2}
    made = run(tiny.config(num_layers=4), mesh={"dp": 2, "pp": 2}, settings=settings, **options)
    again = [float(made.step(packed(i, batch=16), accumulate=2).nats) for i in range(4)]
    np.testing.assert_allclose(again, losses, atol=1e-5, rtol=0)


def test_balanced_stages():
    stages = Stages.split(126, ranks=4)
    assert stages.sizes == (32, 32, 31, 31)
    assert stages.waste == pytest.approx(128 / 126 - 1)
    assert "1.6%" in stages.told()
    for layers, p, v in ((126, 4, 1), (7, 2, 2), (5, 2, 2), (16, 8, 2), (9, 4, 2)):
        stages = Stages.split(layers, ranks=p, chunks=v)
        assert [stages.rows[at] for at in stages.places_of(range(layers))] == list(range(layers))
        assert len(stages.rows) == p * v * stages.slots


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 4, "ranks": 8}, "legal pp with them: 1, 2, 3, 4"),
        ({"layers": 4, "ranks": 2, "chunks": 3}, "6 stages of 4 layers; legal pp with them: 1"),
        ({"layers": 4, "ranks": 2, "sizes": (1, 2)}, "makes 3 layers; the model has 4"),
        ({"layers": 4, "ranks": 2, "sizes": (2, 1, 1)}, "must name 2 stages"),
        ({"layers": 4, "ranks": 2, "sizes": (4, 0)}, "every stage needs a layer"),
    ],
)
def test_stages_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stages.split(**arguments)
