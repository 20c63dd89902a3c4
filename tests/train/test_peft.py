"""Adapters in PEFT's format: merged, trained on, and written as PEFT itself has them."""

import copy
import json
import logging
import shutil
import sys

import jax
import numpy as np
import pytest
import tiny
from runs import SETTINGS, rows
from safetensors.numpy import load_file, save_file

from jaxtp import LLM, Llama, ModelConfig, cli, make_mesh
from jaxtp.checkpoint import hf
from jaxtp.checkpoint.adapters import Adapter
from jaxtp.config.quantization import Scheme
from jaxtp.model.stacked import Stacked
from jaxtp.ops.quantized import quantize
from jaxtp.sharding import Rules
from jaxtp.train import Run, evaluate, export, train
from jaxtp.train.config import parse
from jaxtp.train.lora import Adapters, Lora
from jaxtp.train.loss import Batch
from jaxtp.train.optim import Optimizer, transformation
from jaxtp.train.step import Trainer
from jaxtp.weights import variables

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing", "ignore:Setting .save_embedding_layers")

FAMILIES = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True, "tie_word_embeddings": True, "num_kv_heads": 2},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "num_kv_heads": 8},
    "phi3": {"model_type": "phi3", "num_kv_heads": 2},
}
KERNELS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "target_modules": KERNELS,
    "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 6, "^model.layers.0.mlp.down_proj": 1},
    "alpha_pattern": {"k_proj": 3, r"layers\.1\.mlp\..*": 20},
}
FEW = {**PATTERNS, "target_modules": ["q_proj", "k_proj", "down_proj"]}
CASES = {
    "all": ("llama", {"target_modules": "all-linear"}),
    "some": ("llama", {"target_modules": ["q_proj", "mlp.up_proj"], "lora_alpha": 5}),
    "rslora and ranks": ("llama", {**PATTERNS, "use_rslora": True}),
    "patterns, tied, biased": ("qwen2", PATTERNS),
    "one layer, not v": ("qwen3", {"target_modules": KERNELS, "layers_to_transform": 1, "exclude_modules": ["v_proj"]}),
    "an expression": ("qwen3", {"target_modules": r".*\.(0\.self_attn\.[qv]_proj|1\.mlp\.gate_proj)"}),
    "a pattern of layers": ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    "q, k and v in one": ("phi3", {"target_modules": "all-linear", "rank_pattern": {"qkv_proj": 3}}),
    "the tables too": ("llama", {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
}
IDS = np.arange(3, 83, dtype=np.int32).reshape(2, 40)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny.checkpoint(folder / name, **changes) for name, changes in FAMILIES.items()}


def adapted(base, folder, **settings):
    """A model of PEFT with a random adapter, which is saved."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings}
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.07)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def made(bases, tmp_path_factory):
    """case -> (base, adapter folder, model of PEFT), made once."""
    found = {}

    def make(case):
        if case not in found:
            family, settings = CASES[case]
            folder = tmp_path_factory.mktemp("adapter")
            found[case] = bases[family], folder, adapted(bases[family], folder, **settings)
        return found[case]

    return make


def logits_of(model):
    """In float64, so that only our own rounding is compared."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(torch.tensor(IDS).long()).logits.numpy()


def merged_by_peft(folder, base):
    """Every tensor of the merged model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return {name: weight.detach().numpy() for name, weight in merged.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(made, case):
    base, folder, theirs = made(case)
    ours = Llama.from_pretrained(base, lora=folder, progress=False)
    plain = Llama.from_pretrained(base, progress=False)(IDS)
    np.testing.assert_allclose(ours(IDS), logits_of(theirs), atol=1e-5, rtol=1e-5)
    assert np.abs(np.asarray(ours(IDS)) - plain).max() > 0.1


MESHES = {
    "tp 8, KV heads stand twice": {"tensor_parallel_size": 8},
    "tp 2 × dp 2, sequence parallel": {"tensor_parallel_size": 2, "data_parallel_size": 2, "sequence_parallel": True},
    "pp 2 × tp 2": {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_merges_the_same_and_saves_it(made, mesh, tmp_path):
    base, folder, _ = made("rslora and ranks")
    llm = LLM(base, lora=folder, progress=False, gpu_memory_utilization=0.1, **MESHES[mesh])
    for path, weight in variables(llm.model):  # each device holds its part and no more
        array = weight.get_value()
        assert array.addressable_shards[0].data.shape == array.sharding.shard_shape(array.shape), path
    llm.model.save_pretrained(tmp_path / "merged")
    expected, found = merged_by_peft(folder, base), load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], atol=1e-6, rtol=0, err_msg=name)


def test_q_k_and_v_in_one_are_merged_on_every_mesh_and_not_trained(made):
    base, folder, theirs = made("q, k and v in one")
    ours = Llama.from_pretrained(base, lora=folder, mesh=make_mesh(tp=4), progress=False)
    np.testing.assert_allclose(ours(IDS), logits_of(theirs), atol=1e-5, rtol=1e-5)
    stacked = Stacked(Llama(ours.config, mesh=make_mesh()))
    for target in ("qkv_proj", "layers.1.mlp.gate_up_proj", "q_proj"):
        with pytest.raises(
            ValueError, match=f"{target}: this model has q, k and v in one .* Targets that are: o_proj, down_proj"
        ):
            Adapters(stacked, Lora(rank=2, targets=(target,)))
    assert len(Adapters(stacked, Lora(rank=2, targets=("o_proj", "down_proj"))).sites) == 2


def test_it_is_merged_in_float32_and_rounded_once(made):
    base, folder, _ = made("all")
    whole = Llama.from_pretrained(base, lora=folder, progress=False)
    half = Llama.from_pretrained(base, lora=folder, dtype="bfloat16", progress=False)
    eight = Llama.from_pretrained(base, lora=folder, quantization="int8", progress=False)
    for (path, weight), (_, rounded) in zip(variables(whole), variables(half), strict=True):
        expected = weight.get_value().astype("bfloat16")
        np.testing.assert_array_equal(np.asarray(rounded.get_value(), np.float32), np.asarray(expected, np.float32), path)
    kernel = quantize(whole.layers[1].mlp.down.get_value(), Scheme("int8"))
    np.testing.assert_array_equal(eight.layers[1].mlp.down.get_value().values, kernel.values)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', for a base whose weights were changed"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; LORA is supported"),
        ({"target_modules": ["c_attn"]}, r"target_modules is \['c_attn'\], which names no kernel of this model"),
        ({"target_modules": "(q_proj"}, "cannot be read"),
        ({"r": 0}, "r is 0, not a number above 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank of 'q_proj' is 0"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named_before_a_weight_is_read(made, tmp_path, settings, message, monkeypatch):
    base, folder, _ = made("some")
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    monkeypatch.setattr(hf, "_read", None)
    with pytest.raises(ValueError, match=message) as refused:
        LLM(base, lora=tmp_path / "other", progress=False)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value) or "lora." in str(refused.value)


def test_tensors_that_do_not_fit_are_listed(made, bases, tmp_path):
    base, folder, _ = made("some")
    shutil.copytree(folder, tmp_path / "other")
    path, start = tmp_path / "other" / "adapter_model.safetensors", "base_model.model.model.layers."
    tensors = load_file(path)
    del tensors[f"{start}0.self_attn.q_proj.lora_A.weight"]
    tensors[f"{start}1.mlp.up_proj.lora_B.weight"] = np.zeros((3, 4), np.float32)
    tensors[f"{start}2.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 64), np.float32)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"do not fit its adapter_config\.json and this model") as error:
        Llama.from_pretrained(base, lora=tmp_path / "other", progress=False)
    for line in (
        f"missing: {start}0.self_attn.q_proj.lora_A.weight",
        f"unexpected: {start}2.self_attn.q_proj.lora_A.weight",
        f"of another shape: {start}1.mlp.up_proj.lora_B.weight is (3, 4), expected (96, 4)",
    ):
        assert line in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        Llama.from_pretrained(base, lora=tmp_path / "other", progress=False)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        Llama.from_pretrained(base, lora=base, progress=False)
    with pytest.raises(ValueError, match="names embed_tokens, which this model has in one table with its head"):
        Llama.from_pretrained(bases["qwen2"], lora=made("the tables too")[1], progress=False)
    with pytest.raises(ValueError, match="is merged into the weights of a checkpoint"):
        LLM(base, lora=folder, load_format="dummy", progress=False)


def test_settings_that_are_not_known_are_said(made, tmp_path, caplog):
    base, folder, _ = made("some")
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_hora": True}))
    with caplog.at_level(logging.WARNING, logger="jaxtp"):
        Llama.from_pretrained(base, lora=tmp_path / "other", progress=False)
    assert "use_hora, unknown here, changed nothing" in caplog.text


# -- trained on --------------------------------------------------------------------------------------------------------


def trainer_of(base, folder, *, settings, mesh=None, rules=Rules()):
    over = make_mesh(**(mesh or {}))
    stacked = Stacked(Llama(ModelConfig.from_hf(base), mesh=over, rules=rules))
    adapter = Adapter(folder, hf.shapes(stacked.model, stacked.config))
    adapters = Adapters(stacked, adapter.lora)
    return Trainer(stacked, transformation(settings, 20, adapters.specs()), adapters, zero=1, clip_norm=0.0), adapter


@pytest.mark.parametrize("case", ["rslora and ranks", "one layer, not v", "an expression"])
def test_nothing_is_lost_on_the_way_in_and_out(made, case):
    base, folder, _ = made(case)
    expected = load_file(folder / "adapter_model.safetensors")
    for mesh in ({}, {"tp": 8}):
        trainer, adapter = trainer_of(base, folder, settings=SETTINGS, mesh=mesh)
        found = trainer.adapters.matrices(trainer.adapters.taken(adapter))
        assert len(expected) == 2 * len(found)
        for module, (a, b) in found.items():
            np.testing.assert_array_equal(a, expected[f"base_model.model.{module}.lora_A.weight"])
            np.testing.assert_array_equal(b, expected[f"base_model.model.{module}.lora_B.weight"])


def test_steps_are_those_of_peft_and_padding_stays_zero(bases, tmp_path):
    """Layers differ in rank and in scale, so stacks are padded, and split by scale; Adam and decay leave zeros alone."""
    base, folder = bases["qwen2"], tmp_path / "adapter"
    theirs = adapted(base, folder, **FEW)
    settings = Optimizer(learning_rate=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.1)
    trained = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    trainer, adapter = trainer_of(base, folder, settings=settings, mesh={"tp": 4})
    mesh, state = trainer.stacked.layout.mesh, trainer.begin(trainer.adapters.taken(adapter))
    place = trainer.stacked.layout.sharding(None, "batch", "tokens")
    model = Llama.from_pretrained(base, mesh=mesh, progress=False)
    frozen = trainer.freeze(trainer.stacked.stack(model))
    paths = {site.path: site.ranks for site in trainer.adapters.sites}
    assert paths["layers.*.attention.qkv.q_proj"] == (4, 0)  # 4 and 6 of the same alpha are of two scales
    assert paths["layers.*.attention.qkv.q_proj.1"] == (0, 6)
    with jax.set_mesh(mesh):
        step = jax.jit(trainer.step, donate_argnums=0)
        for i in range(4):
            batch = rows(i)
            state, metrics = step(state, Batch(**{k: jax.device_put(v[None], place) for k, v in batch.items()}), frozen)
            logits = theirs(torch.tensor(batch["tokens"]).long()).logits
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.tensor(batch["labels"]).long().flatten(), reduction="none"
            )
            weights = torch.tensor(batch["weights"]).flatten()
            loss = (each * weights).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert float(metrics.nats) == pytest.approx(float(loss.detach()), abs=1e-5)
    for module, pair in trainer.adapters.matrices(state.params).items():
        for matrix, found in zip("AB", pair, strict=True):
            expected = trained[f"base_model.model.{module}.lora_{matrix}.weight"].detach().numpy()
            np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0, err_msg=module)
    for path, ranks in paths.items():
        for layer, rank in enumerate(ranks):
            assert not np.asarray(state.params[f"{path}.a"])[layer, rank:].any()
            assert not np.asarray(state.params[f"{path}.b"])[layer, ..., rank:].any()


TEXT = "the quick brown fox jumps over the lazy dog and runs away from the bear. " * 30


def config(base, folder, **changes):
    (folder.parent / "text.txt").write_text(TEXT)
    raw = {
        "folder": str(folder), "steps": 2, "model": {"start": str(base), "dtype": "float32"},
        "data": {"train": [str(folder.parent / "text.txt")], "sequence_length": 32, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0}, "log": {"tensorboard": False}, "parallel": {"dp": 1},
    }  # fmt: skip
    return parse({**raw, **changes})


def test_a_run_goes_on_from_an_adapter_and_exports_one_that_peft_loads(bases, tmp_path):
    base, first = bases["llama"], tmp_path / "first"
    adapted(base, first, **FEW, use_rslora=True)
    lora = {"start": str(first)}
    run = Run(config(base, tmp_path / "run", lora=lora))
    expected = load_file(first / "adapter_model.safetensors")
    for module, (a, _) in run.trainer.adapters.matrices(run.first_state().params).items():
        np.testing.assert_array_equal(a, expected[f"base_model.model.{module}.lora_A.weight"])
    run.train()
    export(tmp_path / "run", tmp_path / "second", adapter=True)
    export(tmp_path / "run", tmp_path / "merged", dtype="float32")
    settings, old = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "second", first))
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "peft_type"):
        assert settings[key] == old[key], key
    assert (tmp_path / "second" / "tokenizer.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = logits_of(peft.PeftModel.from_pretrained(model, tmp_path / "second"))
    ours = Llama.from_pretrained(tmp_path / "merged", progress=False)(IDS)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    again = Llama.from_pretrained(base, lora=tmp_path / "second", progress=False)(IDS)
    np.testing.assert_allclose(again, theirs, atol=1e-5, rtol=1e-5)
    (tmp_path / "line.txt").write_text(TEXT[:31])
    found = evaluate(base, tmp_path / "line.txt", lora=tmp_path / "second", sequence_length=32, progress=False)
    ids = torch.tensor([[*run.tokenizer.encode(TEXT[:31], add_special_tokens=False), run.tokenizer.eos_id]])
    assert found.nats == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-5)
    # the same command goes on from the run's own checkpoint, and other settings are of another model
    assert train(config(base, tmp_path / "run", lora=lora, steps=3)).losses[0][0] == 3
    with pytest.raises(ValueError, match=r"lora.alpha=16.0 contradicts lora.start=.*, whose own is 8.0; leave it out"):
        Run(config(base, tmp_path / "run", lora={**lora, "alpha": 16}))
    assert Run(config(base, tmp_path / "run", lora={**lora, "alpha": 8, "rank": 4})).config.lora.rank == 4
    with pytest.raises(ValueError, match=r"is of another model: .*lora_rslora True"):
        train(config(base, tmp_path / "run", lora={"rank": 4, "alpha": 8}))
    adapted(base, tmp_path / "tables", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match=r"lora\.targets: embed_tokens is no kernel of the layers"):
        Run(config(base, tmp_path / "new", lora={"start": str(tmp_path / "tables")}))
    with pytest.raises(ValueError, match=r"needs model\.start"):
        config(base, tmp_path / "new", lora=lora, model={})


def test_new_adapters_take_patterns_and_single_modules(bases, tmp_path):
    """Both layers' q_proj are of one scale, so that the first is padded: nothing of the padding is in the merged model."""
    base, both = bases["llama"], {"rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {r"layers\.0\..*": 8}}
    lora = {"rank": 4, "targets": ["q_proj", "layers.1.mlp.up_proj"], **both}
    train(config(base, tmp_path / "run", lora=lora))
    export(tmp_path / "run", tmp_path / "out", adapter=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    assert [p.shape[0] for name, p in theirs.named_parameters() if "lora_A" in name] == [2, 4, 4]
    export(tmp_path / "run", tmp_path / "merged")
    logits = Llama.from_pretrained(tmp_path / "merged", progress=False)(IDS)
    np.testing.assert_allclose(logits, logits_of(theirs), atol=1e-5, rtol=1e-5)
    for wrong, message in (
        ({"targets": ["layers.7.self_attn.q_proj"]}, "is no module of this model of 2 layers"),
        ({"rank_pattern": {"r_proj": 2}}, "lora.rank_pattern: 'r_proj' fits no module that has an adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(config(base, tmp_path / "no", lora={"rank": 4, **wrong}))


def test_the_command_completes_as_peft_does(made, tmp_path, monkeypatch):
    base, folder, theirs = made("rslora and ranks")
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt_token_ids": IDS[0, :9].tolist()}))
    flags = ["generate", base, "--lora", folder, "--prompts-file", tmp_path / "in.jsonl", "--max-tokens", 6, "--ignore-eos"]
    monkeypatch.setattr(sys, "argv", ["jaxtp", *map(str, flags), "--output", str(tmp_path / "out.jsonl")])
    cli.main()
    with torch.no_grad():
        expected = theirs.generate(torch.tensor(IDS[:1, :9]).long(), do_sample=False, max_new_tokens=6, eos_token_id=None)
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert record["outputs"][0]["token_ids"] == expected[0, 9:].tolist()


def test_checkpoints_of_earlier_runs_are_of_the_same_adapters():
    assert Lora(rank=4).told() == {"lora_rank": 4, "lora_alpha": 16.0, "lora_targets": ", ".join(sorted(KERNELS))}
    kept = {"rank": 4, "alpha": 16.0, "targets": KERNELS}  # as earlier runs kept their settings
    assert parse({"folder": "x", "model": {"start": "y"}, "lora": kept}).lora.lora == Lora(rank=4)
    assert parse({"folder": "x", "lora": {**kept, "rank": 0}}).lora.lora is None
