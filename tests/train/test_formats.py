"""Fine-tuning data as people have it: the tokens and what is learned of them are what transformers and TRL would make of it."""

import contextlib
import json
import logging
import os

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from jaxtp.text import Tokenizer
from jaxtp.train import Run, train_tokenizer
from jaxtp.train.config import load, parse
from jaxtp.train.data import Batches, Corpus, Windows, read
from jaxtp.train.records import Encoder
from jaxtp.train.sources import expand, records

BOS, EOS, START, END = SPECIAL = ["<s>", "<|eos|>", "<|start|>", "<|end|>"]
SAYS = "{{ m['content'] }}<|end|>"
TEMPLATE = (
    "{% if tools %}<|start|>tools\n{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}SAID{% else %}SAYS{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PLAIN = TEMPLATE.replace("SAID", SAYS).replace("SAYS", SAYS)
MARKED = TEMPLATE.replace("SAID", "{% generation %}" + SAYS + "{% endgeneration %}").replace("SAYS", SAYS)

ASKED = [
    ("system", "Be kind."),
    ("user", "the cat?"),
    ("assistant", "the dog."),
    ("user", "and the birds?"),
    ("assistant", "ü 😀"),
]
MESSAGES = [{"role": role, "content": text} for role, text in ASKED]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {key: {"type": "string"}}}}}
    for name, key in (("look", "where"), ("find", "what"))
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A byte-level BPE with merges that begins with <s>, without and with a chat template."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat and the dog and the birds"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[(BOS, 0)])
    found = []
    for name, more in (("base", {}), ("chat", {"chat_template": PLAIN})):
        folder = tmp_path_factory.mktemp(name)
        backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, **more}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        found.append(folder)
    return found


@pytest.fixture(scope="module")
def base(folders):
    return Tokenizer(folders[0])


@pytest.fixture(scope="module")
def chat(folders):
    return Tokenizer(folders[1])


@pytest.fixture(scope="module")
def hf(folders):
    return AutoTokenizer.from_pretrained(folders[1])


def jsonl(path, *found):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found), encoding="utf-8")
    return path


def same(a: Corpus, b: Corpus) -> bool:
    """The same tokens, documents and labels."""
    assert (a.learn is None) == (b.learn is None)
    learn = a.learn is None or a.learn.tolist() == b.learn.tolist()
    return a.tokens.tolist() == b.tokens.tolist() and a.bounds.tolist() == b.bounds.tolist() and learn


