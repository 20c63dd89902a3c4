"""What a start loads: nothing that it does not use; and a second start compiles nothing."""

import json
import os
import subprocess
import sys

import pytest

import jaxtp

UNUSED = {
    *("grain", "orbax", "tensorboardX", "pydantic", "matplotlib", "scipy", "pandas", "pyarrow"),
    *("transformers", "torch", "sentencepiece", "tiktoken", "huggingface_hub"),
    *("fastapi", "starlette", "uvicorn", "prometheus_client"),
}
HEAVY = UNUSED | {"jax", "jaxlib", "flax", "numpy", "optax", "safetensors", "tokenizers", "jinja2", "yaml"}
ROOMS = {"jaxtp.train", "jaxtp.audit", "jaxtp.draw", "jaxtp.load"}  # that generating does not enter

STAGES = """
import contextlib, io, json, sys
seen = {}
def stage(name, *arguments):
    from jaxtp.cli import main
    sys.argv = ["jaxtp", *arguments]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        main()
    assert said.getvalue(), name
    seen[name] = sorted(sys.modules)
import jaxtp
seen["import jaxtp"] = sorted(sys.modules)
_ = jaxtp.SamplingParams, jaxtp.RequestOutput, jaxtp.CompletionOutput, jaxtp.Logprob
seen["what requests are"] = sorted(sys.modules)
stage("jaxtp --version", "--version")
stage("jaxtp", )
stage("jaxtp generate --help", "generate", "--help")
stage("jaxtp serve --help", "serve", "--help")
import jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
stage("jaxtp generate", "generate", "--prompt", "ROMEO:", "--max-tokens", "2")
print(json.dumps({"modules": seen, "hits": events.count("cache_hits"), "misses": events.count("cache_misses")}))
"""


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Two starts, one after another, by a user whose cache folder is empty before the first."""
    folder = tmp_path_factory.mktemp("cache")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "JAXTP_"))}
    environment = {**kept, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder)}
    run = [sys.executable, "-c", STAGES]
    done = [subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300) for _ in range(2)]
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    return [{**json.loads(d.stdout.splitlines()[-1]), "said": d.stderr, "folder": folder} for d in done]


def loaded(start, stage, names):
    """Which of the packages or rooms a stage has loaded."""
    return sorted({name for name in names for module in start["modules"][stage] if f"{module}.".startswith(f"{name}.")})


def test_importing_jaxtp_loads_nothing_else(starts):
    modules = {module.partition(".")[0] for module in starts[0]["modules"]["import jaxtp"]}
    assert loaded(starts[0], "import jaxtp", HEAVY | {"rich", "tyro"}) == []
    assert [m for m in starts[0]["modules"]["import jaxtp"] if m.startswith("jaxtp")] == ["jaxtp"], modules


@pytest.mark.parametrize(
    "stage", ["what requests are", "jaxtp --version", "jaxtp", "jaxtp generate --help", "jaxtp serve --help"]
)
def test_what_needs_no_device_loads_no_jax(starts, stage):
    assert loaded(starts[0], stage, HEAVY) == []


def test_generating_loads_nothing_that_it_does_not_use(starts):
    assert len(loaded(starts[0], "jaxtp generate", {"jax", "flax", "tokenizers"})) == 3  # the test sees what is there
    assert loaded(starts[0], "jaxtp generate", UNUSED | ROOMS) == []


def test_a_second_start_compiles_nothing(starts):
    first, second = starts
    assert first["hits"] == 0
    assert first["misses"] >= 3  # begin, a step with the prompt, steps without
    assert second["misses"] == 0
    assert second["hits"] == first["misses"]
    for start in starts:
        assert start["said"].count(f"compiled programs are kept in {start['folder']}/jaxtp/compiled/") == 1


def test_every_name_of_the_package_is_found_and_listed():
    assert set(jaxtp.__all__) <= set(dir(jaxtp))
    found = {name: getattr(jaxtp, name) for name in jaxtp.__all__}
    assert found["LLM"].__module__ == "jaxtp.generate.llm"
    assert jaxtp.distributed.processes  # a room that no name comes from
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = jaxtp.LLMs
