"""Every legal schedule of up to 8 ranks, 4 chunks and 32 microbatches: complete, in order, and as long as the formulas say."""

import itertools

import pytest

from jaxtp import Circulation, Schedule, draw_schedule

LEGAL = [Schedule(name, p, M) for name, p, M in itertools.product(("gpipe", "1f1b"), range(1, 9), range(1, 33))]
LEGAL += [
    Schedule("interleaved_1f1b", p, M, v)
    for p, v, M in itertools.product(range(1, 9), range(1, 5), range(1, 33))
    if v == 1 or M % p == 0
]


def when(schedule):
    """{(F or B, microbatch, stage): tick}; a rank's second F or B at one tick is an error."""
    found = {}
    for tick, rank in itertools.product(range(len(schedule.kinds)), range(schedule.ranks)):
        for kind, work in (("F", schedule.forward(tick, rank)), ("B", schedule.backward(tick, rank))):
            if work is not None:
                key = kind, work.microbatch, work.chunk * schedule.ranks + rank
                assert key not in found, f"{key} twice"
                found[key] = tick
    return found


@pytest.mark.parametrize("p", range(1, 9))
def test_each_f_and_b_once_and_in_order(p):
    for schedule in (s for s in LEGAL if s.ranks == p):
        ticks, stages = when(schedule), p * schedule.chunks
        assert len(ticks) == 2 * schedule.microbatches * stages
        for m in range(schedule.microbatches):
            for s in range(stages):
                if s:  # what comes from the neighbour is there at the very next tick: nothing else need be kept
                    assert ticks["F", m, s] == ticks["F", m, s - 1] + 1
                    assert ticks["B", m, s - 1] == ticks["B", m, s] + 1
                assert ticks["B", m, s] >= ticks["F", m, s]


def test_the_bubble_is_that_of_the_formula():
    for s in LEGAL:
        assert s.bubble == pytest.approx((s.ranks - 1) / (s.chunks * s.microbatches)), s
        assert s.time(1.0, 2.0) == pytest.approx(3 * (s.microbatches + (s.ranks - 1) / s.chunks)), s


def test_what_is_in_flight_is_that_of_the_formula():
    for s in LEGAL:
        p, v, everything = s.ranks, s.chunks, s.microbatches * s.chunks
        for r in range(p):
            expected = everything if s.name == "gpipe" else min(v * p + p - 1 - 2 * r, everything)
            assert s.in_flight(r) == expected, (s, r)


def test_1f1b_holds_no_more_with_more_microbatches():
    assert [Schedule("1f1b", 4, M).in_flight(0) for M in (8, 16, 32)] == [7, 7, 7]
    assert [Schedule("gpipe", 4, M).in_flight(0) for M in (8, 16, 32)] == [8, 16, 32]


def test_the_picture_shows_every_piece_of_work_once():
    pytest.importorskip("matplotlib")
    schedule = Schedule("interleaved_1f1b", 4, 8, 2)
    (axes,) = draw_schedule(schedule).axes
    bars = [(bar.get_y(), bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert len(bars) == 2 * 8 * 4 * 2
    assert max(end for _, _, end in bars) == pytest.approx(schedule.time())
    for (y, _, end), (other, start, _) in itertools.pairwise(sorted(bars)):
        assert y != other or end <= start + 1e-9  # one thing at a time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zb", 2, 4), "no schedule is named 'zb'; schedules: gpipe, 1f1b, interleaved_1f1b"),
        (("1f1b", 0, 4), "ranks=0 must be at least 1"),
        (("gpipe", 2, 0), "microbatches=0 must be at least 1"),
        (("1f1b", 2, 4, 2), "1f1b has one chunk a rank, not 2; interleaved_1f1b has several"),
        (("interleaved_1f1b", 4, 6, 2), "4 ranks must divide the microbatches; 6 could be 4 or 8"),
        (("interleaved_1f1b", 4, 3, 2), "3 could be 4$"),
    ],
)
def test_schedules_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


# -- rows that circulate in generation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", range(1, 9))
def test_circulation(ranks):
    for groups in range(1, ranks + 1):
        ring = Circulation(ranks, groups)
        work = {(tick, rank): ring.group(tick, rank) for tick in range(5 * ranks) for rank in range(ranks)}
        # from one rank to the next from one tick to the next, and into the first again when its token is known
        assert all(work[t, r] == work[t + 1, r + 1] for t, r in work if r + 1 < ranks and (t + 1, r + 1) in work)
        assert [work[tick, 0] for tick in range(2 * ranks)] == [*range(groups), *[None] * (ranks - groups)] * 2
        assert all(work[tick, rank] is None for tick, rank in work if tick < rank)  # nothing has come so far
        steady = range(ranks - 1, 5 * ranks - 1)
        idle = sum(work[t, r] is None for t in steady for r in range(ranks)) / len(steady) / ranks
        assert ring.idle == pytest.approx(idle)


@pytest.mark.parametrize("groups", [0, 5])
def test_groups_that_have_no_place(groups):
    with pytest.raises(ValueError, match=f"{groups} groups of rows on 4 ranks: at least one, and at most as many as ranks"):
        Circulation(4, groups)


def test_the_picture_of_a_circulation():
    pytest.importorskip("matplotlib")
    ring = Circulation(4, 2)
    (axes,) = draw_schedule(ring).axes
    bars = {(int(bar.get_y() + 0.5), round(bar.get_x())) for bar in axes.patches}
    last = max(tick for _, tick in bars)
    assert last >= 2 * ring.ranks  # twice around
    assert bars == {(r, t) for r in range(4) for t in range(last + 1) if ring.group(t, r) is not None}
