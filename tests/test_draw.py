"""Pictures: what may be named, what is refused, and legends and ticks that can be read."""

import itertools
from types import SimpleNamespace

import pytest
import tiny

from jaxtp import Circulation, Llama, Schedule, draw_context, draw_schedule, draw_shardings, make_mesh, plan
from jaxtp.draw import LEGEND, aside, plain_ticks
from jaxtp.planner.picture import curves

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(scope="module")
def model():
    return Llama(tiny.config(num_layers=12), mesh=make_mesh(tp=2))


def titles(figure):
    return [at.get_title().split("\n")[0] for at in figure.axes if at.get_title()]


@pytest.mark.parametrize(
    ("paths", "drawn"),
    [
        (["embed", "norm.weight"], ["embed", "norm.weight"]),
        ("layers.3.mlp.down", ["layers.3.mlp.down"]),
        (("layers.1.mlp.*", "layers.1.mlp.down"), ["layers.1.mlp.down", "layers.1.mlp.gate_up"]),
        ("layers.*.mlp.down", [f"layers.{i}.mlp.down" for i in range(12)]),
    ],
)
def test_weights_are_named_by_path_or_pattern(model, paths, drawn):
    assert sorted(titles(draw_shardings(model, paths))) == sorted(drawn)


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ([], r"no weight is named, so there is nothing to draw; the model's weights: .*layers\.\*\.mlp\.down"),
        (
            ["embed", "layers.0.mlp.up"],
            r"no weight 'layers\.0\.mlp\.up'; its weights: .*layers\.\*\.mlp\.gate_up",
        ),
        ("layers.0.*.bias", r"the model has no weight 'layers\.0\.\*\.bias'; its weights: "),
        ("", "the model has no weight ''; its weights: "),
        ("*", r"\*: \d+ weights are too many to look at; at most 48 are drawn at once"),
    ],
)
def test_what_cannot_be_drawn_is_said(model, paths, said):
    with pytest.raises(ValueError, match=said) as error:
        draw_shardings(model, paths)
    assert "layers.1." not in str(error.value)  # layers that are alike are named once


def test_a_schedule_is_what_is_drawn():
    with pytest.raises(TypeError, match="'1f1b' is no schedule; draw one such as Schedule\\(\"1f1b\", ranks=4"):
        draw_schedule("1f1b")
    with pytest.raises(ValueError, match=r"131,072 pieces of work each way are too many to see"):
        draw_schedule(Schedule("1f1b", 32, 4096))
    with pytest.raises(ValueError, match=r"microbatches=2\.5 must be at least 1, and whole"):
        Schedule("1f1b", 4, 2.5)
    assert "held" not in draw_schedule(Schedule("forward", 2, 3)).axes[0].get_title()


def test_layouts_can_be_told_apart_however_many_there_are():
    layouts = plan("llama-3.1-8b", "8x8xH100").distinct()
    assert len(layouts) > 20
    axes = curves(layouts, "").axes[0]
    lines = [line for line in axes.lines if line.get_label() != "frontier"]
    assert len(lines) == len({(line.get_color(), line.get_marker()) for line in lines}) == len(layouts)
    axes.figure.canvas.draw()
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


@pytest.mark.parametrize("limits", [(1.85, 14), (0.1, 1.2), (20, 24), (0.02, 900), (1e-3, 1e6)], ids=str)
def test_ticks_are_plain_numbers_and_enough_of_them(limits):
    figure, axes = plt.subplots()
    axes.plot(limits, [1, 2])
    axes.set(xscale="log", xlim=limits)
    plain_ticks(axes.xaxis)
    figure.canvas.draw()
    shown = {
        tick.get_text(): at
        for tick, at in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)
        if limits[0] <= at <= limits[1]
    }
    plt.close(figure)
    assert 3 <= len(shown) <= 16
    assert all(float(text.replace(",", "")) == pytest.approx(at) for text, at in shown.items())


def test_a_long_legend_has_columns():
    figure, axes = plt.subplots()
    for i in range(LEGEND + 1):
        axes.plot([0], [0], label=str(i))
    aside(axes)
    assert axes.get_legend()._ncols == 2
    plt.close(figure)


def test_a_diagnosis_has_a_colour_for_each_kind_and_a_marker_for_each_axis():
    from jaxtp.audit.doctor import Diagnosis

    timed = [
        SimpleNamespace(kind=kind, axis=axis, bytes=size, bus=size * 1e3, devices=2, seconds=1e-3)
        for kind, axis, size in itertools.product("abcde", ("dp", "pp", "tp"), (2**14, 2**20, 2**28))
    ]
    axes = Diagnosis("H100", 8, None, {}, "", {}, {}, tuple(timed), {}, ()).draw().axes[0]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == len(axes.lines) == 15


def test_meshes_that_lack_the_same_thing_share_a_line():
    plans = plan("llama-3.1-405b", "16x8xH100", batch=8)
    _, *reasons = plans.table().caption.split("\n")
    assert len(reasons) == 4  # of those that would join nodes one for tp, and one for cp with it
    assert any(line.startswith("dp=16 × tp=8, and 9 more: needs 94.6 GiB") for line in reasons)
    assert "legal pp with them: 1 to 126" in " ".join(reasons)
    assert len(plans.table(every=True).caption.split("\n")) == 1 + len(plans.refused)


@pytest.mark.parametrize(("ranks", "groups"), [(4, 4), (4, 3), (4, 1), (1, 1)])
def test_groups_of_rows_circulate(ranks, groups):
    """Each goes through the ranks a tick apart, and enters the first again once the last is done with it."""
    ring = Circulation(ranks, groups)
    for group in range(groups):
        for turn, rank in itertools.product(range(3), range(ranks)):
            assert ring.group(group + turn * ranks + rank, rank) == group
    worked = [ring.group(tick, rank) is not None for tick in range(ranks, 3 * ranks) for rank in range(ranks)]
    assert worked.count(False) / len(worked) == ring.idle == 1 - groups / ranks
    (axes,) = draw_schedule(ring).axes
    bars = {(round(bar.get_y() + bar.get_height() / 2), round(bar.get_x())) for bar in axes.patches}
    assert bars == {(r, t) for r in range(ranks) for t in range(4 * ranks - 1) if ring.group(t, r) is not None}


@pytest.mark.parametrize("groups", [0, 5])
def test_at_most_as_many_groups_as_ranks(groups):
    with pytest.raises(ValueError, match=f"{groups} groups of rows on 4 ranks: at least one, and at most as many as ranks"):
        Circulation(4, groups)


@pytest.mark.parametrize("ranks", [2, 4, 12])
def test_rows_over_ranks(ranks):
    """Every rank has two chunks, each chunk sees those before it, and a cache's tokens have their ranks' colours."""
    row, pairs, ring, cache = draw_context(ranks).axes
    assert len(row.patches) == 2 * ranks
    assert len(pairs.patches) == ranks * (2 * ranks + 1)
    assert len(ring.patches) == ranks * ranks
    assert "busiest / mean 1.00" in row.get_title()
    colours = [{p.get_facecolor() for p in cache.patches if round(p.get_y() + 0.47) == rank} for rank in range(ranks)]
    assert all(len(each) == 1 for each in colours)
    assert len(set.union(*colours)) == ranks


def test_rows_over_too_few_or_too_many_are_refused():
    for ranks in (1, 17):
        with pytest.raises(ValueError, match=rf"ranks={ranks} must be in \[2, 16\]"):
            draw_context(ranks)
