"""A run: what it keeps, what it says, how it goes on after being stopped, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import kills
import numpy as np
import pytest
import tiny
from conftest import COMPILED

from jaxtp import LLM, Llama, SamplingParams, make_mesh, xla_flags
from jaxtp.train import Diverged, Run, export, load, train
from jaxtp.train.config import parse

TEXT = "the quick brown fox jumps over the lazy dog and runs away from the bear. " * 60
BASE = {
    "steps": 12,
    "model": {"dtype": "float32", "shape": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_kv_heads": 2}},
    "data": {"sequence_length": 32, "batch_size": 8, "validation_share": 0.1},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
    "checkpoints": {"every": 4},
    "log": {"every": 4, "tensorboard": False},
    "validate_every": 6,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    tiny.byte_tokenizer(folder, 128)
    return folder


def config(text, folder, **changes):
    raw = json.loads(json.dumps(BASE))
    raw["data"] |= {"train": [str(text / "text.txt")], "tokenizer": str(text)}
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in raw else value
    return parse({**raw, "folder": str(folder)})


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run of the twelve steps, for the tests that begin where one has ended: each has a copy."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(config(text, folder))
    return folder


@pytest.fixture
def ended(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return {line["step"]: line["nats"] for line in lines(folder) if "nats" in line}


def test_a_run_learns_keeps_and_tells(text, tmp_path):
    result = train(config(text, tmp_path, steps=40, checkpoints={"every": 10, "keep": 2, "best": 1}))
    assert result.losses[-1][1] < 0.7 * result.losses[0][1]
    assert [step for step, _ in result.validation] == [6, 12, 18, 24, 30, 36, 40]
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert {30, 40} <= kept
    assert len(kept) <= 3
    found = lines(tmp_path)
    assert {"loss", "nats", "grad_norm", "learning_rate", "tokens_per_second"} <= set(found[0])
    assert any("validation_nats_per_character" in line for line in found)
    assert 0 < result.goodput < 1


def test_the_compilers_options_reach_the_step(text, tmp_path, monkeypatch):
    """One that no compiler knows shows that they arrive; one setting keeps them away."""
    monkeypatch.setattr(xla_flags, "options", lambda mesh, flags: {"xla_write_the_paper": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_write_the_paper"):
        train(config(text, tmp_path / "with", steps=1))
    assert train(config(text, tmp_path / "without", steps=1, parallel={"xla_flags": False})).steps == 1


def test_export_is_what_transformers_loads(ended, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    export(ended, tmp_path / "hf", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = np.arange(3, 19)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    ours = Llama.from_pretrained(tmp_path / "hf", mesh=make_mesh(tp=2), progress=False)
    np.testing.assert_allclose(ours(ids.astype(np.int32)), expected, atol=1e-5, rtol=0)
    assert LLM(tmp_path / "hf", progress=False).generate("the quick", SamplingParams(max_tokens=4))[0].outputs[0].text
    with pytest.raises(ValueError, match=r"has no checkpoint of step 5; steps: \[8, 12\]"):
        export(ended, tmp_path / "no", step=5)


def test_export_leaves_what_stands_in_its_folder_alone_unless_told(ended, tmp_path):
    folder = tiny.checkpoint(tmp_path / "precious")
    (folder / "generation_config.json").write_text('{"eos_token_id": 77}')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match=r"precious is there and not empty; give a new folder, or --overwrite"):
        export(ended, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export(ended, folder, overwrite=True)
    export(ended, tmp_path / "new")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "new" / name).read_bytes() != before[name]
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"  # what the run computed in


MESHES = [{"dp": 8, "zero": 3}, {"dp": 2, "tp": 4, "zero": 1}, {"tp": 8, "dp": 1, "zero": 0}]


@pytest.mark.slow
def test_a_run_goes_on_anywhere(text, tmp_path):
    shape = {"dtype": "float32", "shape": {**BASE["model"]["shape"], "num_heads": 8}}
    alone = {"parallel": {"dp": 1}, "model": shape}
    whole = train(config(text, tmp_path / "whole", **alone)).losses
    shutil.copytree(tmp_path / "whole", tmp_path / "first")
    shutil.rmtree(tmp_path / "first" / "checkpoints" / "12")
    for i, parallel in enumerate(MESHES):
        shutil.copytree(tmp_path / "first", tmp_path / f"on-{i}")
        rest = train(config(text, tmp_path / f"on-{i}", parallel=parallel, model=shape)).losses
        assert [step for step, _ in rest] == list(range(9, 13))
        np.testing.assert_allclose([v for _, v in rest], [v for _, v in whole[8:]], atol=1e-5, rtol=0)
    shutil.copytree(tmp_path / "first", tmp_path / "same")
    same = train(config(text, tmp_path / "same", **alone)).losses
    assert [v for _, v in same] == [v for _, v in whole[8:]]  # to the last bit


def test_a_run_of_parts_of_rows_goes_on_without_them(text, tmp_path):
    """A length that cp does not divide, whose rows are filled up; what is kept knows nothing of it."""
    settings = {"data": {**BASE["data"], "sequence_length": 31}, "parallel": {"dp": 1}}
    whole = train(config(text, tmp_path / "whole", **settings))
    parallel = {"dp": 2, "cp": 4, "zero": 2}
    first = train(config(text, tmp_path / "run", **{**settings, "parallel": parallel}, steps=12))
    np.testing.assert_allclose([v for _, v in first.losses], [v for _, v in whole.losses], atol=1e-5, rtol=0)
    np.testing.assert_allclose([v for _, v in first.validation], [v for _, v in whole.validation], atol=1e-5, rtol=0)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    rest = train(config(text, tmp_path / "run", **settings))
    np.testing.assert_allclose([v for _, v in rest.losses], [v for _, v in whole.losses[8:]], atol=1e-5, rtol=0)


PIPELINES = {
    "pp 4": {"dp": 1, "pp": 4, "accumulate": 4},
    "dp 2 × pp 2, uneven, v 2": {"dp": 2, "pp": 2, "accumulate": 2, "schedule": "interleaved_1f1b", "chunks": 2},
    "dp 8": {"dp": 8},
}


@pytest.mark.slow
def test_a_run_leaves_a_pipeline_and_comes_to_one(text, tmp_path):
    """One run: each goes on from what the one before has left four steps earlier, so that all write and all read."""
    model = {"dtype": "float32", "shape": {**BASE["model"]["shape"], "num_layers": 5}}
    settings = {"model": model, "steps": 16, "checkpoints": {"every": 4, "keep": 4}}
    whole = train(config(text, tmp_path / "whole", parallel={"dp": 1}, **settings))
    folder = tmp_path / "run"
    for begun, name in ((0, "pp 4"), (4, "dp 8"), (8, "dp 2 × pp 2, uneven, v 2"), (12, "pp 4")):
        for step in (4, 8, 12, 16):
            if step > begun:
                shutil.rmtree(folder / "checkpoints" / str(step), ignore_errors=True)
        rest = train(config(text, folder, parallel=PIPELINES[name], **settings))
        validation = [v for v in whole.validation if v[0] > begun]
        for found, expected in ((rest.losses, whole.losses[begun:]), (rest.validation, validation)):
            assert [step for step, _ in found] == [step for step, _ in expected]
            np.testing.assert_allclose([v for _, v in found], [v for _, v in expected], atol=1e-5, rtol=0)
    for step in (8, 12, 16):  # written without a pipeline, with one and with another; the run's config names the last
        export(folder, tmp_path / str(step), dtype="float32", step=step)
        assert Llama.from_pretrained(tmp_path / str(step), progress=False).config.num_layers == 5


@pytest.mark.slow
def test_text_is_sampled_on_any_mesh(text, tmp_path):
    model = {"dtype": "float32", "shape": {**BASE["model"]["shape"], "num_layers": 5}}
    found = []
    everything = {"dp": 1, "cp": 2, "pp": 2, "tp": 2, "accumulate": 2, "sequence_parallel": True}
    meshes = {"dp": 1}, everything, PIPELINES["dp 2 × pp 2, uneven, v 2"]
    for i, parallel in enumerate(meshes):
        log = {"sample_every": 4, "sample_prompt": "a", "tensorboard": False}
        train(config(text, tmp_path / str(i), parallel=parallel, model=model, steps=4, log=log))
        found.append([line["sample"] for line in lines(tmp_path / str(i)) if "sample" in line])
    assert len(found[0]) == 1
    assert all(each == found[0] for each in found)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(text, ended, caplog):
    expected = losses(ended)[12]
    newest = ended / "checkpoints" / "12" / "state"
    for path in sorted(p for p in newest.rglob("*") if p.is_file() and p.parent.name == "d"):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
    result = train(config(text, ended))
    assert "the checkpoint of step 12 cannot be read" in caplog.text
    assert result.losses[0][0] == 9
    assert result.losses[-1][1] == expected


def test_a_checkpoint_of_another_model_is_refused(text, ended):
    other = {"dtype": "float32", "shape": {**BASE["model"]["shape"], "num_layers": 3}}
    with pytest.raises(ValueError, match=r"is of another model: num_hidden_layers 2 \(here 3\)"):
        train(config(text, ended, model=other))


def test_a_full_disk_is_said_and_loses_nothing(text, ended, monkeypatch):
    from jaxtp.train import checkpoints

    shutil.rmtree(ended / "checkpoints" / "12")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(config(text, ended))
    monkeypatch.undo()
    assert train(config(text, ended)).losses[0][0] == 9


def test_a_run_that_diverges_stops(text, tmp_path):
    with pytest.raises(Diverged, match="3 steps in a row up to step 3 had a loss or gradient that is not finite"):
        train(config(text, tmp_path, max_nonfinite=3, optimizer={"learning_rate": 1e-2, "eps": 1e-8}, z_loss=float("inf")))


def test_fine_tuning_starts_from_a_checkpoint(text, tmp_path):
    tiny.checkpoint(tmp_path / "model")
    changes = {"model": {"start": str(tmp_path / "model"), "dtype": "float32"}, "steps": 1}
    made = Run(config(text, tmp_path / "run", **changes))
    model = Llama.from_pretrained(tmp_path / "model", progress=False)
    expected = np.asarray(model.embed.get_value())
    np.testing.assert_array_equal(made.first_state().params["embed"], expected)
    assert made.train().losses[0][1] > 1


@pytest.mark.slow
def test_lora_goes_on_anywhere_and_is_exported_merged(text, tmp_path):
    tiny.checkpoint(tmp_path / "model")
    changes = {"model": {"start": str(tmp_path / "model"), "dtype": "float32"}, "lora": {"rank": 4}}
    whole = train(config(text, tmp_path / "whole", parallel={"dp": 1}, **changes)).losses
    assert whole[-1][1] < whole[0][1]
    shutil.copytree(tmp_path / "whole", tmp_path / "on")
    shutil.rmtree(tmp_path / "on" / "checkpoints" / "12")
    log = {"every": 4, "tensorboard": False, "sample_every": 12, "sample_prompt": "the"}
    spread = {"dp": 1, "tp": 8, "zero": 3, "sequence_parallel": True}  # KV heads stand twice there
    rest = train(config(text, tmp_path / "on", parallel=spread, log=log, **changes)).losses
    np.testing.assert_allclose([v for _, v in rest], [v for _, v in whole[8:]], atol=1e-5, rtol=0)
    assert any(line.get("sample", "").startswith("the") for line in lines(tmp_path / "on"))
    kept = (tmp_path / "on" / "checkpoints" / "12" / "state" / "_METADATA").read_text()
    assert "q_proj.a" in kept
    assert "embed" not in kept  # the frozen weights are not saved
    export(tmp_path / "on", tmp_path / "merged", dtype="float32")
    batch = next(Run(config(text, tmp_path / "on", parallel=spread, **changes)).batches["train"].from_step(0))
    before, after = (nats(tmp_path / folder, batch) for folder in ("model", "merged"))
    assert after < before == pytest.approx(whole[0][1], abs=1e-5)
    with pytest.raises(ValueError, match=r"is of another model: lora_rank 4 \(here 2\)"):
        train(config(text, tmp_path / "on", **{**changes, "lora": {"rank": 2}}))


def nats(folder, batch):
    """A checkpoint's loss on a batch, per counted token."""
    model = Llama.from_pretrained(folder, mesh=make_mesh(), progress=False)
    tokens, labels, weights = (np.asarray(a)[0] for a in (batch.tokens, batch.labels, batch.weights))
    logp = jax.nn.log_softmax(np.asarray(model(tokens)))
    return -float((np.take_along_axis(np.asarray(logp), labels[..., None], -1)[..., 0] * weights).sum() / weights.sum())


