"""Rows hold what the files hold, in an order that depends on nothing but seed and step."""

import json

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtp import make_mesh
from jaxtp.text import Tokenizer
from jaxtp.train.data import Batches, Corpus, Windows, best_fit, check_vocabulary, read
from jaxtp.train.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.byte_tokenizer(folder, 128)
    return Tokenizer(folder)


def batches(windows, *, batch_size=8, accumulate=1, seed=0, **mesh):
    place = NamedSharding(make_mesh(**mesh), P(None, "dp", None))
    return Batches(windows, batch_size, accumulate, seed, place, segments=True)


def take(found, count):
    return [{k: np.asarray(v) for k, v in vars(next(found)).items()} for _ in range(count)]


def test_running_text_is_cut_without_loss():
    corpus = Corpus(np.arange(1, 66), np.array([0, 65]))
    windows = Windows(corpus, 16, pack=False)
    rows = [windows.sample(i) for i in range(len(windows))]
    assert np.concatenate([r["tokens"] for r in rows]).tolist() == list(range(1, 65))
    assert np.concatenate([r["labels"] for r in rows]).tolist() == list(range(2, 66))
    assert all(r["weights"].all() for r in rows)


def test_a_document_does_not_predict_the_next():
    corpus = Corpus(np.arange(40), np.array([0, 5, 21, 40]))
    row = Windows(corpus, 32, pack=False).sample(0)
    assert np.flatnonzero(row["weights"] == 0).tolist() == [4, 20]
    assert row["positions"][[0, 4, 5, 20, 21]].tolist() == [0, 4, 0, 15, 0]
    assert row["segment_ids"][[0, 4, 5, 20, 21, 31]].tolist() == [1, 1, 2, 2, 3, 3]


def test_packing_keeps_documents_whole_and_every_label():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 40, 200)
    corpus = Corpus(np.arange(sizes.sum()), np.concatenate([[0], np.cumsum(sizes)]))
    windows = Windows(corpus, 32, pack=True)
    labels = []
    for i in range(len(windows)):
        row = windows.sample(i)
        counted = row["weights"] > 0
        labels += row["labels"][counted].tolist()
        assert (row["labels"][counted] == row["tokens"][counted] + 1).all()  # the tokens are 0, 1, 2, …
        starts = corpus.bounds[np.searchsorted(corpus.bounds, row["tokens"][counted], "right") - 1]
        assert (row["positions"][counted] == row["tokens"][counted] - starts).all()
    expected = [t for a, b in zip(corpus.bounds[:-1], corpus.bounds[1:], strict=True) for t in range(a + 1, min(b, a + 33))]
    assert sorted(labels) == expected
    filled = len(labels) / (len(windows) * 32)
    assert filled > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_holds_each_once_within_the_room(seed):
    sizes = np.random.default_rng(seed).integers(0, 50, 300)
    rows = best_fit(sizes, 50)
    assert sorted(i for row in rows for i in row) == [i for i in range(300) if sizes[i]]
    assert all(sizes[row].sum() <= 50 for row in rows)


def test_the_batches_are_the_same_on_every_mesh_and_from_every_step():
    windows = Windows(Corpus(np.arange(5000) % 97, np.array([0, 700, 5000])), 16, pack=False)
    whole = take(batches(windows).from_step(0), 60)  # more than one epoch of 312 rows
    for options in ({"dp": 8}, {"dp": 2, "tp": 4}, {"dp": 4, "accumulate": 2}):
        again = take(batches(windows, **options).from_step(0), 3)
        for a, b in zip(whole, again, strict=False):
            assert all((a[k].reshape(-1, 16) == b[k].reshape(-1, 16)).all() for k in a)
    later = take(batches(windows, dp=2).from_step(37), 3)
    for a, b in zip(whole[37:40], later, strict=True):
        assert all((a[k] == b[k]).all() for k in a)
    other = take(batches(windows, seed=1).from_step(0), 1)[0]
    assert (other["tokens"] != whole[0]["tokens"]).any()


def test_each_epoch_holds_every_sample_and_cuts_elsewhere():
    windows = Windows(Corpus(np.arange(16 * 16 + 1), np.array([0, 257])), 16, pack=False)
    steps = take(batches(windows, batch_size=8).from_step(0), 4)
    first = np.concatenate([s["tokens"].reshape(-1, 16) for s in steps[:2]])
    assert sorted(first[:, 0].tolist()) == list(range(0, 256, 16))
    second = np.concatenate([s["tokens"].reshape(-1, 16) for s in steps[2:]])
    assert len(set(second[:, 0] % 16)) <= 2
    assert set(second[:, 0]) != set(first[:, 0])


def test_validation_takes_every_sample_once():
    windows = Windows(Corpus(np.arange(16 * 11 + 1), np.array([0, 177])), 16, pack=False)
    found = list(batches(windows, batch_size=8).once())
    assert len(found) == 2
    assert sum(float(b.weights.sum()) for b in found) == 16 * 11


