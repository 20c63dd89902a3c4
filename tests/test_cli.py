"""The command: prompts in, text or JSONL out; mistakes end with one line and exit code 2."""

import json
import os
import subprocess
import sys

import pytest
import tiny
from conftest import COMPILED

from jaxtp import LLM, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


def jaxtp(*arguments, stdin=""):
    """Runs the command as a user does, with no help from the test's own process."""
    environment = {**os.environ, **COMPILED, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    environment["PYTHONWARNINGS"] = "error::DeprecationWarning:jaxtp"
    return subprocess.run(
        [sys.executable, "-m", "jaxtp", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


@pytest.fixture(scope="module")
def expected(folder):
    """What the library gives for the prompts."""
    found = LLM(folder, progress=False).generate(["Hello", "How are"], SamplingParams(temperature=0, max_tokens=9))
    return [request.outputs[0] for request in found]


def test_prompts_on_the_command_line(folder, expected):
    done = jaxtp("generate", folder, "--prompt", "Hello", "How are", "--max-tokens", 9, "-tp", 2, "--virtual-devices", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Hello{expected[0].text}\n\nHow are{expected[1].text}\n"
    for line in ("weights:", "KV cache:", "maximum concurrency", "ms/token"):
        assert line in done.stderr


def test_files_in_and_out(folder, expected, tmp_path):
    (tmp_path / "in.txt").write_text("Hello\n\nHow are\n")
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello"}\n{"prompt": "How are"}\n')
    for name in ("in.txt", "in.jsonl"):
        out = tmp_path / f"{name}.out"
        done = jaxtp("generate", folder, "--prompts-file", tmp_path / name, "--output", out, "--max-tokens", 9)
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert [r["prompt"] for r in records] == ["Hello", "How are"]
        assert [r["outputs"][0]["token_ids"] for r in records] == [e.token_ids for e in expected]
        assert [r["outputs"][0]["text"] for r in records] == [e.text for e in expected]


def test_a_stream(folder, expected):
    done = jaxtp("generate", folder, "--prompt", "Hello", "--max-tokens", 9, "--stream")
    assert done.stdout == f"Hello{expected[0].text}\n"


def test_a_chat(folder, tmp_path):
    chatty = tiny.checkpoint(tmp_path / "chatty")
    settings = json.loads((chatty / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant: "
    (chatty / "tokenizer_config.json").write_text(json.dumps(settings))
    done = jaxtp("chat", chatty, "--max-tokens", 5, "--system", "Be brief", stdin="Hi\nMore\n")
    assert done.returncode == 0, done.stderr
    first = LLM(chatty, progress=False).generate(
        "system: Be brief user: Hi assistant: ", SamplingParams(temperature=0, max_tokens=5)
    )
    assert done.stdout.startswith(f"> {first[0].outputs[0].text}\n> ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "./nowhere", "--prompt", "x"), "jaxtp: there is no checkpoint folder nowhere"),
        (("generate", "FOLDER"), "jaxtp: give either --prompt TEXT or --prompts-file FILE"),
        (("generate", "FOLDER", "--prompt", "x", "-tp", "3"), "jaxtp: tp=3 does not divide 8 query heads"),
        (("generate", "FOLDER", "--prompt", "x", "--temperature", "-1"), "jaxtp: temperature=-1.0 must be at least 0"),
        (("generate", "FOLDER", "--prompt", "x", "-tp", "2", "--virtual-devices", "1"), "needs 2 devices, 1 are there"),
        (("chat", "FOLDER"), "jaxtp: this tokenizer has no chat template"),
    ],
)
def test_mistakes_end_with_one_line(folder, arguments, message):
    done = jaxtp(*(folder if a == "FOLDER" else a for a in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_the_flags():
    done = jaxtp("generate", "--help")
    for flag in ("--tensor-parallel-size", "-tp", "--max-model-len", "--gpu-memory-utilization", "--virtual-devices"):
        assert flag in done.stdout
