"""`jaxtp bench serve`: what it prints and writes, and what it says of flags that cannot be."""

import json
import sys

import pytest
from fake import serving

from jaxtp import cli
from jaxtp.checkpoint.hf import DEMO


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs the command in this process: (exit code, what it printed, what it said)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxtp", "bench", "serve", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        heard = capsys.readouterr()
        return code, heard.out, heard.err

    return run


def test_it_prints_a_table_and_writes_figures_and_a_picture(bench, tmp_path):
    pytest.importorskip("matplotlib")
    figures, picture = tmp_path / "f.json", tmp_path / "p.png"
    with serving() as fake:
        code, printed, _ = bench("--url", f"{fake.url}/v1/", "--concurrency", 1, 2, "--num-prompts", 3, "--output-tokens", 5,
                                 "--json", figures, "--picture", picture)  # fmt: skip
    assert code == 0
    assert "2 at once" in printed
    assert "time to first token (TTFT), ms: mean" in printed
    levels = json.loads(figures.read_text())["levels"]
    assert [(level["max_concurrency"], level["completed"], level["total_output_tokens"]) for level in levels] == [
        (1, 3, 15),
        (2, 3, 15),
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {len(body["prompt"]) for body in fake.bodies} == {128}
    assert len(fake.bodies) == 1 + 3 + 2 + 3


def test_rates_make_levels_of_their_own(bench):
    with serving() as fake:
        _, printed, _ = bench("--url", fake.url, "--request-rate", 200, "inf", "--num-prompts", 3, "--concurrency", 2)
    assert "200/s, 2 at once" in printed


def test_where_no_request_completes_the_exit_code_tells(bench):
    with serving(script=["busy"] * 3) as fake:
        code, printed, said = bench("--url", fake.url, "--concurrency", 1, "--num-prompts", 3, "--warmups", 0)
    assert code == 2
    assert "status 503: the queue is full" in printed
    assert said == "jaxtp: 1 at once: no request completed; status 503: the queue is full\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--concurrency 0", "must be at least 1"),
        ("--concurrency many", "--concurrency cannot be 'many'"),
        ("--num-prompts 0", "--num-prompts 0 must be at least 1"),
        ("--request-rate 0", "must be more than 0"),
        ("--request-rate 1 --concurrency 1 2", "--request-rate goes with one --concurrency"),
        ("--burstiness 2", "it goes with --request-rate"),
        ("--prompt-tokens 9:3", "--prompt-tokens 9:3 is no number of tokens (128) and no range of them (64:256)"),
        ("--output-tokens few", "--output-tokens few is no number of tokens"),
        ("--vocab-size 2", "ids below 2"),
        (f"--vocab-size 99 --tokenizer {DEMO}", "--vocab-size is of random token ids"),
        ("--chat", "--chat sends text: --tokenizer FOLDER makes it, or --dataset FILE has it"),
        ("--dataset none.json --output-tokens 3", "none.json: No such file or directory"),
        ("--dataset none.json --prompt-tokens 3", "--dataset brings its own prompts"),
        ("--tokenizer nowhere", "nowhere"),
        ("--timeout 0", "--timeout 0 must be more than 0"),
        ("--temperature -1", "--temperature -1 must be at least 0"),
        ("--json none/f.json", "--json: there is no folder"),
        ("--picture none/f.png", "--picture: there is no folder"),
        ("--url localhost:8000", "localhost:8000 is no address of a server; such as http://localhost:8000"),
        ("--url http://127.0.0.1:1", "there is no server at http://127.0.0.1:1: "),
        ("--max-concurrency 3", "it is --concurrency here"),
        ("--base-url x", "it is --url here"),
        ("--random-input-len 3", "it is --prompt-tokens here"),
        ("model", "takes no 'model' there"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, bench):
    code, printed, heard = bench(*arguments.split())
    assert (code, printed, heard.count("\n")) == (2, "", 1)
    assert said in heard


def test_the_other_benchmarks_are_where_they_were(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxtp", "bench", "latency"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "which model? jaxtp bench latency MODEL" in capsys.readouterr().err
