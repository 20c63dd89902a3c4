"""Prompts from files: texts and records as people have them, and the sampling settings that a record brings."""

import io
import json
import re
import sys
from dataclasses import replace

import pytest
import tiny

from jaxtp import LLM, SamplingParams
from jaxtp.cli import main
from jaxtp.cli.prompts import read_prompts

PARAMS = SamplingParams(temperature=0, max_tokens=9)


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(path, PARAMS)


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.txt", "\ufeffone\r\n\n  two \u2028 lines\n", ["one", "  two \u2028 lines"]),
        ("a.jsonl", '\ufeff{"prompt": "a\u2028b"}\n{"prompt_token_ids": [1, 2]}\n"three"\n', ["a\u2028b", [1, 2], "three"]),
        ("a.json", '["one", {"prompt": "two"}, [3]]', ["one", "two", [3]]),
        ("a.json", '[\n  {"prompt": "one"},\n  {"prompt": "two"}\n]', ["one", "two"]),
        ("a.json", '{"prompt": "one"}\n{"prompt": "two"}\n', ["one", "two"]),
        ("a.json", '{\n  "prompt": "one"\n}\n', ["one"]),
        ("a.jsonl", '{"prompt": null, "prompt_token_ids": [5]}', [[5]]),
    ],
)
def test_prompts_of_every_form(tmp_path, name, content, prompts):
    assert read(tmp_path / name, content) == [(prompt, PARAMS) for prompt in prompts]


def test_a_records_own_settings_are_laid_over_the_flags(tmp_path):
    lines = [{"prompt": "a", "max_tokens": 2, "stop": ["x"]}, {"prompt": "b", "temperature": 0.5, "seed": 3, "n": 2}]
    found = read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert [how for _, how in found] == [
        SamplingParams(temperature=0, max_tokens=2, stop=["x"]),
        SamplingParams(temperature=0.5, max_tokens=9, seed=3, n=2),
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "b", "max_tokns": 3}',
            "a.jsonl:2: 'max_tokns' is no setting of Sampling",
        ),
        ("a.jsonl", '{"prompt": "a", "top_p": 3}', "a.jsonl:1: top_p=3 must be in (0, 1]"),
        ("a.jsonl", '{"prompt": "a", "max_tokens": "3"}', "a.jsonl:1: max_tokens='3' must be an int"),
        ("a.jsonl", '{"text": "a"}', "a.jsonl:1 is no prompt"),
        ("a.jsonl", "[true]", "a.jsonl:1 is no prompt"),
        ("a.jsonl", "\n{", "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", '{"prompt": "\\ud83d"}', "a.jsonl:1 holds half of a surrogate pair"),
        ("a.json", '["a", 5]', "a.json, record 2 is no prompt"),
        ("a.json", '["a", ', "a.json is not valid JSON"),
        ("a.jsonl", b"\x1f\x8b\x08rest", "a.jsonl is compressed (gzip)"),
        ("a.txt", "h\xe9".encode("latin1"), "a.txt:1 is not UTF-8 text"),
        ("a.txt", "hi".encode("utf-16"), "a.txt is UTF-16"),
        ("a.txt", "\n \n", "a.txt holds no prompts"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_with_its_name(tmp_path, name, content, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read(tmp_path / name, content)
    assert "\n" not in str(error.value)


def test_the_command_samples_each_line_as_it_says(tmp_path, monkeypatch, capsys):
    folder = tiny.checkpoint(tmp_path / "model")
    lines = [{"prompt": "Hello", "max_tokens": 2}, {"prompt": "How are", "temperature": 1.0, "seed": 7}, {"prompt": "So"}]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(map(json.dumps, lines)).encode())))
    monkeypatch.setattr(sys, "argv", ["jaxtp", "generate", "--model", str(folder), "--prompts-file", "-", "--max-tokens", "5"])
    main()
    found = [json.loads(line)["outputs"][0]["token_ids"] for line in capsys.readouterr().out.splitlines()]
    greedy = SamplingParams(temperature=0, max_tokens=5)
    params = [replace(greedy, max_tokens=2), replace(greedy, temperature=1.0, seed=7), greedy]
    expected = LLM(folder, progress=False).generate(["Hello", "How are", "So"], params)
    assert found == [request.outputs[0].token_ids for request in expected]
    assert [len(ids) for ids in found] == [2, 5, 5]
