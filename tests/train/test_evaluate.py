"""`jaxtp eval`: transformers' loss over the same windows, on every mesh, and the run's own validation."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import tiny

from jaxtp import cli
from jaxtp.train import evaluate, train
from jaxtp.train.config import parse
from jaxtp.train.data import Corpus
from jaxtp.train.validation import Spans

DOCUMENTS = [  # with characters of several bytes, which this tokenizer has as one unknown token
    "the quick brown fox jumps over the lazy dog, and runs away from the bear that it has seen in the wood.",
    "no",
    "an umlaut: ä, and a sign: €; then it goes on for a while, and on and on, until it comes to an end at last.",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (folder / "one.txt").write_text(" ".join(DOCUMENTS))
    return folder


@pytest.fixture(scope="module")
def by_hand(base):
    """(sum of nats, tokens) by transformers, window by window."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def measure(texts, length, stride):
        total = count = 0
        for text in texts:
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            done = 1  # labels before this one are counted; nothing comes before the first
            for begin in range(0, len(ids), stride):
                end = min(begin + length + 1, len(ids))
                window = torch.tensor([ids[begin:end]])
                labels = window.clone()
                labels[:, : done - begin] = -100
                if end > done:
                    with torch.no_grad():
                        total += float(model(window, labels=labels).loss) * (end - done)
                    count += end - done
                done = max(done, end)
        return total, count

    return measure


@pytest.fixture(scope="module")
def alone(base, files):
    return evaluate(base, [files / "docs.jsonl", files / "one.txt"], sequence_length=16, stride=5, progress=False)


def test_it_is_the_loss_of_transformers_over_the_same_windows(base, files, by_hand, alone):
    plain = evaluate(base, files / "docs.jsonl", sequence_length=16, progress=False)
    for found, texts, stride in ((plain, DOCUMENTS, 16), (alone, [*DOCUMENTS, " ".join(DOCUMENTS)], 5)):
        total, count = by_hand(texts, 16, stride)
        assert found.tokens == count == sum(len(text) for text in texts)  # with the end of each, without its first
        assert found.nats == pytest.approx(total / count, abs=1e-5)
        assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
        assert (found.documents, found.sequence_length, found.stride) == (len(texts), 16, stride)


MESHES = {
    "tp 2": {"tensor_parallel_size": 2},
    "dp 2, sequence parallel tp 2": {"data_parallel_size": 2, "tensor_parallel_size": 2, "sequence_parallel": True},
    "cp 2 × tp 2": {"context_parallel_size": 2, "tensor_parallel_size": 2},
    "pp 2": {"pipeline_parallel_size": 2, "batch_size": 4},
}


@pytest.mark.parametrize("mesh", MESHES)
def test_it_is_the_same_on_every_mesh(base, files, alone, mesh):
    data = [files / "docs.jsonl", files / "one.txt"]
    found = evaluate(base, data, sequence_length=16, stride=5, progress=False, **MESHES[mesh])
    assert found.nats == pytest.approx(alone.nats, abs=1e-5)
    assert found.tokens == alone.tokens


def test_text_has_figures_for_characters_and_bytes(base, files):
    """Of plain text each token is a character and a byte, but the first, which is not counted, and what ends it."""
    text = "plain words, each letter of which is one byte."
    (files / "plain.txt").write_text(text)
    found = evaluate(base, files / "plain.txt", sequence_length=16, progress=False)
    share = len(text) / (len(text) + 1)  # the tokenizer's end of text is a token as well
    assert found.nats_per_character == pytest.approx(found.nats / share)
    assert found.bits_per_byte == pytest.approx(found.nats_per_character / math.log(2))
    np.save(files / "ids.npy", np.arange(3, 60))
    tokens = evaluate(base, files / "ids.npy", progress=False)
    assert (tokens.nats_per_character, tokens.bits_per_byte, tokens.tokens) == (None, None, 56)


def test_a_run_is_measured_as_its_own_validation_was(base, files, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(" ".join(DOCUMENTS * 8))
    raw = {
        "folder": str(tmp_path / "run"), "steps": 4, "validate_every": 2, "model": {"start": str(base), "dtype": "bfloat16"},
        "data": {"train": [str(tmp_path / "text.txt")], "validation": [str(files / "docs.jsonl")], "sequence_length": 16,
                 "batch_size": 4}, "lora": {"rank": 2, "targets": ["q_proj"]},
        "checkpoints": {"every": 2}, "log": {"tensorboard": False}, "parallel": {"dp": 2},
    }  # fmt: skip
    result = train(parse(raw))
    found = evaluate(tmp_path / "run", files / "docs.jsonl", step=2, progress=False)
    assert found.nats == pytest.approx(result.validation[0][1], abs=1e-6)
    assert (found.step, found.sequence_length) == (2, 16)
    flags = ["eval", tmp_path / "run", files / "docs.jsonl", "--best", "-tp", "2", "--json", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["jaxtp", *map(str, flags)])
    cli.main()
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["step"] == result.best[0]
    assert record["nats"] == pytest.approx(result.best[1], abs=2e-3)  # in bfloat16, summed otherwise
    assert f"nats per token:      {record['nats']:.4f}" in capsys.readouterr().out


def test_rows_hold_every_label_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(0, 40, rng.integers(1, 6))
        bounds, length = np.concatenate([[0], np.cumsum(sizes)]), int(rng.integers(1, 12))
        if sizes.max() < 2:
            continue
        learn = rng.random(bounds[-1]) < 0.7
        spans = Spans(Corpus(np.arange(bounds[-1]), bounds, learn), length, stride=int(rng.integers(1, length + 1)))
        rows = [spans.sample(i) for i in range(len(spans))]
        counted = np.concatenate([row["labels"][row["weights"] > 0] for row in rows])
        expected = [i for first, last in itertools.pairwise(bounds) for i in range(first + 1, last) if learn[i]]
        assert sorted(counted.tolist()) == expected
        for row in rows:
            seen = row["segment_ids"] > 0
            np.testing.assert_array_equal(row["labels"][seen], row["tokens"][seen] + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 17}, "stride=17 must be from 1 to the sequence length of 16"),
        ({"sequence_length": 4096}, "sequence_length=4096 exceeds the model's max_position_embeddings=512"),
        ({"best": True}, "is not the folder of a run"),
        ({"kind": "txt"}, "kind='txt' is none of auto, text"),
        ({"tensor_parallel_size": 3}, "tp=3 does not divide 8 query heads"),
        ({"data_parallel_size": 2, "batch_size": 3}, "dp=2 does not divide the 3 rows"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(base, files, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(base, files / "docs.jsonl", progress=False, **{"sequence_length": 16, **options})
