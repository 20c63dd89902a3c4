"""Mixtures of experts learn as transformers' do, and on every mesh alike."""

import dataclasses
import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import SETTINGS, packed, rows, run
from test_step import in_hf_form

from jaxtp import LLM, Llama, SamplingParams, make_mesh, parallel
from jaxtp.config import Experts
from jaxtp.model.stacked import Stacked
from jaxtp.ops.router import Routing, route
from jaxtp.train import Run
from jaxtp.train.build import trainer_of
from jaxtp.train.config import parse
from jaxtp.train.lora import Lora, every_target
from jaxtp.train.routers import Routers, load

MIXTRAL = {"model_type": "mixtral", "experts": Experts(8, 2, 24, renormalize=True, balance=0.05)}
QWEN3 = {"model_type": "qwen3_moe", "qk_norm": True, "experts": Experts(8, 3, 16, renormalize=True)}
QWEN2 = {"model_type": "qwen2_moe", "qkv_bias": True, "num_layers": 4, "experts": Experts(8, 3, 16, shared=32, dense=(0, 2))}
CASES = {
    "mixtral": (MIXTRAL, Routers(z_loss=1e-2), rows),
    "mixtral, packed": (MIXTRAL, Routers(z_loss=1e-2), packed),
    "qwen3": (QWEN3, Routers(balance=0.1), packed),
    "qwen2, dense layers and a shared expert": (QWEN2, Routers(balance=0.1, z_loss=1e-3), rows),
}


def padded(seed):
    """Two documents in each row, and padding behind them."""
    found = packed(seed)
    found["segment_ids"] = found["segment_ids"] * (np.arange(32) < 26)
    found["weights"] = found["weights"] * (np.arange(32) < 25)
    return found


@pytest.mark.parametrize("case", CASES)
def test_five_steps_of_adamw_are_those_of_torch(case, tmp_path):
    torch_loop = pytest.importorskip("torch_loop")
    changes, routers, make = CASES[case]
    make = padded if make is packed else make
    config = tiny.config(**changes)
    folder = tiny.checkpoint(tmp_path, tokenizer=False, **changes)
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-3, eps=1e-6)  # so that no update hangs on a gradient's last bits
    ours = run(config, model=Llama.from_pretrained(folder, progress=False), settings=settings, routers=routers)
    balance = config.experts.balance if routers.balance is None else routers.balance
    theirs = torch_loop.Loop(folder, settings, routers=(balance, routers.z_loss))
    for step, found, expected in torch_loop.five_steps(ours, theirs, make):
        torch_loop.same(in_hf_form(ours, found), apart(expected, config.model_type), step)


def apart(params, family):
    """By the names of checkpoints: transformers holds experts together, and Mixtral's under other names."""
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for name, value in params.items():
        name = name.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else name
        at, _, kind = name.rpartition(".")
        if not at.endswith(".experts"):
            found[name] = value
            continue
        for expert, each in enumerate(value):
            parts = zip((gate, up), np.split(each, 2), strict=True) if kind == "gate_up_proj" else ((down, each),)
            found |= {f"{at}.{expert}.{own}.weight": part for own, part in parts}
    return found


MESHES = [
    ({"ep": 2, "tp": 2}, {"zero": 2, "sequence_parallel": True}),
    ({"dp": 2, "ep": 2}, {"zero": 3, "remat": "save-dots"}),
    ({"dp": 2, "ep": 2, "tp": 2}, {"zero": 1, "expert_layout": "width"}),
    ({"ep": 4}, {"zero": 1, "expert_dispatch": "ragged"}),
    ({"dp": 2, "ep": 2, "tp": 2}, {"zero": 3, "expert_dispatch": "ragged", "sequence_parallel": True}),
    ({"tp": 4}, {"zero": 0, "remat": "full"}),
    ({"dp": 2, "ep": 2}, {"zero": 0, "accumulate": 2}),
    ({"dp": 2, "pp": 2, "tp": 2}, {"zero": 1, "accumulate": 4}),
    ({"pp": 2, "ep": 2, "tp": 2}, {"zero": 1, "accumulate": 2, "sequence_parallel": True}),
    (
        {"pp": 2, "cp": 2, "ep": 2},
        {"zero": 1, "accumulate": 2, "expert_dispatch": "ragged", "schedule": "interleaved_1f1b", "chunks": 2},
    ),
]
STEPS = 20


