"""LoRA is torch's, the same on every mesh, and trains adapters alone."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from runs import SETTINGS, packed, rows, run

from jaxtp import Llama
from jaxtp.checkpoint.names import parts
from jaxtp.train.lora import Lora

EVERYTHING = Lora(rank=4, alpha=8.0)
SOME = Lora(rank=3, targets=("q_proj", "v_proj", "up_proj"))
CASES = {
    "everything": ({}, EVERYTHING, packed),
    "some, one kv head": ({"num_kv_heads": 1}, SOME, rows),
    "tied, qkv bias": ({"model_type": "qwen2", "qkv_bias": True, "tie_word_embeddings": True}, EVERYTHING, packed),
}


@pytest.mark.parametrize("case", CASES)
def test_five_steps_are_those_of_torch(case, tmp_path):
    torch_loop = pytest.importorskip("torch_loop")
    changes, lora, make = CASES[case]
    folder = tiny.checkpoint(tmp_path, tokenizer=False, **changes)
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-3)
    ours = run(tiny.config(**changes), model=Llama.from_pretrained(folder, progress=False), settings=settings, lora=lora)
    theirs = torch_loop.Loop(folder, settings, lora=lora, start=in_peft_form(ours, ours.state.params))
    for step, found, expected in torch_loop.five_steps(ours, theirs, make):
        tensors = in_peft_form(ours, found)
        assert tensors.keys() == expected.keys()
        torch_loop.same(tensors, expected, step)


def in_peft_form(ours, adapters):
    """Adapters by the names of PEFT, [r, I] and [O, r]."""
    found = {}
    kernels = ours.trainer.stacked.specs()
    for path, value in adapters.items():
        kernel, target, matrix = path.rsplit(".", 2)
        for i, array in enumerate(np.asarray(value)):
            of = parts(ours.trainer.stacked.config, kernel.replace("*", str(i)), kernels[kernel].shape[1:])
            name = next(p.name.removesuffix(".weight") for p in of if target in p.name)
            found[f"{name}.lora_{matrix.upper()}"] = array if matrix == "a" else array.reshape(-1, array.shape[-1])
    return found


def curve(*, accumulate=1, **settings):
    made = run(settings=dataclasses.replace(SETTINGS, learning_rate=3e-2), **settings)
    return [float(made.step(packed(i % 3, batch=16), accumulate=accumulate).nats) for i in range(12)]


@pytest.fixture(scope="module")
def alone():
    return curve(lora=EVERYTHING)


MESHES = [
    {"mesh": {"tp": 4}, "zero": 0},
    {"mesh": {"dp": 8}, "zero": 1, "remat": "save-dots"},
    {"mesh": {"dp": 2, "tp": 4}, "zero": 2, "sequence_parallel": True, "remat": "full"},
    {"mesh": {"dp": 2, "tp": 2}, "zero": 3, "remat": "save-attention"},
    {"mesh": {"tp": 8}, "zero": 1, "sequence_parallel": True, "accumulate": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", MESHES, ids=str)
def test_steps_are_the_same_everywhere(alone, options):
    assert alone[-1] < alone[0] - 0.1
    np.testing.assert_allclose(curve(lora=EVERYTHING, **options), alone, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_merged_model_is_the_adapted_one():
    made = run(lora=SOME, mesh={"dp": 2, "tp": 2}, zero=3)
    before = {path: np.asarray(weight) for path, weight in made.frozen.items()}
    batch = rows(0)
    for _ in range(5):
        made.step(batch)
    with jax.set_mesh(made.trainer.stacked.layout.mesh):
        nats, tokens = jax.jit(made.trainer.evaluate)(made.state.params, made.batch(batch), made.frozen)
    model = made.trainer.model(made.state, made.frozen, dtype=np.dtype("float32"))
    logits = np.asarray(model(batch["tokens"]))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logp, batch["labels"][..., None], -1)[..., 0]
    assert float(nats / tokens) == pytest.approx(-(picked * batch["weights"]).sum() / batch["weights"].sum(), abs=1e-5)
    for path, weight in made.frozen.items():
        np.testing.assert_array_equal(weight, before[path])


@pytest.mark.parametrize(("zero", "dp"), [(1, 1), (3, 4)])
def test_what_is_held(zero, dp):
    """Adapters and their moments only; the frozen weights in shares at stage 3 alone."""
    made = run(lora=EVERYTHING, mesh={"dp": 4, "tp": 2}, zero=zero)
    whole = run(mesh={"dp": 4, "tp": 2}, zero=3 if zero == 3 else 0).state.params
    for path, weight in made.frozen.items():
        assert weight.addressable_shards[0].data.nbytes == whole[path].addressable_shards[0].data.nbytes
    r, D, F, Q, KV, L = 4, 64, 96, 64, 32, 2
    expected = L * r * ((D + Q) + 2 * (D + KV) + (Q + D) + 3 * (D + F))
    assert sum(a.size for a in made.state.params.values()) == expected
    assert sum(a.size for a in jax.tree.leaves(made.state.opt) if a.ndim) == 2 * expected


@pytest.mark.slow
def test_a_step_computes_no_gradient_of_a_frozen_kernel():
    batch = rows(0)
    flops = {}
    for lora in (None, Lora(rank=1, targets=("q_proj",))):
        made = run(tiny.config(hidden_size=256, intermediate_size=1024, vocab_size=64), lora=lora)
        with jax.set_mesh(made.trainer.stacked.layout.mesh):
            program = jax.jit(made.trainer.step).lower(made.state, made.batch(batch), made.frozen).compile()
        flops[lora is None] = program.cost_analysis()["flops"]
    assert flops[False] < 0.7 * flops[True]  # forward, and of the backward products one of two


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank=-1 must be at least 0"),
        ({"rank": 4, "targets": ("q", "v_proj")}, r"lora.targets=\['q', 'v_proj'\] must be some of q_proj, k_proj"),
        ({"rank": 4, "targets": ()}, "must be some of"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Lora(**settings)


@pytest.mark.slow
def test_copies_of_a_kv_head_stay_equal():
    made = run(mesh={"tp": 8}, lora=EVERYTHING)
    for i in range(3):
        made.step(rows(i))
    for target in ("k_proj", "v_proj"):
        b = np.asarray(made.state.params[f"layers.*.attention.qkv.{target}.b"])
        assert b.shape[1] == 8
        assert b.any()
        np.testing.assert_array_equal(b[:, 0::2], b[:, 1::2])


@pytest.mark.slow
def test_adapters_are_trained_in_stages():
    def of(**options):
        made = run(tiny.config(num_layers=4), lora=EVERYTHING, **options)
        micros = 4 if "mesh" in options else 1
        losses = [float(made.step(packed(i, batch=16), accumulate=micros).nats) for i in range(3)]
        model = made.trainer.model(made.state, made.frozen, dtype=np.dtype("float32"))
        return losses, np.asarray(model(packed(0)["tokens"]))

    pipelined = {"schedule": "interleaved_1f1b", "chunks": 2, "zero": 1, "sequence_parallel": True}
    (losses, logits), alone = of(mesh={"dp": 2, "pp": 2, "tp": 2}, **pipelined), of()
    np.testing.assert_allclose(losses, alone[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(logits, alone[1], atol=1e-5, rtol=0)