def test_conversations_samples_and_profiles(text, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(text, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    pairs = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(40)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    data = {"train": [str(folder / "chat.jsonl")], "tokenizer": str(folder), "validation_share": 0.2, "batch_size": 8}
    log = {"every": 2, "tensorboard": True, "sample_every": 4, "sample_prompt": "user: 1?", "profile_steps": "2:3"}
    result = train(config(text, tmp_path / "run", data=data, log=log, steps=4))
    assert result.losses[-1][1] < result.losses[0][1]
    assert any(line.get("sample", "").startswith("user: 1?") for line in lines(tmp_path / "run"))
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert list((tmp_path / "run" / "profile").rglob("*.json.gz"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"dp": 3}}, "dp=3 does not divide the 8 rows of a microbatch"),
        ({"parallel": {"dp": 1, "tp": 3}}, "tp=3 does not divide 4 query heads"),
        ({"data": {"batch_size": 6, "accumulate": 4}}, "data.accumulate is no setting"),
        ({"parallel": {"accumulate": 3}}, "parallel.accumulate=3 must divide data.batch_size=8"),
        ({"data": {"sequence_length": 4096}}, "data.sequence_length=4096 exceeds the model's max_position_embeddings=1024"),
        ({"data": {"train": []}}, "data.train names no file"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate=0.0 must be above 0"),
        ({"model": {"shape": {"vocab_size": 50}}}, "holds token .*, but the model's vocabulary has 50"),
        ({"log": {"profile_steps": "ten"}}, "log.profile_steps='ten' must be FIRST:LAST"),
        ({"model": {"start": "a", "preset": "b"}}, "model.start and model.preset exclude one another"),
        ({"parallel": {"pp": 4, "dp": 1, "accumulate": 2}}, "pp=4.* makes 4 stages of 2 layers; legal pp with them: 1, 2"),
        (
            {
                "parallel": {"pp": 2, "layers_per_stage": [1, 2]},
                "model": {"shape": {**BASE["model"]["shape"], "num_layers": 3}},
                "optimizer": {"name": "adafactor"},
            },
            "adafactor clips by the RMS of whole stacks, in which 3 layers on 2 stages .* use adamw or muon",
        ),
        ({"parallel": {"pp": -1, "dp": 1}}, "parallel.pp=-1 must be at least 1"),
        ({"parallel": {"pp": 2, "zero": 2}}, "with pp use zero 0 or 1"),
        ({"parallel": {"context_strategy": "ring"}}, "context_strategy='ring' is over cp, which is 1 here; set parallel.cp"),
        (
            {"parallel": {"cp": 4, "tp": 2}, "log": {"sample_every": 2}},
            r"log.sample_every=2: to make text weights lie over tp·cp=2·4, which does not divide .*; leave samples out",
        ),
        (
            {"parallel": {"pp": 2, "schedule": "interleaved_1f1b", "chunks": 2}},
            "2 ranks must divide the microbatches; 1 could be 2",
        ),
        ({"parallel": {"chunks": 2}}, "they need parallel.pp of at least 2"),
        (
            {"parallel": {"pp": 2, "chunks": 2, "accumulate": 2}},
            "1f1b has one chunk a rank, not 2; interleaved_1f1b has several",
        ),
        ({"lora": {"rank": 8}}, "lora.rank=8 needs model.start, the checkpoint that the adapters are for"),
        ({"lora": {"rank": 8, "targets": ["q"]}}, r"lora.targets=\['q'\] must be some of q_proj, k_proj"),
    ],
)
def test_what_cannot_be_is_refused_before_training(text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Run(config(text, tmp_path, **changes))


def test_flags_come_after_the_file(text, tmp_path):
    import yaml

    from jaxtp.train.config import plain

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain(config(text, tmp_path / "run"))))
    found = load(tmp_path / "run.yaml", ["--optimizer.learning-rate", "0.5", "--data.batch-size", "16"])
    assert (found.optimizer.learning_rate, found.data.batch_size, found.steps) == (0.5, 16, 12)
    (tmp_path / "bad.yaml").write_text("folder: x\noptimiser: {}\n")
    with pytest.raises(ValueError, match="optimiser is no setting; settings there: folder, steps"):
        load(tmp_path / "bad.yaml")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("configs/train/*.yaml")), ids=lambda path: path.stem)