@functools.cache
def curve(mesh, accumulate=1, **options):
    """The losses of twenty steps, the load of the last, and the parameters after them."""
    config = tiny.config(**{**QWEN3, "num_layers": 4})
    pp = dict(mesh).get("pp", 1)
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-3, eps=1e-6)
    routers = Routers(balance=0.1, z_loss=1e-3, over="sequence")
    made = run(config, mesh=dict(mesh), settings=settings, routers=routers, **options)
    found = [made.step(padded(seed), accumulate=accumulate) for seed in range(STEPS)]
    params = made.trainer.in_order(made.state.params) if pp > 1 else made.state.params
    return [float(m.loss) for m in found], found[-1].load, {path: np.asarray(value) for path, value in params.items()}


@pytest.mark.parametrize(("mesh", "options"), MESHES, ids=str)
def test_the_same_curve_on_every_mesh(mesh, options, monkeypatch):
    monkeypatch.setattr(parallel.experts, "FEW_TOKENS", 0)  # so that these are not few
    losses, found, params = curve(tuple(mesh.items()), **options)
    expected, alone, theirs = curve(())
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    np.testing.assert_array_equal(found.counts, alone.counts)
    for name in ("balance", "z", "entropy"):
        np.testing.assert_allclose(getattr(found, name), getattr(alone, name), atol=1e-5)
    for path, value in params.items():
        np.testing.assert_allclose(value, theirs[path], atol=2e-4, err_msg=path)


@pytest.mark.parametrize("lora", [None, Lora(rank=3, alpha=6.0)], ids=["whole", "adapters"])
def test_stages_of_layers_with_experts_and_layers_without(lora):
    """Of a pattern that is the same on every stage, also where one has less of it."""
    mesh, sizes = ({"dp": 2, "pp": 2}, (2, 2)) if lora else ({"pp": 2, "ep": 2, "tp": 2}, (4, 2))
    experts = dataclasses.replace(QWEN2["experts"], dense=tuple(range(0, sum(sizes), 2)))
    config = tiny.config(**{**QWEN2, "num_layers": sum(sizes), "experts": experts})
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-3, eps=1e-6)
    routers = Routers(balance=0.1, z_loss=1e-3, over="sequence")

    def three(**options):
        made = run(config, settings=settings, routers=routers, lora=lora, **options)
        found = [made.step(packed(seed), accumulate=2) for seed in range(3)]
        return [float(m.loss) for m in found], found[-1].load, made.trainer.in_order(made.state.params)

    losses, loads, params = three()
    found, told, theirs = three(mesh=mesh, layers_per_stage=sizes)
    np.testing.assert_allclose(found, losses, atol=1e-5)
    np.testing.assert_array_equal(told.counts, loads.counts)
    for path, value in theirs.items():
        np.testing.assert_allclose(value, params[path], atol=2e-4, err_msg=path)
    with pytest.raises(ValueError, match="layers that stand in the same place of their stages differ"):
        three(mesh={"pp": 2}, layers_per_stage=(1, sum(sizes) - 1))


LORA = Lora(rank=3, alpha=6.0)


