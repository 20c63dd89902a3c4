"""A run's folder holds all of it: the tokenizer that it learned too, wherever the folder goes."""

import json

from jaxtp import train
from jaxtp.train.config import parse

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}


def test_a_learned_tokenizer_goes_with_its_run(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question. " * 20)
    raw = {
        "folder": str(tmp_path / "run"),
        "steps": 1,
        "validate_every": 0,
        "model": {"shape": SHAPE, "dtype": "float32"},
        "data": {"train": [str(tmp_path / "text.txt")], "train_tokenizer": 270, "sequence_length": 16, "batch_size": 8},
        "log": {"tensorboard": False},
    }
    train.train(parse(raw))
    learned = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    assert len(json.loads(learned.read_text())["model"]["vocab"]) == 270
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    train.export(moved, tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").read_text() == (moved / "tokenizer" / "tokenizer.json").read_text()


def test_a_tokenizer_that_is_named_is_the_one(tmp_path):
    named = parse({"folder": str(tmp_path), "data": {"tokenizer": "elsewhere", "train_tokenizer": 300}})
    assert str(named.tokenizer) == "elsewhere"
    assert parse({"folder": str(tmp_path)}).tokenizer is None
    start = parse({"folder": str(tmp_path), "model": {"start": "base"}, "data": {"train_tokenizer": 300}})
    assert start.tokenizer is None  # the checkpoint's own
