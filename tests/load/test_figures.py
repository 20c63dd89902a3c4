"""The statistics of known timings are numpy's, by the definitions of vLLM's benchmark."""

import json
import math

import numpy as np
import pytest

from jaxtp.load import Answer, Figures, Levels

RNG = np.random.default_rng(0)


def answer(tokens, *, chunks=None, counted=True, tail=0.25, **changes):
    """One with random times, in so many chunks, and a chunk without a token `tail` seconds after the last."""
    start, ttft = RNG.uniform(0, 100), RNG.uniform(0.1, 1)
    gaps = RNG.uniform(0.01, 0.1, (chunks or tokens) - 1).tolist()
    end = start + ttft + sum(gaps) + tail
    made = Answer(start, first=start + ttft, end=end, gaps=gaps, prompt_tokens=10, output_tokens=tokens, counted=counted)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.fixture(scope="module")
def answers():
    good = [answer(n) for n in (1, 2, 5, 40, 40)] + [answer(12, chunks=3)]
    return [answer(3, error="status 503", message="full"), *good, answer(3, error="timeout"), answer(3, error="status 503")]


def figures(answers, **changes):
    return Figures.of(answers, **{"seconds": 8.0, "concurrency": 4, "rate": math.inf, **changes})


def test_latencies_are_numpys(answers):
    record, good = figures(answers).record, [a for a in answers if not a.error]
    ttft = [a.first - a.start for a in good]
    e2el = [a.end - a.start for a in good]
    expected = {
        "ttft": ttft,
        "e2el": e2el,
        "itl": [gap for a in good for gap in a.gaps],
        "tpot": [(e - t) / (a.output_tokens - 1) for a, t, e in zip(good, ttft, e2el, strict=True) if a.output_tokens > 1],
    }
    assert [len(times) for times in expected.values()] == [6, 6, 0 + 1 + 4 + 39 + 39 + 2, 5]
    for name, times in expected.items():
        values = 1e3 * np.array(times)
        assert record[f"mean_{name}_ms"] == pytest.approx(np.mean(values))
        assert record[f"std_{name}_ms"] == pytest.approx(np.std(values))
        for p in (50, 90, 99):
            assert record[f"p{p}_{name}_ms"] == pytest.approx(np.percentile(values, p))


def test_throughput_is_of_the_requests_that_completed(answers):
    record = figures(answers).record
    assert (record["num_prompts"], record["completed"], record["failed"]) == (9, 6, 3)
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (60, 1 + 2 + 5 + 40 + 40 + 12)
    assert record["request_throughput"] == 6 / 8
    assert record["output_throughput"] == 100 / 8
    assert record["total_token_throughput"] == 160 / 8


def test_errors_are_counted_by_kind_with_what_the_first_said(answers):
    assert figures(answers).errors == {"status 503": (2, "full"), "timeout": (1, "")}


def test_where_nothing_completed_there_are_no_latencies_and_no_warnings():
    found = figures([answer(3, error="timeout")])
    assert found.record["completed"] == found.record["output_throughput"] == 0
    assert {found.record[f"{kind}_{name}_ms"] for kind in ("mean", "std", "p50", "p99") for name in ("ttft", "itl")} == {None}
    assert "timeout" in str(Levels({}, [found]))


def test_what_is_written_is_json_without_nan_or_infinity(answers, tmp_path):
    levels = Levels({"model": "tiny"}, [figures(answers), figures([answer(1)], rate=2.5, concurrency=None)])
    levels.save(tmp_path / "figures.json")
    read = json.loads((tmp_path / "figures.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read["settings"] == {"model": "tiny"}
    first, second = read["levels"]
    assert (first["max_concurrency"], first["request_rate"]) == (4, None)
    assert (second["max_concurrency"], second["request_rate"]) == (None, 2.5)
    assert first["errors"]["status 503"] == {"count": 2, "first": "full"}
    assert second["p99_itl_ms"] is second["mean_tpot_ms"] is None


def test_the_table_has_a_column_for_each_level(answers):
    printed = str(Levels({"model": "tiny"}, [figures(answers), figures(answers, rate=2.5), figures(answers, concurrency=1)]))
    assert [title in printed for title in ("4 at once", "2.5/s, 4 at once", "1 at once")] == [True] * 3
    assert "status 503: full" in printed


@pytest.mark.parametrize("rates", [None, (1.0, 2.0, math.inf)], ids=["concurrency", "rates"])
def test_the_picture_draws_what_the_record_holds(answers, rates):
    pytest.importorskip("matplotlib")
    from jaxtp.load.picture import curves

    if rates:
        levels = [figures(answers, concurrency=None, rate=rate) for rate in rates]
        loads = [levels[2].record["request_throughput"], 1.0, 2.0]  # without a limit: what the server made of it
    else:
        levels = [figures(answers, concurrency=n, seconds=10 / n) for n in (1, 4, 16)] + [
            figures([answer(3, error="timeout")], concurrency=64)  # has no point
        ]
        loads = [1, 4, 16]
    drawn = curves(Levels({"model": "tiny"}, levels))
    throughput, ttft, itl, e2el = drawn.axes
    order = sorted(range(3), key=lambda i: ([*rates[:2], loads[0]] if rates else loads)[i])
    for axes, names in [
        (throughput, ["output_throughput", "total_token_throughput"]),
        *((axes, [f"p50_{n}_ms", f"p99_{n}_ms"]) for axes, n in ((ttft, "ttft"), (itl, "itl"), (e2el, "e2el"))),
    ]:
        for line, name in zip(axes.lines, names, strict=True):
            assert list(line.get_xdata()) == sorted(loads)
            assert list(line.get_ydata()) == [levels[i].record[name] for i in order]


def test_a_picture_of_one_level_or_of_none_that_completed_can_be_drawn(answers):
    pytest.importorskip("matplotlib")
    from jaxtp.load.picture import curves

    for level in (figures(answers), figures([answer(3, error="timeout")])):
        curves(Levels({"model": "tiny"}, [level])).canvas.draw()