def test_five_steps_of_adapters_are_those_of_torch(tmp_path):
    """On attention, experts, and the MLPs of layers without."""
    torch_loop = pytest.importorskip("torch_loop")
    changes = {**QWEN3, "num_layers": 3, "experts": dataclasses.replace(QWEN3["experts"], dense=(1,))}
    folder = tiny.checkpoint(tmp_path, tokenizer=False, **changes)
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-3, eps=1e-6)
    routers = Routers(balance=0.1)
    model = Llama.from_pretrained(folder, progress=False)
    ours = run(tiny.config(**changes), model=model, settings=settings, lora=LORA, routers=routers)

    def named(params):
        found = ours.trainer.adapters.matrices(params)
        return {f"{module}.lora_{m}": array for module, pair in found.items() for m, array in zip("AB", pair, strict=True)}

    theirs = torch_loop.Loop(folder, settings, lora=LORA, start=named(ours.state.params), routers=(0.1, 0.0))
    for step, found, expected in torch_loop.five_steps(ours, theirs, padded):
        tensors = named(found)
        assert tensors.keys() == expected.keys()
        torch_loop.same(tensors, expected, step)


def test_adapters_are_for_every_kernel_by_default():
    """Under the names that the family has for them."""
    stacked = Stacked(Llama(tiny.config(**MIXTRAL), mesh=make_mesh()))
    assert every_target(stacked) == ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w3", "w2")
    config = parse({"folder": "run", "model": {"start": "base"}, "lora": {"rank": 2}})
    assert {path.rsplit(".", 2)[1] for path in trainer_of(config, stacked).specs} == {*every_target(stacked)}


@pytest.mark.parametrize("pp", [1, 2])
def test_what_is_sent_to_its_experts_in_training_is_so_in_generation(pp, monkeypatch):
    """A model in training writes the same text by either dispatch."""
    monkeypatch.setattr(parallel.experts, "FEW_TOKENS", 0)
    config, texts = tiny.config(**QWEN3), []
    for mesh, dispatch in (({}, "gather"), ({"pp": pp, "ep": 2}, "ragged")):
        made = run(config, mesh=mesh, expert_dispatch=dispatch, routers=Routers(over="sequence"))
        model = made.trainer.model(made.state, dtype=jnp.dtype("float32"), generating=made.trainer.stacked.layout.rules)
        llm = LLM(model, max_model_len=32, progress=False)
        requests = llm.generate([[3, 4, 5], [9]], SamplingParams(temperature=0, max_tokens=6))
        texts.append([request.outputs[0].token_ids for request in requests])
    assert texts[0] == texts[1]


ADAPTED = [
    ({"dp": 2, "ep": 2, "tp": 2}, {"zero": 3, "expert_layout": "width", "remat": "save-dots"}),
    ({"pp": 2, "ep": 2, "tp": 2}, {"zero": 1, "accumulate": 2, "expert_layout": "width"}),
]


@pytest.mark.parametrize(("mesh", "options"), ADAPTED, ids=str)
def test_adapters_learn_alike_on_every_mesh(mesh, options):
    losses, _, params = curve(tuple(mesh.items()), lora=LORA, **options)
    expected, _, theirs = curve((), lora=LORA)
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert params.keys() == theirs.keys()


@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_losses_are_their_formulas(over):
    rng = np.random.default_rng(0)
    L, B, T, E, k = 3, 4, 9, 5, 2
    logits = rng.normal(size=(L, B, T, E))
    counted = rng.random((B, T)) < 0.7
    counted[1] = False  # a row of padding alone
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    log_z = np.log(np.exp(logits).sum(-1))
    hit = np.zeros_like(p)
    np.put_along_axis(hit, np.argsort(-p, axis=-1)[..., :k], 1.0, axis=-1)
    groups = [(layer, row) for layer in range(L) for row in range(B)] if over == "sequence" else [(slice(None), slice(None))]
    balance = z = 0.0
    for layer, row in groups:
        there = np.broadcast_to(counted, (L, B, T))[layer, row].astype(bool)
        f, mean, logs = hit[layer, row][there], p[layer, row][there], log_z[layer, row][there]
        if len(f):
            balance += E * (f.mean(0) * mean.mean(0)).sum() / len(groups)
            z += (logs**2).mean() / len(groups)
    each = counted[None, :, :, None]
    entropy = -(p * np.log(p)).sum(-1)
    routing = Routing(
        *(np.float32(a) for a in ((hit * each).sum(2), (p * each).sum(2), (log_z**2 * counted).sum(2))),
        entropy=np.float32((entropy * counted).sum(2)),
        tokens=np.float32(np.broadcast_to(counted.sum(1), (L, B))),
        dropped=np.zeros((L, B), np.float32),
    )
    found = load(routing, Routers(balance=1.0, over=over))
    assert float(found.balance) == pytest.approx(balance, rel=1e-5)
    assert float(found.z) == pytest.approx(z, rel=1e-5)
    np.testing.assert_array_equal(found.counts, (hit * each).sum((1, 2)))


