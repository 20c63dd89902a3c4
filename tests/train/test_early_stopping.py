"""A run that no longer improves ends, wherever it was interrupted before, and its best checkpoint is there."""

import json
import shutil

import numpy as np
import pytest
import tiny

from jaxtp.train import evaluate, export, train
from jaxtp.train.checkpoints import chosen
from jaxtp.train.config import parse
from jaxtp.train.stopping import Best, EarlyStopping

TEXT = "the quick brown fox jumps over the lazy dog and runs away from the bear. " * 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A text to learn, and another to validate on, which the first makes worse after a while."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text("".join(chr(c) for c in np.random.default_rng(0).integers(97, 123, 400)))
    tiny.byte_tokenizer(folder, 128)
    return folder


def config(texts, folder, **changes):
    raw = {
        "folder": str(folder), "steps": 60, "validate_every": 2,
        "model": {"dtype": "float32", "shape": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1}},
        "data": {"train": [str(texts / "text.txt")], "validation": [str(texts / "other.txt")], "tokenizer": str(texts),
                 "sequence_length": 32, "batch_size": 8},
        "optimizer": {"learning_rate": 2e-2, "warmup_steps": 2, "schedule": "constant"}, "parallel": {"dp": 1},
        "checkpoints": {"every": 100, "keep": 1}, "log": {"every": 100, "tensorboard": False},
        "early_stopping": {"patience": 3},
    }  # fmt: skip
    return parse({**raw, **changes})


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    return train(config(data, folder))


def stops(validation, patience, min_delta=0.0):
    """By the definition: the first validation that ends a row of `patience` without one below what was reached."""
    mark, row = np.inf, 0
    for step, nats in validation:
        mark, row = (nats, 0) if nats < mark - min_delta else (mark, row + 1)
        if row == patience:
            return step
    return None


def test_it_stops_when_validations_no_longer_improve(data, whole):
    assert whole.steps == stops(whole.validation, 3) == whole.validation[-1][0] < 60
    assert whole.best == min(((step, nats) for step, nats in whole.validation), key=lambda pair: pair[1])
    assert whole.best[0] == whole.steps - 6


def test_the_best_checkpoint_is_kept_and_exported(data, whole, tmp_path, caplog):
    kept = {int(p.name) for p in (whole.folder / "checkpoints").iterdir() if p.name.isdigit()}
    assert {whole.best[0], whole.steps} <= kept
    caplog.set_level("INFO", logger="jaxtp")
    export(whole.folder, tmp_path / "best", best=True)
    export(whole.folder, tmp_path / "last")
    assert f"wrote step {whole.best[0]} of" in caplog.text
    for name, expected in (("best", whole.best[1]), ("last", whole.validation[-1][1])):
        found = evaluate(tmp_path / name, data / "other.txt", sequence_length=32, progress=False)
        assert found.nats == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="trained all weights: it has no adapter to export"):
        export(whole.folder, tmp_path / "none", adapter=True)
    with pytest.raises(ValueError, match="exclude one another"):
        chosen(whole.folder / "checkpoints", step=2, best=True)


def test_a_run_that_goes_on_stops_at_the_same_step(data, whole, tmp_path, caplog):
    caplog.set_level("INFO", logger="jaxtp")
    shutil.copytree(whole.folder, tmp_path / "on")
    for path in (tmp_path / "on" / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > whole.best[0]:  # what counts how long it has waited is behind it
            shutil.rmtree(path)
    train(config(data, tmp_path / "on", steps=whole.best[0] + 4, early_stopping={"patience": 0}, checkpoints={"every": 100}))
    caplog.clear()
    rest = train(config(data, tmp_path / "on"))
    assert rest.losses[0][0] == whole.best[0] + 5
    assert (rest.steps, rest.best) == (whole.steps, whole.best)
    assert f"stopped at step {rest.steps}: 3 validations in a row did not improve" in caplog.text
    assert f"best validation: {whole.best[1]:.4f} nats at step {whole.best[0]}" in caplog.text
    again = train(config(data, tmp_path / "on"))  # started once more, it does nothing
    assert (again.losses, again.steps, again.best) == ([], whole.steps, whole.best)
    more = train(config(data, tmp_path / "on", early_stopping={"patience": 4}))
    assert more.steps == whole.steps + 2


def test_what_counts_as_better():
    best, wanted = Best(), EarlyStopping(patience=2, min_delta=0.1)
    seen = [best.add(nats, step, wanted.min_delta) for step, nats in enumerate([3.0, 2.95, 2.85, float("nan"), 2.8], 1)]
    assert seen == [True, True, True, False, True]  # the lowest of all, by however little
    assert (best.nats, best.step, best.mark, best.waited) == (2.8, 5, 2.85, 2)
    assert best.stops(wanted)
    assert not best.stops(EarlyStopping())
    assert Best(**json.loads(json.dumps(best.told()))) == best


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_stopping": {"patience": -1}}, "patience=-1 and min_delta=0.0 must be at least 0"),
        ({"early_stopping": {"min_delta": -0.1}}, "min_delta=-0.1 must be at least 0"),
        ({"data": {"train": ["x"]}}, r"early_stopping\.patience=3 counts validations: give data.validation"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(data, tmp_path, **changes)
