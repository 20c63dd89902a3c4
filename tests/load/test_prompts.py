"""Prompts have exactly the tokens that were asked for, and the same seed gives the same ones."""

import json
import shutil

import numpy as np
import pytest
import tokenizers

from jaxtp.checkpoint.hf import DEMO
from jaxtp.load import Dataset, Lengths, TextPrompts, TokenPrompts
from jaxtp.text import Tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def rng(seed=0):
    return np.random.default_rng(seed)


def test_lengths_cover_their_range_and_nothing_else():
    drawn = [Lengths.read("3:6", "--n").draw(generator) for generator in [rng()] for _ in range(200)]
    assert set(drawn) == {3, 4, 5, 6}
    assert {Lengths.read("3", "--n").draw(rng(i)) for i in range(20)} == {3}


@pytest.mark.parametrize("text", ["x", "", "0", "6:3", "1:2:3", "3:", "-1", "2.5"])
def test_what_is_no_length_is_refused_by_the_name_of_its_flag(text):
    with pytest.raises(ValueError, match=r"--n .* is no number of tokens \(128\) and no range of them \(64:256\)"):
        Lengths.read(text, "--n")


def test_token_ids_are_as_many_as_asked_and_below_the_limit():
    prompts = TokenPrompts(Lengths(5, 50), Lengths(1, 9), below=20).draw(rng(), 100)
    assert {len(p.content) for p in prompts} == {p.tokens for p in prompts} == set(range(5, 51)) & {p.tokens for p in prompts}
    assert {id for p in prompts for id in p.content} == set(range(3, 20))
    assert {p.output_tokens for p in prompts} == set(range(1, 10))
    assert len({tuple(p.content) for p in prompts}) == 100
    with pytest.raises(ValueError, match="ids below 3"):
        TokenPrompts(Lengths(5), Lengths(5), below=3)


@pytest.fixture(params=["demo", "stories260k"])
def folder(request):
    return DEMO if request.param == "demo" else request.getfixturevalue("stories")


def test_text_is_exactly_so_many_tokens_with_what_the_tokenizer_adds(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = TextPrompts(Tokenizer(folder), Lengths(3, 90), Lengths(4)).draw(rng(), 40)
    assert [len(backend.encode(p.content).ids) for p in prompts] == [p.tokens for p in prompts]
    assert len({p.tokens for p in prompts}) > 20
    assert len({p.content for p in prompts}) == 40
    assert all(p.content.isprintable() for p in prompts)


def test_a_length_that_no_text_has_is_refused(stories):
    with pytest.raises(ValueError, match=r"no text of exactly 1 tokens: .*stories260k makes 2 of one letter"):
        TextPrompts(Tokenizer(stories), Lengths(1), Lengths(4)).draw(rng(), 1)  # its beginning of sequence is one


@pytest.fixture
def chatting(folder, tmp_path):
    """A tokenizer with a chat template, which says itself what a prompt begins with."""
    for file in folder.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return tmp_path


def test_chat_counts_what_the_template_adds_and_no_other_beginning(chatting):
    backend = tokenizers.Tokenizer.from_file(str(chatting / "tokenizer.json"))
    prompts = TextPrompts(Tokenizer(chatting), Lengths(30, 60), Lengths(4), chat=True).draw(rng(), 10)
    for prompt in prompts:
        assert len(backend.encode(f"<user>{prompt.content}<bot>", add_special_tokens=False).ids) == prompt.tokens
    with pytest.raises(ValueError, match=r"no text of exactly 3 tokens: .* makes \d+ of one letter"):
        TextPrompts(Tokenizer(chatting), Lengths(3), Lengths(4), chat=True).draw(rng(), 1)


@pytest.mark.parametrize("source", ["ids", "text", "dataset"])
def test_the_same_seed_gives_the_same_prompts(source, conversations):
    made = {
        "ids": lambda: TokenPrompts(Lengths(5, 9), Lengths(1, 9)),
        "text": lambda: TextPrompts(Tokenizer(DEMO), Lengths(5, 9), Lengths(1, 9)),
        "dataset": lambda: Dataset(conversations, output=Lengths(1, 9)),
    }[source]
    assert made().draw(rng(1), 6) == made().draw(rng(1), 6) != made().draw(rng(2), 6)


@pytest.fixture
def conversations(tmp_path):
    file = tmp_path / "conversations.json"
    turns = [[{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": "n" * i}] for i in range(1, 9)]
    turns[1].insert(0, {"from": "system", "value": "Be kind."})
    turns += [[], [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Hi"}], [{"from": "human", "value": "Hi"}]]
    records = [{"id": i, "conversations": turn} for i, turn in enumerate(turns)]
    messages = [{"role": "user", "content": "What is 9?"}, {"role": "assistant", "content": "n" * 9}]
    file.write_text(json.dumps([*records, {"messages": messages}]))
    return file


def test_a_dataset_gives_first_messages_and_lengths_of_answers_each_once(conversations):
    prompts = Dataset(conversations, output=None, tokenizer=Tokenizer(DEMO)).draw(rng(), 9)
    assert {p.content for p in prompts} == {f"What is {i}?" for i in range(1, 10)}
    assert all((p.tokens, p.output_tokens) == (10, int(p.content[8])) for p in prompts)  # bytes
    assert [p.content for p in prompts] != sorted(p.content for p in prompts)


def test_without_a_tokenizer_a_dataset_needs_lengths(conversations):
    assert {(p.tokens, p.output_tokens) for p in Dataset(conversations, output=Lengths(5)).draw(rng(), 9)} == {(None, 5)}
    with pytest.raises(ValueError, match="how long are the outputs"):
        Dataset(conversations, output=None)
    with pytest.raises(ValueError, match="has 9 conversations, and 10 are asked for, warm-up included"):
        Dataset(conversations, output=Lengths(5)).draw(rng(), 10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "holds no list of conversations"),
        ("[", "is not valid JSON"),
        ("[3]", "record 1 is no conversation"),
        ('[{"conversations": []}, {"text": "a"}]', "record 2 is no conversation"),
        ('[{"conversations": ["a"]}]', "record 1 is no conversation"),
        ('[{"conversations": []}]', "none of its 1 records begins with a user's message"),
    ],
)
def test_what_is_no_dataset_is_refused(text, said, tmp_path):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        Dataset(tmp_path / "d.json", output=Lengths(5))