@pytest.mark.parametrize("capacity", [0.5, 1.0, 4.0])
def test_beyond_a_capacity_tokens_are_dropped_and_counted(capacity):
    """A row's first tokens are kept, each choice by itself."""
    rng = np.random.default_rng(1)
    B, T, E, k = 2, 12, 4, 2
    logits = jnp.asarray(rng.normal(size=(B, T, E)) + np.array([2, 0, 0, 0]), jnp.float32)
    chosen, _, kept = route(logits, Experts(E, k, 8), capacity)
    most, taken = int(np.ceil(capacity * T * k / E)), np.zeros((B, E), int)
    for b, t, i in np.ndindex(B, T, k):
        expert = int(chosen[b, t, i])
        taken[b, expert] += 1
        assert bool(kept[b, t, i]) == (taken[b, expert] <= most)
    assert bool(kept.all()) == (capacity == 4.0)

    config = tiny.config(**MIXTRAL)
    config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, count=E))
    made = run(config, mesh={"ep": 2, "tp": 2}, routers=Routers(capacity=capacity))
    told = made.step(rows(0)).load
    assert (float(told.dropped) == 0) == (capacity == 4.0)
    assert float(told.counts.sum()) == 2 * 8 * 32 * 2  # choices, whether taken or not


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routers": {"jitter": 0.1}}, "routers.jitter is no setting; settings there: balance, z_loss, over, capacity"),
        ({"routers": {"balance": -1.0}}, "routers.balance=-1.0 must be at least 0"),
        ({"routers": {"capacity": 0.0}}, "routers.capacity=0.0 must be above 0 and finite, such as 1.25"),
        (
            {"parallel": {"ep": 3}, "data": {"batch_size": 12}},
            "ep=3 does not divide the 8 experts; legal ep for this model: 1, 2, 4, 8",
        ),
        ({"parallel": {"ep": 2}, "model": {"shape": {"num_experts": 0}}}, "ep=2 is for experts, of which this llama has none"),
        ({"parallel": {"expert_dispatch": "ragged"}}, "expert_dispatch='ragged' sends tokens along ep, which is 1 here"),
        ({"parallel": {"pp": 2, "accumulate": 2}}, "with pp use routers.over=sequence"),
        ({"parallel": {"dp": 2, "ep": 4}, "data": {"batch_size": 12}}, "dp·ep=8 does not divide the 12 rows of a microbatch"),
        ({"model": {"shape": {"num_experts_per_tok": 9}}}, "num_experts_per_tok=9 exceeds num_experts=8"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, message, tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 200)
    base = {
        "folder": str(tmp_path / "run"),
        "model": {"dtype": "float32", "shape": {"num_experts": 8, "hidden_size": 32, "intermediate_size": 16}},
        "data": {"train": [str(tmp_path / "text.txt")], "train_tokenizer": 257, "sequence_length": 16, "batch_size": 16},
        "parallel": {"dp": 1},
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        Run(parse(merged(base, settings)))


def merged(a, b):
    return {k: merged(a.get(k, {}), b[k]) if isinstance(b.get(k), dict) else b.get(k, a.get(k)) for k in {**a, **b}}