def marked(hf, messages, train_on, **options) -> tuple[list[int], list[bool]]:
    """What transformers makes of a conversation: ids, and the mask of a template that marks what is generated."""
    made = hf.apply_chat_template(
        messages, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    ids, mask = made["input_ids"], [bool(m) for m in made["assistant_masks"]]
    if train_on == "all":
        return ids, [True] * len(ids)
    if train_on == "last":
        last = max(i for i, token in enumerate(ids) if token == hf.convert_tokens_to_ids(START))
        mask = [m and i > last for i, m in enumerate(mask)]
    return ids, mask


# -- what is learned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["assistant", "all", "last"])
@pytest.mark.parametrize("form", ["messages", "sharegpt", "roles in conversations", "pair of lists", "alpaca", "tools"])
def test_conversations_are_masked_as_transformers_marks_them(tmp_path, chat, hf, form, train_on):
    messages, options = MESSAGES, {}
    if form == "messages":
        record = {"messages": messages, "prompt": "ignored", "id": 7}
    elif form == "sharegpt":
        turns = [{"from": SHAREGPT[turn["role"]], "value": turn["content"]} for turn in messages[1:]]
        record = {"system": "Be kind.", "conversations": turns}
    elif form == "roles in conversations":
        record = {"conversations": messages}
    elif form == "pair of lists":
        record = {"prompt": messages[:4], "completion": messages[4:]}
    elif form == "alpaca":
        record = {"system": "Be kind.", "history": [["the cat?", "the dog."]], "instruction": "and", "input": "the birds?"}
        record["output"] = "ü 😀"
        messages = [*messages[:3], {"role": "user", "content": "and\nthe birds?"}, messages[4]]
    else:
        record, options = {"messages": messages, "tools": json.dumps(TOOLS)}, {"tools": TOOLS}
    found = read([jsonl(tmp_path / "a.jsonl", record)], chat, eos=chat.eos_id, train_on=train_on)
    # of a prompt that holds answers, these are given, not learned: TRL's completion mask
    ids, mask = marked(hf, messages, "last" if form == "pair of lists" and train_on == "assistant" else train_on, **options)
    assert found.tokens.tolist() == ids
    assert found.learn.tolist() == mask
    assert sum(mask) > 0


def test_of_a_pair_the_completion_is_learned_by_the_rule_of_trl(tmp_path, base, hf):
    prompt, completion = "the cat", " and the dog"
    ids = hf(prompt + completion + EOS)["input_ids"]
    given = len(hf(prompt)["input_ids"])
    path = jsonl(tmp_path / "a.jsonl", {"prompt": prompt, "completion": completion})
    found = read([path], base, eos=base.eos_id)
    assert found.tokens.tolist() == ids
    assert ids[0] == hf.bos_token_id
    assert found.learn.tolist() == [i >= given for i in range(len(ids))]
    assert same(found, read([path], base, eos=base.eos_id, train_on="last"))
    assert read([path], base, eos=base.eos_id, train_on="all").learn.all()


def test_a_token_that_spans_prompt_and_completion_is_learned(tmp_path, base):
    found = read([jsonl(tmp_path / "a.jsonl", {"prompt": "the th", "completion": "e dog"})], base)
    learned = base.decode(found.tokens[found.learn].tolist())
    assert learned == " the dog"  # " the" is one token, of which the prompt ends inside


@pytest.mark.parametrize("more", ["", "the birds"])
def test_alpaca_without_a_chat_template_is_its_own_text(tmp_path, base, hf, more):
    about = ", paired with an input that provides further context" if more else ""
    text = (
        f"Below is an instruction that describes a task{about}. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\nSay the cat.{chr(10) * 2 + '### Input:' + chr(10) + more if more else ''}\n\n### Response:\n"
    )
    path = jsonl(tmp_path / "a.jsonl", {"instruction": "Say the cat.", "input": more, "output": "the dog", "text": "ignored"})
    found = read([path], base, eos=base.eos_id)
    ids = hf(text + "the dog" + EOS)["input_ids"]
    assert found.tokens.tolist() == ids
    assert found.learn.tolist() == [i >= len(hf(text)["input_ids"]) for i in range(len(ids))]


def test_text_is_learned_whole_with_what_ends_it(tmp_path, base, hf):
    found = read([jsonl(tmp_path / "a.jsonl", {"body": "the cat"}, {"body": ""}, {"body": "dog"})], base, key="body")
    assert (found.learn, found.characters, len(found.bounds)) == (None, 10, 3)  # a text without tokens is no document
    assert found.tokens.tolist() == [*hf.encode("the cat")[1:], *hf.encode("dog")[1:]]


# -- the forms of files ------------------------------------------------------------------------------------------------

SETS = {
    "chat": [{"messages": MESSAGES}, {"messages": MESSAGES[1:3]}],
    "tools": [{"messages": MESSAGES, "tools": TOOLS}, {"messages": MESSAGES[1:3]}],
    "prompt_completion": [{"prompt": "the", "completion": " cat\u2028\u0085"}, {"prompt": "a", "completion": "b"}],
    "text": [{"text": "the cat"}, {"text": "dog"}],
}


@pytest.mark.parametrize("name", SETS)
def test_every_form_of_file_holds_the_same(tmp_path, chat, name):
    rows = SETS[name]
    lines = jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "array.json").write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "lines.json").write_text("\n" + lines.read_text(encoding="utf-8").replace("\n", "\r\n"), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    whole = read([lines], chat, eos=1)
    assert len(whole.bounds) == 3
    for other in ("array.json", "lines.json", "a.parquet"):
        assert same(read([tmp_path / other], chat, eos=1), whole)
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    assert read([tmp_path / "one.json"], chat, eos=1).tokens.tolist() == whole.tokens[: whole.bounds[1]].tolist()
    other = lines.rename(tmp_path / "a.data")
    assert same(read([other], chat, eos=1, kind="jsonl"), whole)
    assert same(read([other], chat, eos=1, kind="chat" if name == "tools" else name), whole) == (name != "text")


def test_a_folder_is_its_files_by_name(tmp_path, chat, caplog):
    caplog.set_level(logging.INFO, "jaxtp")
    (tmp_path / "b" / ".git").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    files = [
        jsonl(tmp_path / "a.jsonl", {"messages": MESSAGES}),
        jsonl(tmp_path / "b" / "a.json", {"prompt": "a", "completion": "b"}),
        tmp_path / "c" / "a.npy",
        tmp_path / "d.txt",
    ]
    np.save(files[2], np.array([5, 1, 7, 1, 9], np.uint64))
    files[3].write_text("the cat")
    for name in ("README.md", "dataset_info.json", ".hidden.txt", "_SUCCESS", "b/.git/x.txt", "x.csv"):
        (tmp_path / name).write_text("left out")
    whole = read(files, chat, eos=1)
    assert expand([tmp_path]) == files
    assert same(read([tmp_path], chat, eos=1), whole)
    assert same(read([f"{tmp_path}/[ab]*", f"{tmp_path}/**/*.npy", files[3]], chat, eos=1), whole)
    assert whole.tokens.dtype == np.int32
    assert len(whole.bounds) == 1 + 1 + 1 + 3 + 1  # the array's documents end at eos, also beside others
    assert whole.characters == 0
    said = caplog.text
    assert f"{files[0]}: 1 record, conversations (messages) (by the first record)" in said
    assert f"{files[1]}: 1 record, prompts with completions (by the first record)" in said
    assert f"{files[2]}: 5 token ids" in said
    assert f"{tmp_path}: 4 files; left out: README.md, _SUCCESS, dataset_info.json and 1 more" in said


def test_many_files_are_told_by_kind(tmp_path, base, caplog):
    caplog.set_level(logging.INFO, "jaxtp")
    for i in range(20):
        jsonl(tmp_path / f"{i}.jsonl", *SETS["prompt_completion"])
    read([tmp_path], base)
    assert "20 files: 40 records, prompts with completions (by the first record)" in caplog.text
    assert len(caplog.records) == 2


def test_json_in_a_file_of_text_is_told(tmp_path, base, caplog):
    text = jsonl(tmp_path / "a.txt", *SETS["text"])
    assert base.decode(read([text], base).tokens.tolist()) == text.read_text()
    assert "looks like JSON lines, but is learned as text" in caplog.text
    assert base.decode(read([text], base, kind="jsonl").tokens.tolist()) == "the catdog"


def test_records_are_read_one_by_one(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    with path.open("ab") as file:
        file.write(b"\xff\n")
    found = records(path, "lines")
    assert [next(found).value["text"], next(found).where] == ["a", f"{path}:2"]
    with pytest.raises(ValueError, match=r"a\.jsonl:3 is not UTF-8"):
        next(found)


def test_parquet_needs_its_extra(tmp_path, base, monkeypatch):
    parquet.write_table(pyarrow.Table.from_pylist(SETS["text"]), tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet: Parquet files need pyarrow: pip install 'jaxtp\[parquet\]'"):
        read([tmp_path / "a.parquet"], base)


def test_a_tokenizer_is_learned_from_the_text_of_records(tmp_path):
    text = "the cat and the dog and the birds\n" * 9
    (tmp_path / "a.txt").write_text(text)
    jsonl(tmp_path / "a.jsonl", {"text": text})
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": [{"role": "user", "content": text}]}]), tmp_path / "a.parquet")
    made = [train_tokenizer([tmp_path / f"a.{end}"], tmp_path / end, vocab_size=280) for end in ("txt", "jsonl", "parquet")]
    vocabulary = [json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"] for folder in made]
    assert vocabulary[0] == vocabulary[1] == vocabulary[2]
    np.save(tmp_path / "a.npy", np.arange(5))
    with pytest.raises(ValueError, match=r"a\.npy holds token ids; a tokenizer is learned from text"):
        train_tokenizer([tmp_path / "a.npy"], tmp_path / "x", vocab_size=280)


# -- what cannot be ----------------------------------------------------------------------------------------------------

TURN = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("a.jsonl", [{"messages": [TURN, ANSWER]}, {"text": "a"}], {}, r'l:2: no "messages" \(the file.s first.*keys: text'),
        ("a.json", "[{\"text\": \"a\"}, {\"body\": \"a\"}]", {}, r'a\.json, record 2: no "text"'),
        ("a.jsonl", [{"text": "a"}], {"kind": "sharegpt"}, r'a\.jsonl:1: no "conversations" \(data.kind=sharegpt'),
        ("a.jsonl", [{"text": 5}], {}, r'a\.jsonl:1: "text" is no text'),
        ("a.jsonl", [{"prompt": "a", "completion": [ANSWER]}], {}, r"a\.jsonl:1: .* neither both text nor both lists"),
        ("a.jsonl", [{"instruction": "a", "input": 1, "output": "b"}], {}, r'a\.jsonl:1: "input" is no text'),
        ("a.jsonl", [{"instruction": "a", "output": "b", "history": [["c"]]}], {}, r'a\.jsonl:1: "history" is no list of'),
        ("a.jsonl", [{"messages": []}], {}, r'a\.jsonl:1: "messages" is no list of messages'),
        ("a.jsonl", [{"messages": "a"}], {}, r'a\.jsonl:1: "messages" is no list of messages'),
        ("a.jsonl", [{"messages": [TURN, "b"]}], {}, r'a\.jsonl:1: "messages": message 2 is no object'),
        ("a.jsonl", [{"messages": [TURN, {"role": "assistant", "content": None}]}], {}, r"message 2 has no .role. and"),
        ("a.jsonl", [{"conversations": [{"from": "alien", "value": "a"}]}], {}, r'message 1 is from "alien"; known are human'),
        ("a.jsonl", [{"instruction": "a", "output": "b", "history": 5}], {}, r'a\.jsonl:1: "history" is no list of'),
        ("a.jsonl", [{"messages": [TURN, ANSWER], "tools": "{"}], {}, r'a\.jsonl:1: "tools" is not valid JSON'),
        ("a.jsonl", [{"messages": [TURN, ANSWER], "tools": 5}], {}, r'a\.jsonl:1: "tools" is no list of JSON schemas'),
        ("a.jsonl", [{"messages": [TURN]}], {}, r"a\.jsonl: nothing is learned of its 1 record, .*data.train_on=assistant"),
        ("a.jsonl", '["a"]\n', {}, r"a\.jsonl:1 begins an array.*named \.json"),
        ("a.jsonl", '"a"\n', {}, r"a\.jsonl:1 is not a JSON object"),
        ("a.jsonl", '{"text": "a"}\n\n{oops\n', {}, r"a\.jsonl:3 is not valid JSON"),
        ("a.jsonl", '{"text": "\\ud83d"}\n', {}, r"a\.jsonl:1 holds half of a surrogate pair"),
        ("a.jsonl", "\n \n", {}, r"a\.jsonl is empty"),
        ("a.jsonl", "", {}, r"a\.jsonl is empty"),
        ("a.json", "", {}, r"a\.json is empty"),
        ("a.json", "[]", {}, r"a\.json is empty"),
        ("a.json", "{", {}, r"a\.json is not valid JSON"),
        ("a.json", "5", {}, r"a\.json is not a JSON object"),
        ("a.json", '{"text": "a"}\n{oops', {}, r"a\.json:2 is not valid JSON"),
        ("a.json", '["a"]', {}, r"a\.json, record 1 is not a JSON object"),
        ("a.txt", "\ufeff", {}, r"a\.txt is empty"),
        ("a.txt", " \n\n", {}, r"a\.txt is empty but for blank space"),
        ("a.txt", "hé".encode("latin1"), {}, r"a\.txt:1 is not UTF-8"),
        ("a.txt", "hi".encode("utf-16"), {}, r"a\.txt is UTF-16"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", {}, r"a\.jsonl\.gz is compressed \(gzip\)"),
        ("a.parquet.zst", b"\x28\xb5\x2f\xfd", {}, r"a\.parquet\.zst is "),
        ("a.csv", "a,b\n", {}, r"a\.csv: \.csv files are not read"),
        ("a.bin", b"\x00\x01", {}, r"a\.bin: \.bin files are not read.*np\.save"),
        ("a.parquet", b"PAR1 or not", {}, r"a\.parquet is no Parquet file"),
        ("a.npy", b"", {}, r"a\.npy is no array of token ids"),
        ("a.npy", b"\x93NUMPY\x01\x00", {}, r"a\.npy is no array of token ids"),
        ("a.npy", b"not an array", {}, r"a\.npy is no array of token ids"),
        ("a.npy", np.array([{}], object), {}, r"a\.npy is no array of token ids.*objects"),
        ("a.npy", np.zeros(0, int), {}, r"a\.npy is empty"),
        ("a.npy", np.zeros(3, bool), {}, r"a\.npy holds bool"),
        ("a.npy", np.array([1, -5]), {}, r"a\.npy holds -5, which is no token id"),
        ("a.npy", np.array([1, 2**31]), {}, r"a\.npy holds 2147483648, which is no token id"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_with_the_file(tmp_path, chat, name, content, options, said):
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    elif isinstance(content, list):
        jsonl(path, *content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said) as error:
        read([path], chat, **options)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_truncated_array_is_named(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.npy is no array of token ids"):
        read([tmp_path / "a.npy"], None)


def test_what_is_not_there(tmp_path, base):
    for path, said in (("none.txt", "none.txt does not exist"), ("*.jsonl", r"no file is named like .*\*\.jsonl")):
        with pytest.raises(FileNotFoundError, match=said):
            read([tmp_path / path], base)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("a")
    with pytest.raises(ValueError, match="empty is a folder without data"):
        read([tmp_path / "empty"], base)
    (tmp_path / "broken.txt").symlink_to(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"broken\.txt"):
        read([tmp_path], base)


@contextlib.contextmanager
def as_nobody():
    """Without the rights of root, where the tests have them."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.npy", "a.parquet"])
def test_a_file_without_the_right_to_read_is_named(tmp_path, base, name):
    (tmp_path / name).write_text("a")
    (tmp_path / name).chmod(0)
    with (
        as_nobody(),
        pytest.raises((OSError, ValueError), match=rf"[Pp]ermission denied.*{name}|{name}.*[Pp]ermission") as error,
    ):
        read([tmp_path / name], base)
    assert "\n" not in str(error.value)


# -- nothing learned ---------------------------------------------------------------------------------------------------


def test_documents_of_which_nothing_is_learned_are_counted_and_left_out(tmp_path, chat, caplog):
    long = [{"role": "user", "content": "a" * 300}, ANSWER]
    rows = [{"messages": [TURN, ANSWER]}] * 5 + [{"messages": [TURN]}] * 3 + [{"messages": long}] * 2
    windows = Windows(read([jsonl(tmp_path / "a.jsonl", *rows)], chat), 32, pack=True)
    assert "2 of 10 documents have more than 33 tokens and are cut" in caplog.text
    assert "5 of 10 documents hold nothing that is learned and are left out" in caplog.text
    assert all(windows.sample(i)["weights"].any() for i in range(len(windows)))
    assert sum(windows.sample(i)["weights"].sum() for i in range(len(windows))) == 5 * 2  # b<|end|>


def test_rows_of_running_text_in_which_nothing_is_learned_are_counted(caplog):
    tokens = np.arange(65)
    Windows(Corpus(tokens, np.array([*range(16), 65])), 8, pack=False)
    assert "1 of 8 rows hold nothing that is learned" in caplog.text  # its labels, 1 to 8, each begin a document
    with pytest.raises(ValueError, match="the data: with sequence_length=8, nothing is learned"):
        Windows(Corpus(tokens, np.arange(66)), 8, pack=False)


@pytest.mark.parametrize("pack", [True, False])
def test_what_is_counted_as_learned_is_what_the_rows_weigh(pack):
    rng = np.random.default_rng(0)
    bounds = np.unique([0, *rng.integers(0, 400, 60), 400])
    for learn in (None, rng.random(400) < 0.1):
        corpus = Corpus(np.arange(400), bounds, learn)
        starts = bounds[:-1] if pack else np.arange(399 // 16) * 16 + 1
        stops = np.minimum(bounds[1:], bounds[:-1] + 17) if pack else starts + 16
        windows = Windows(corpus, 16, pack=pack)
        assert corpus.learned(starts, stops).sum() == sum(windows.sample(i)["weights"].sum() for i in range(len(windows)))


def test_validation_data_in_which_nothing_is_learned_is_refused(tmp_path, chat):
    rows = [{"messages": [TURN, ANSWER]}] * 8 + [{"messages": [TURN]}] * 2
    corpus = read([jsonl(tmp_path / "a.jsonl", *rows)], chat)
    with pytest.raises(ValueError, match=r"a\.jsonl \(the last 10%\): nothing in it is learned"):
        corpus.split(0.1)
    assert all(part.learn.any() for part in corpus.split(0.5))


def settings(tmp_path, **changes):
    plain = {
        "folder": str(tmp_path / "run"),
        "data": {"train": [str(tmp_path / "a.jsonl")], **changes.pop("data", {})},
        **changes,
    }
    return parse({**plain, "parallel": {"dp": 1}})


def test_a_run_that_would_learn_nothing_is_refused(tmp_path, folders):
    jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "a" * 300}, ANSWER]})
    data = {"tokenizer": str(folders[1]), "sequence_length": 64, "batch_size": 1}
    with pytest.raises(ValueError, match=r"a\.jsonl: with sequence_length=64, nothing is learned in the first 65 tokens"):
        Run(settings(tmp_path, data=data))
    assert not (tmp_path / "run").exists()
    batches = Run(settings(tmp_path, data={**data, "train_on": "all"})).batches["train"]
    assert isinstance(batches, Batches)
    assert float(next(batches.from_step(0)).weights.sum()) == 64


# -- where a run reads and writes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"folder": "gs://bucket/run"}, "folder"),
        ({"model": {"start": "s3://bucket/model"}}, r"model\.start"),
        ({"data": {"tokenizer": "gs://bucket/tokenizer", "train_tokenizer": 300}}, r"data\.tokenizer"),
        ({"data": {"train": ["a.jsonl", "hf://datasets/a/b"]}}, r"data\.train"),
        ({"data": {"validation": ["https://host/a.jsonl"]}}, r"data\.validation"),
    ],
)
def test_remote_addresses_are_refused_before_anything_is_made(tmp_path, monkeypatch, changes, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^{name}: .* is a remote address"):
        Run(settings(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match=r"folder: .*run cannot be written; .*run is a file"):
        Run(settings(tmp_path))
    (tmp_path / "sealed").mkdir(mode=0o555)
    with as_nobody(), pytest.raises((ValueError, PermissionError), match=r"cannot be written; .* is read-only|denied"):
        Run(settings(tmp_path, folder=str(tmp_path / "sealed" / "run")))


def test_settings_may_begin_with_a_byte_order_mark_and_are_named_where_they_are_broken(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("folder: runs/a\ndata:\n  train_on: last\n", encoding="utf-8-sig")
    assert load(path).data.train_on == "last"
    path.write_text("folder: [a\nb: {")
    with pytest.raises(ValueError, match=r"a\.yaml:2 is not valid YAML: ") as error:
        load(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"data\.train_on"):
        parse({"folder": "a", "data": {"train_on": "user"}})


def test_the_first_record_decides_in_this_order(base):
    whole = {"messages": 0, "conversations": 0, "prompt": 0, "completion": 0, "instruction": 0, "output": 0, "text": 0}
    found = []
    while whole:
        found.append(Encoder(base).kind(whole))
        for key in Encoder(base).keys(found[-1]):
            del whole[key]
    assert found == ["chat", "sharegpt", "prompt_completion", "alpaca", "text"]
