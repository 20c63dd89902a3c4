"""The training step is transformers' and torch's, on every mesh, at every ZeRO stage, however it is cut up."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny
from runs import SETTINGS, packed, rows, run

from jaxtp import Llama, make_mesh
from jaxtp.checkpoint.names import parts
from jaxtp.config import Rope
from jaxtp.train.optim import Optimizer

GEMMA = {"tie_word_embeddings": True, "norm_form": "unit_offset", "activation": "gelu_tanh", "scaled_embedding": True}
GEMMA |= {"norm_position": "both", "attention_scale": 12**-0.5, "num_layers": 3}
GEMMA2 = {**GEMMA, "model_type": "gemma2", "attention_softcap": 2.0, "logits_softcap": 3.0, "windows": (5, None, 5)}
GEMMA3 = {**GEMMA, "model_type": "gemma3_text", "qk_norm": True, "local_rope": Rope(100.0), "windows": (5, 5, None)}
OLMO2 = {"model_type": "olmo2", "qk_norm": True, "qk_norm_across_heads": True, "norm_position": "post", "norm_form": "float32"}
GRANITE = {"model_type": "granite", "attention_scale": 0.25, "embedding_multiplier": 3.0, "residual_multiplier": 0.4}
GRANITE |= {"logits_scaling": 2.5}
CASES = {
    "padding": ({}, rows),
    "packing": ({}, packed),
    "tied": ({"tie_word_embeddings": True}, packed),
    "qkv bias": ({"model_type": "qwen2", "qkv_bias": True}, packed),
    "gemma 2": (GEMMA2, packed),
    "gemma 3": (GEMMA3, rows),
    "olmo 2": (OLMO2, packed),
    "granite": (GRANITE, rows),
    "qk norm, one kv head": ({"model_type": "qwen3", "qk_norm": True, "num_kv_heads": 1}, rows),
}


@pytest.mark.parametrize("case", CASES)
def test_five_steps_of_adamw_are_those_of_torch(case, tmp_path):
    torch_loop = pytest.importorskip("torch_loop")
    changes, make = CASES[case]
    folder = tiny.checkpoint(tmp_path, tokenizer=False, **changes)
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-3)
    ours = run(tiny.config(**changes), model=Llama.from_pretrained(folder, progress=False), settings=settings)
    theirs = torch_loop.Loop(folder, settings)
    for seed in range(5):
        batch = make(seed)
        before = {k: np.asarray(v) for k, v in ours.state.params.items()}
        metrics, grads = ours.learn(batch)
        loss, their_grads, their_params = theirs.step(batch)
        assert abs(float(metrics.nats) - loss) < 1e-5
        for found, expected in ((grads, their_grads), (ours.state.params, their_params)):
            for name, tensor in in_hf_form(ours, found).items():
                np.testing.assert_allclose(tensor, expected[name], atol=1e-5, rtol=0, err_msg=f"{name}, step {seed + 1}")
        assert any((before[k] != np.asarray(v)).any() for k, v in ours.state.params.items())


def in_hf_form(ours, params):
    """Stacked parameters by the names of Hugging Face."""
    found = {}
    for path, value in params.items():
        value = np.asarray(value)
        rows = zip(ours.trainer.stacked.layers(path), value, strict=True)
        layers = [(path.replace("*", str(i)), row) for i, row in rows] if "*" in path else [(path, value)]
        for name, array in layers:
            found |= {part.name: part.write(array) for part in parts(ours.trainer.stacked.config, name, array.shape)}
    return found


def test_a_single_long_row():
    """Its logits exist a part at a time; with dp=1 a slice of the only row must not lose its place on the mesh."""
    alone, split = (run(tiny.config(max_position_embeddings=1024), mesh=mesh) for mesh in ({}, {"tp": 2}))
    batch = packed(0, batch=1, length=1024)
    assert float(split.step(batch).nats) == pytest.approx(float(alone.step(batch).nats), abs=1e-5)


# each ZeRO stage on each mesh; the other options in turns, so that each meets each stage and each mesh
MESHES = ({"dp": 8}, {"tp": 4}, {"dp": 2, "tp": 4}, {"tp": 8})
OPTIONS = ({}, {"sequence_parallel": True, "remat": "full"}, {"accumulate": 2}, {"remat": "save-dots", "accumulate": 4})
OPTIONS += ({"sequence_parallel": True, "remat": "save-attention"},)
GRID = [(m, z, OPTIONS[(3 * i + z) % 5]) for (i, m), z in itertools.product(enumerate(MESHES), range(4))]


def curve(seed=0, *, accumulate=1, steps=20, **settings):
    made = run(**settings)
    return [float(made.step(packed(seed + i, batch=32), accumulate=accumulate).nats) for i in range(steps)]


@pytest.fixture(scope="module")
def alone():
    return curve()


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "zero", "options"), GRID, ids=str)
def test_twenty_steps_are_the_same_everywhere(alone, mesh, zero, options):
    np.testing.assert_allclose(curve(mesh=mesh, zero=zero, **options), alone, atol=1e-5, rtol=0)


def test_what_is_seen_again_and_again_is_learned():
    made = run(mesh={"dp": 2, "tp": 2}, zero=3)
    losses = [float(made.step(rows(0)).nats) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adafactor"])
@pytest.mark.parametrize(("mesh", "zero"), [({"dp": 2, "tp": 4}, 3), ({"dp": 4, "tp": 2}, 1)], ids=str)
def test_other_optimisers_are_the_same_everywhere(name, mesh, zero):
    settings = Optimizer(name=name, learning_rate=1e-2, warmup_steps=2)
    alone = curve(settings=settings, steps=6)
    np.testing.assert_allclose(curve(settings=settings, steps=6, mesh=mesh, zero=zero), alone, atol=1e-5, rtol=0)


def test_copies_of_a_kv_head_stay_equal():
    made = run(mesh={"tp": 8}, zero=0)
    for i in range(3):
        made.step(rows(i))
    qkv = np.asarray(made.state.params["layers.*.attention.qkv"])
    assert qkv.shape[1] == 8
    np.testing.assert_array_equal(qkv[:, 0::2, -2:], qkv[:, 1::2, -2:])


def test_bfloat16_follows_float32(alone):
    np.testing.assert_allclose(curve(dtype="bfloat16", mesh={"dp": 2, "tp": 2}, zero=2), alone, atol=0.02, rtol=0)


def test_a_step_that_is_not_finite_is_left_out():
    made = run()
    batch = rows(0)
    made.step(batch)
    before = {k: np.asarray(v) for k, v in made.state.params.items()}
    bad = {**batch, "weights": np.full_like(batch["weights"], np.nan)}
    assert not bool(made.step(bad).finite)
    for path, value in made.state.params.items():
        np.testing.assert_array_equal(value, before[path])
    assert (int(made.state.step), int(made.state.skipped)) == (2, 1)
    assert bool(made.step(batch).finite)


def test_zero_needs_a_width_that_dp_divides():
    config = dataclasses.replace(tiny.config(hidden_size=60), num_heads=4, num_kv_heads=4)
    with pytest.raises(ValueError, match="zero=1: dp·cp·ep=8 does not divide hidden_size 60; legal: 1, 2, 3, 4, 5, 6"):
        run(config, mesh={"dp": 8}, zero=1)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_is_held_at_rest(zero):
    made = run(mesh={"dp": 4, "tp": 2}, zero=zero)
    params = made.state.params
    whole = sum(a.nbytes for a in jax.tree.leaves(params))
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(params))
    moments = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(made.state.opt) if a.ndim)
    norms = sum(a.nbytes for path, a in params.items() if "norm" in path)
    cut = (whole - norms) / 2 + norms  # norms are whole over tp
    assert held == cut / (4 if zero else 1)
    assert moments == 2 * held


def test_the_mesh_does_not_matter_to_new_weights():
    one, other = run(), run(mesh={"dp": 2, "tp": 4}, zero=3)
    for path, value in one.state.params.items():
        np.testing.assert_array_equal(value, other.state.params[path])


def test_stacking_and_back():
    model = Llama.random(tiny.config(), mesh=make_mesh(tp=2), seed=3)
    expected = np.asarray(model(np.arange(8).reshape(1, 8)))
    made = run(model=model, mesh={"tp": 2})
    again = made.trainer.stacked.unstack(made.state.params, dtype=np.dtype("float32"))
    np.testing.assert_array_equal(again(np.arange(8).reshape(1, 8)), expected)