def test_the_configs_that_ship_are_legal(path):
    assert load(path).folder == f"runs/{path.stem}"


def written(text, folder, steps):
    """The file of a run."""
    import yaml

    from jaxtp.train.config import plain

    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(plain(config(text, folder, steps=steps, log={"every": 1, "tensorboard": False}))))
    return path


def reached(folder):
    return max(losses(folder), default=0) if (folder / "log.jsonl").exists() else 0


@pytest.mark.slow
def test_killed_ten_times_the_curve_is_the_same_to_the_last_bit(text, tmp_path, monkeypatch):
    """Real processes, but forked from one that has imported everything."""
    for key, value in {**COMPILED, "JAX_PLATFORMS": "cpu"}.items():
        monkeypatch.setenv(key, value)
    whole = kills.start(written(text, tmp_path / "whole", 60))
    whole.join(300)
    assert whole.exitcode == 0
    path, rng, lost = written(text, tmp_path / "killed", 60), np.random.default_rng(0), []
    for _ in range(10):
        process = kills.start(path)
        target = reached(tmp_path / "killed") + int(rng.integers(1, 6))
        while process.is_alive() and reached(tmp_path / "killed") < target:
            time.sleep(0.02)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        complete = [int(p.name) for p in (tmp_path / "killed" / "checkpoints").glob("*") if p.name.isdigit()]
        lost.append(reached(tmp_path / "killed") - max(complete, default=0))
    last = kills.start(path)
    last.join(300)
    assert last.exitcode == 0
    assert max(lost) <= 2 * 4  # a save begun but not complete, and the steps since
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_saves_and_says_so(text, tmp_path):
    command = [sys.executable, "-m", "jaxtp", "train", str(written(text, tmp_path / "run", 100_000))]
    environment = {**os.environ, **COMPILED, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and reached(tmp_path / "run") < 3:
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "SIGTERM: saved at step" in said
    saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
    assert saved >= 3


def test_the_state_is_donated(text, tmp_path):
    made = Run(config(text, tmp_path))
    state = made.first_state()
    with jax.set_mesh(made.mesh):
        compiled = jax.jit(made.trainer.step, donate_argnums=0).lower(state, next(made.batches["train"].from_step(0))).compile()
    memory = compiled.memory_analysis()
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= held
