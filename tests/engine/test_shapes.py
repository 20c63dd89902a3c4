"""The shapes of steps: what is padded keeps within the limits, too."""

import itertools

import pytest

from jaxtp.engine.buckets import Buckets
from jaxtp.engine.features import EVERYTHING, RANDOM, level
from jaxtp.engine.params import SamplingParams
from jaxtp.engine.request import Request
from jaxtp.engine.scheduler import Scheduler
from jaxtp.engine.sequence import Sequence
from jaxtp.engine.work import Limits
from jaxtp.ops.sampling import Features


def shapes(limits, *, prompts, new, read="cudnn", length=512):
    """Those of the steps that so many prompts of 300 tokens need, each of which makes `new` tokens."""
    scheduler, found = Scheduler(limits), []
    for i in range(prompts):
        request = Request(str(i), [3] * 300, SamplingParams(max_tokens=new), seed=i, stream=True)
        scheduler.add([Sequence(request, 0, order=(0, i, 0), max_tokens=new, stop_ids=())])
    sequences = list(scheduler.waiting)
    buckets = Buckets(limits, read, pages=-(-length // limits.size))
    while scheduler.busy:
        work, steps = scheduler.schedule()
        found.append(buckets.shape(work, steps, stops=4, biases=0))
        for sequence in sequences:
            if sequence.running and sequence.sent == new:
                scheduler.finish(sequence)
    return found


@pytest.mark.parametrize(("rows", "groups"), [(32, 1), (100, 1), (64, 2)])
def test_a_step_with_chunks_keeps_within_its_tokens(rows, groups):
    """Padding rows and chunks apart, 32 rows and 3 chunks would be 544 tokens, whose sums go to NCCL."""
    limits = Limits(groups=groups, rows=rows, pages=8 * rows, size=64, chunk=128, tokens=512)
    found = shapes(limits, prompts=3 * rows * groups // 2, new=20)
    mixed = [shape for shape in found if shape.chunks]
    assert max(shape.tokens for shape in mixed) <= 512
    assert any(shape.rows and shape.chunks > 1 for shape in mixed)
    assert len({(shape.rows, shape.chunks) for shape in found}) <= 20  # programs


def test_more_rows_than_the_tokens_leave_room_for_take_one_chunk_along():
    found = shapes(Limits(groups=1, rows=64, pages=512, size=64, chunk=32, tokens=64), prompts=64, new=40)
    assert {shape.chunks for shape in found if shape.rows == 64} <= {0, 1}


def test_a_slab_has_no_more_rows_than_pages():
    limits = Limits(groups=1, rows=12, pages=12, size=512, chunk=128, tokens=512, slab=True, caching=False)
    found = shapes(limits, prompts=12, new=8, read="slab")
    assert max(shape.rows for shape in found) == 12
    assert all(a.pages == b.pages == 1 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("read", "chunk", "tokens", "length", "most"), [("rows", 32, 512, 512, 40), ("cudnn", 128, 512, 8192, 100)]
)
def test_a_warm_up_has_not_too_many_programs(read, chunk, tokens, length, most):
    limits = Limits(groups=1, rows=256, pages=2048, size=64, chunk=chunk, tokens=tokens)
    everything = set(Buckets(limits, read, pages=length // 64).all(stops=4, biases=0))
    assert len(everything) <= most
    assert {shape.rows for shape in everything if not shape.chunks} == {1, 2, 4, 8, 16, 32, 64, 128, 256}
    met = shapes(limits, prompts=300, new=20, read=read, length=length)
    assert everything.issuperset(met)


def test_beyond_eight_lanes_prompts_alone_come_in_what_is_halfway_too():
    limits = Limits(groups=1, rows=64, pages=512, size=64, chunk=32, tokens=512)
    buckets = Buckets(limits, "rows", pages=8)
    for rows, sizes in ((0, (1, 2, 4, 8, 12, 16)), (1, (1, 2, 4, 8, 12, 15)), (4, (1, 2, 4, 8, 15))):
        met = {shape.chunks for shape in buckets.all(stops=4, biases=0) if shape.rows == rows and shape.chunks}
        assert met == {*sizes}


def test_a_server_has_two_kinds_of_samplers():
    asked = [Features(), Features(random=True), Features(bias=True), Features(logprobs=3), Features(random=True, truncate=True)]
    assert [level(one) for one in asked] == [RANDOM, RANDOM, EVERYTHING, EVERYTHING, EVERYTHING]