def test_each_process_makes_only_its_own_rows(monkeypatch):
    windows = Windows(Corpus(np.arange(16 * 64 + 1), np.array([0, 1025])), 16, pack=False)
    made = batches(windows, dp=8)
    asked = []
    monkeypatch.setattr(windows, "sample", lambda i, shift=0, real=windows.sample: asked.append(i) or real(i, shift=shift))
    place = made.sharding.addressable_devices_indices_map(made.shape)
    mine = dict(list(place.items())[:2])  # as if this process held two of the eight devices
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda self, shape: mine)
    monkeypatch.setattr(Batches, "_batch", lambda self, rows: rows)
    assert sorted(next(made.from_step(0))) == [0, 1]


def test_files_of_every_kind(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("Hello")
    (tmp_path / "b.jsonl").write_text('{"text": "ab"}\n\n{"text": "c"}\n')
    np.save(tmp_path / "c.npy", np.array([5, 6, 2, 7, 2], np.uint16))
    assert tokenizer.decode(read([tmp_path / "a.txt"], tokenizer).tokens) == "Hello"
    both = read([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer, eos=2)
    assert both.bounds.tolist() == [0, 6, 9, 11]
    assert both.characters == 8
    arrays = read([tmp_path / "c.npy"], None, eos=2)
    assert arrays.bounds.tolist() == [0, 3, 5]


CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
CHATML += "{% if add_generation_prompt %}<assistant>{% endif %}"


def test_only_what_the_assistant_says_is_learned(tmp_path, tokenizer):
    messages = [("user", "Hi"), ("assistant", "Yes"), ("user", "No"), ("assistant", "So")]
    line = {"messages": [{"role": role, "content": text} for role, text in messages]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="no chat template"):
        read([tmp_path / "chat.jsonl"], tokenizer)
    tokenizer.templates["default"] = CHATML
    try:
        corpus = read([tmp_path / "chat.jsonl"], tokenizer)
    finally:
        tokenizer.templates.clear()
    whole = "".join(f"<{role}>{text}|" for role, text in messages)
    assert tokenizer.decode(corpus.tokens) == whole
    assert tokenizer.decode(corpus.tokens[corpus.learn]) == "Yes|So|"
    row = Windows(corpus, 64, pack=True).sample(0)
    learned = row["labels"][row["weights"] > 0]
    assert tokenizer.decode(learned) == "Yes|So|"


def test_the_split_keeps_documents_whole():
    corpus = Corpus(np.arange(100), np.array([0, 30, 60, 95, 100]), characters=200)
    first, last = corpus.split(0.3)
    assert (len(first), first.bounds.tolist()) == (95, [0, 30, 60, 95])
    assert (last.tokens.tolist(), last.bounds.tolist(), last.characters) == ([95, 96, 97, 98, 99], [0, 5], 10)
    alone = Corpus(np.arange(100), np.array([0, 100]))
    assert [len(part) for part in alone.split(0.1)] == [90, 10]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.txt", None, FileNotFoundError, "missing.txt does not exist"),
        ("empty.txt", "", ValueError, "empty.txt is empty"),
        ("bad.jsonl", '{"text": "a"}\n{oops\n', ValueError, "bad.jsonl:2 is not valid JSON"),
        (
            "other.jsonl",
            '{"body": "a"}\n',
            ValueError,
            'other.jsonl:1: a record with none of "text", "messages".*; its keys: body',
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path, tokenizer, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read([tmp_path / name], tokenizer)


def test_arrays_must_be_of_ids(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"holds float64 of shape \(2, 2\); token arrays are 1-D and of ints"):
        read([tmp_path / "x.npy"], None)


def test_too_little_text_and_foreign_tokens():
    corpus = Corpus(np.array([1, 2, 300]), np.array([0, 3]))
    with pytest.raises(ValueError, match="3 tokens give no sample of sequence_length=16"):
        Windows(corpus, 16, pack=False)
    with pytest.raises(ValueError, match="the data holds token 300, but the model's vocabulary has 128"):
        check_vocabulary(corpus, 128)


def test_a_byte_level_tokenizer_spells_anything(tmp_path):
    (tmp_path / "text.txt").write_text("the cat and the dog and the bird\n" * 20)
    tokenizer = Tokenizer(train_tokenizer([tmp_path / "text.txt"], tmp_path / "made", vocab_size=270))
    text = "the ☃ and\tthe naïve кот\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the the the")) < 11
    assert tokenizer.size == 270
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        train_tokenizer([tmp_path / "text.txt"], tmp_path / "made", vocab_size=256)


def test_arrays_lie_as_the_mesh_says():
    windows = Windows(Corpus(np.arange(16 * 64 + 1), np.array([0, 1025])), 16, pack=False)
    batch = next(batches(windows, dp=4, tp=2, accumulate=2).from_step(0))
    assert batch.tokens.shape == (2, 4, 16)
    assert {s.data.shape for s in batch.tokens.addressable_shards} == {(2, 1, 16)}
    assert isinstance(batch.tokens, jax.Array)
