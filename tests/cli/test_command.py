"""The command as newcomers type it: what they mean is done, and what cannot be is said in one line, with exit code 2."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import tiny

from jaxtp import LLM, CompletionOutput, Logprob, SamplingParams, cli
from jaxtp.cli.options import Engine
from jaxtp.cli.show import logprobs_table

RUN = Path(__file__).parents[2] / "configs" / "train" / "demo.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def jaxtp(monkeypatch, capsys):
    """Runs the command in this process: (exit code, what it printed, what it said)."""
    monkeypatch.setenv("JAXTP_COMPILATION_CACHE", "")  # so that what --no-compilation-cache sets is taken back

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxtp", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        heard = capsys.readouterr()
        return code, heard.out, heard.err

    return run


def test_alone_it_lists_its_verbs_and_an_example(jaxtp):
    code, printed, said = jaxtp()
    assert (code, said) == (0, "")
    for verb in cli.VERBS:
        assert sum(line.startswith(f"  {verb} ") for line in printed.splitlines()) == 1
    assert 'jaxtp generate --prompt "ROMEO:"' in printed
    assert all(len(line) <= 128 for line in printed.splitlines())
    assert jaxtp("--help")[1] == printed
    assert jaxtp("--version")[1].startswith("jaxtp 0.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("serve", "which model? jaxtp serve MODEL"),
        ("serve m --tool-call-parser hermes", "--tool-call-parser is of tools that a model calls"),
        ("serve m --ssl-keyfile k", "--ssl-keyfile is not there: what stands before a server"),
        ("serve m --port 70000", "port=70000 must be at most 65535"),
        ("serve m --api-key=", "api_key holds an empty key"),
        ("serve m --config none.yaml", "none.yaml"),
        ("genrate", "there is no jaxtp genrate; there is generate"),
        ("--prompt x", "the verb comes first: jaxtp generate --prompt"),
        ("generate --prompt x --enforce-eager", "--enforce-eager is not needed: every program is compiled"),
        ("generate --prompt x --trust-remote-code", "--trust-remote-code is not needed: no code of a checkpoint is ever run"),
        ("generate --prompt x --swap-space 4", "--swap-space is not there: pages of the KV cache stay on the devices"),
        ("generate --prompt x --block_size=16", "--block-size is not there: pages"),
        ("generate --prompt x --kv-cache-memory-bytes 0", "kv_cache_memory_bytes=0 must be at least 1"),
        ("generate --prompt x --scheduling-policy lifo", "invalid choice 'lifo' for argument '--scheduling-policy'"),
        ("generate --prompt x --enable-chunked-prefill", "--enable-chunked-prefill is not needed: prompts go along in chunks"),
        ("generate --prompt x --distributed-executor-backend ray", "--distributed-executor-backend is not needed"),
        ("chat m --port 8000", "--port is a server's: `jaxtp serve MODEL` has it"),
        ("bench latency m --tokenizer-mode slow", "--tokenizer-mode is not needed"),
        ("generate --promt x", "jaxtp generate has no --promt; there is --prompt"),
        ("generate --prompt x --max-new-tokens 5", "has no --max-new-tokens; it is --max-tokens here"),
        ("doctor --prompt x", "jaxtp doctor has no --prompt; there is --plot ("),
        ("generate --prompt x --max-tokens many", "--max-tokens takes a whole number, not 'many'"),
        ("generate --prompt x --top-p much", "--top-p takes a number, not 'much'"),
        (
            "generate --prompt x --dtype bf16",
            "invalid choice 'bf16' for argument '--dtype'. Expected one of ('auto', ",
        ),
        ("generate --prompt x -tp", "missing value for argument '-tp/--tensor-parallel-size'"),
        ("generate m n --prompt x", "takes no 'n' there"),
        ("generate m --model n --prompt x", "two models were given, m and --model n"),
        ("generate --prompt x --stream --n 2", "--stream prints one completion of each prompt"),
        ("generate --prompt x --output /nowhere/out.jsonl", "--output: there is no folder /nowhere"),
        ("generate --prompt x --output /", "--output: / is a folder, not a file"),
        ("generate --prompt x --tp-plan none.json", "none.json: No such file or directory"),
        ("generate --prompt x --hf-overrides [1]", "--hf-overrides must be a JSON object"),
        ("generate --prompt \udcff", "is not UTF-8 text"),
        ("generate --prompts-file none.txt", "none.txt: No such file or directory"),
        ("chat", "which model? jaxtp chat MODEL"),
        ("bench latency", "which model? jaxtp bench latency MODEL"),
        ("export", "missing from jaxtp export: RUN The folder of the run. FOLDER Where to write."),
        ("train", "missing from jaxtp train: RUN.yaml"),
        ("train none.yaml", "none.yaml does not exist"),
        ("train RUN --optimizer.lerning-rate 1", "has no --optimizer.lerning-rate; there is --optimizer.learning-rate"),
        ("train RUN --steps 0", "steps=0 must be at least 1"),
        ("profile RUN --parallel.tpp 2", "has no --parallel.tpp; there is --parallel.tp"),
    ],
)
def test_mistakes_end_with_one_line(jaxtp, arguments, said):
    code, printed, heard = jaxtp(*arguments.replace("RUN", str(RUN)).split(" "))
    assert (code, printed) == (2, "")
    assert said in heard
    assert heard.startswith("jaxtp: ")
    assert heard.count("\n") == 1
    assert len(heard) < 300


def test_the_compiler_is_asked_for_before_the_search(jaxtp, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("jaxtp.planner.plan", lambda *_, **__: pytest.fail("it has searched already"))
    code, _, said = jaxtp("plan", "llama-3.1-8b", "--gpus", "8xH100", "--compile")
    assert code == 2
    assert "pip install 'jaxtp[gpu-compiler]'" in said
    assert said.count("\n") == 1


def test_the_engine_s_flags_reach_it(jaxtp, monkeypatch):
    asked = []
    monkeypatch.setattr("jaxtp.LLM", lambda model, **arguments: asked.append(arguments) or stop())
    flags = "--kv-cache-memory-bytes 4096 --no-enable-prefix-caching --scheduling-policy priority --max-num-queued 9"
    for more in ("", f"--max-num-batched-tokens 64 {flags}"):
        assert jaxtp("generate", "m", "--prompt", "x", *more.split())[0] == 2
    names = ("max_num_batched_tokens", "kv_cache_memory_bytes", "enable_prefix_caching", "scheduling_policy", "max_num_queued")
    found = [[arguments[name] for name in names] for arguments in asked]
    assert found == [[None, None, True, "fcfs", None], [64, 4096, False, "priority", 9]]


@pytest.mark.parametrize("how", ["-tp 2", "-tp=2", "--tensor_parallel_size 2", "--tensor_parallel_size=2"])
def test_sizes_are_taken_as_people_write_them(jaxtp, how, monkeypatch):
    asked = []
    monkeypatch.setattr(Engine, "llm", lambda engine, model: asked.append((model, engine.tensor_parallel_size)) or stop())
    assert jaxtp("generate", "--model", "m", "--prompt", "x", *how.split(" "))[0] == 2
    assert asked == [("m", 2)]


def stop():
    raise ValueError("far enough")


def test_logprobs_are_printed_below_the_text(jaxtp, folder):
    output = (
        LLM(folder, progress=False).generate("Hello", SamplingParams(temperature=0, max_tokens=3, logprobs=2))[0].outputs[0]
    )
    for stream in ([], ["--stream"]):
        code, printed, _ = jaxtp("generate", folder, "--prompt", "Hello", "--max-tokens", 3, "--logprobs", 2, *stream)
        assert code == 0
        assert printed == f"Hello{output.text}\n\n{logprobs_table(output)}\n"


def test_a_table_of_logprobs():
    found = {5: Logprob(-0.25, 1, "a\n"), 7: Logprob(-2.5, 2, "b"), 3: Logprob(-10.0, 3, "c")}
    output = CompletionOutput(0, "a\nb", [5, 7], logprobs=[found, {7: Logprob(-1.0, 9), 5: Logprob(-0.5, 1, "x")}])
    assert logprobs_table(output).splitlines() == [
        "token  logprob  rank  alternatives",
        r"'a\n'   -0.250     1  'b' -2.500  'c' -10.000",
        "7       -1.000     9  'x' -0.500",
    ]


def test_a_chat_template_that_refuses(jaxtp, tmp_path):
    refusing = tiny.checkpoint(tmp_path / "refusing")
    settings = json.loads((refusing / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}{{ messages[0].content }}"
    )
    (refusing / "tokenizer_config.json").write_text(json.dumps(settings))
    code, _, said = jaxtp("chat", refusing, "--system", "Be brief")
    told = [line for line in said.splitlines() if line.startswith("jaxtp: ")]
    assert code == 2
    assert len(told) == 1
    assert "no system role here" in told[0]


def test_the_flag_switches_the_compilation_cache_off(jaxtp, monkeypatch):
    monkeypatch.setattr(
        "jaxtp.generate.llm.compilation_cache.use", lambda: seen.append(os.environ["JAXTP_COMPILATION_CACHE"]) or stop()
    )
    seen = []
    for flag in ([], ["--no-compilation-cache"]):
        assert jaxtp("generate", "demo", "--prompt", "x", *flag)[2].endswith("jaxtp: far enough\n")
    assert seen == ["", "0"]
