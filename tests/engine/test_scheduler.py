"""The scheduler and its pages, without a device: random loads, small pools, and what must hold after every step."""

import random
import subprocess
import sys
from collections import Counter

import pytest

from jaxtp.engine.pages import Pages, chain
from jaxtp.engine.params import SamplingParams
from jaxtp.engine.request import QueueFull, Request
from jaxtp.engine.scheduler import Scheduler
from jaxtp.engine.sequence import Sequence
from jaxtp.engine.work import Limits

LIMITS = {"groups": 1, "rows": 4, "pages": 12, "size": 4, "chunk": 4, "tokens": 16}


def sequences(number, prompt, *, n=1, max_tokens=8, priority=0):
    request = Request(str(number), list(prompt), SamplingParams(n=n, max_tokens=max_tokens), priority=priority)
    return [Sequence(request, i, order=(priority, number, i), max_tokens=max_tokens, stop_ids=(0,)) for i in range(n)]


class Device:
    """Makes the token that stands next in a sequence, `stages` ticks later, and checks the plan on its way."""

    def __init__(self, scheduler, ends=lambda sequence: False):
        self.scheduler, self.ends, self.flights = scheduler, ends, []
        self.served: list[Sequence] = []
        self.written: Counter = Counter()

    def step(self, steps=1):
        limits = self.scheduler.limits
        before = {id(s): s.computed for running in self.scheduler.running for s in running}
        work, steps = self.scheduler.schedule(steps=steps)
        flight = []
        for mine in work:
            tokens = len(mine.rows) + sum(chunk.count for chunk in mine.chunks)
            assert tokens <= max(limits.tokens, len(mine.rows) + limits.chunk)
            rows = [s.row for s in mine.rows]
            assert len(set(rows)) == len(rows)
            for s, start in zip(mine.rows, mine.starts, strict=True):
                assert start == before[id(s)]  # nothing is left out, nothing done twice
                assert len(s.pages) * limits.size >= s.computed
                flight.append((s, s.epoch, steps))
            for chunk in mine.chunks:
                s = chunk.sequence
                assert s.ids[chunk.start : chunk.start + chunk.count]
                assert len(s.pages) * limits.size >= chunk.start + chunk.count
                if chunk.ends:
                    flight.append((s, s.epoch, 1))
        self.flights.append(flight)
        if len(self.flights) >= limits.stages:
            self.land(self.flights.pop(0))
        return any(mine.rows or mine.chunks for mine in work) or any(self.flights)

    def land(self, flight):
        for s, epoch, steps in flight:
            for _ in range(steps):
                if s.epoch != epoch or s.finish_reason:
                    break
                s.take(0 if self.ends(s) else 1 + s.made % 7)
                if s.finish_reason:
                    self.scheduler.finish(s)
                    self.served.append(s)
            if not s.finish_reason and s.epoch == epoch:
                self.scheduler.publish(s, upto=(len(s.ids) - 1) // self.scheduler.limits.size)


def test_it_knows_nothing_of_devices():
    names = ("scheduler", "pages", "sequence", "request", "params", "outputs")
    code = f"import sys; import {', '.join(f'jaxtp.engine.{name}' for name in names)}; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize(("groups", "stages", "steps"), [(1, 1, 1), (1, 1, 6), (2, 1, 4), (1, 3, 1), (2, 2, 1)])
def test_every_request_ends_whatever_comes(groups, stages, steps, policy):
    """Random arrivals, lengths, ends and aborts over a pool that is too small: all are served, nothing leaks."""
    preempted = shared = 0
    for seed in range(25):
        rng = random.Random(seed)
        scheduler = Scheduler(Limits(**{**LIMITS, "groups": groups, "stages": stages, "policy": policy}))
        device = Device(scheduler, ends=lambda s, rng=rng: rng.random() < 0.05)
        come, gone = [], 0
        beginning = [rng.randrange(1, 50) for _ in range(12)]
        for number in range(30):
            prompt = beginning[: rng.randrange(13)] + [rng.randrange(1, 50) for _ in range(rng.randrange(1, 12))]
            mine = sequences(
                number, prompt, n=rng.choice([1, 1, 3]), max_tokens=rng.randrange(1, 16), priority=rng.randrange(2)
            )
            come += mine
            scheduler.add(mine)
            for _ in range(rng.randrange(3)):
                device.step(steps)
            if rng.random() < 0.2:
                victim = rng.choice(come)
                if victim.finish_reason is None:
                    victim.finish_reason = "abort"
                    scheduler.finish(victim)
                    gone += 1
            scheduler.check_integrity()
        for _ in range(3000):
            if not device.step(steps) and not scheduler.busy:
                break
        scheduler.check_integrity()
        assert not scheduler.busy
        assert len(device.served) + gone == len(come)
        assert all(s.made == s.max_tokens or 0 in s.ids for s in device.served)
        assert scheduler.used == 0
        preempted, shared = preempted + scheduler.preemptions, shared + scheduler.hits
    assert preempted > 20
    assert shared > 100


def test_nobody_starves():
    """Under a load without end, whoever comes is served within a bound that depends on who came before."""
    rng = random.Random(0)
    scheduler = Scheduler(Limits(**LIMITS))
    device = Device(scheduler)
    came, waited = {}, []
    for tick in range(2000):
        if len(scheduler.waiting) < 6:
            (one,) = sequences(tick, [rng.randrange(1, 9) for _ in range(rng.randrange(1, 30))], max_tokens=10)
            came[one] = tick
            scheduler.add([one])
        device.step()
        waited += [tick - came.pop(s) for s in device.served]
        device.served.clear()
    assert len(waited) > 250
    assert max(waited) < 150
    assert max(tick - at for at in came.values()) < 150


def test_priority_goes_before_arrival_and_a_large_request_is_not_passed():
    scheduler = Scheduler(Limits(**{**LIMITS, "rows": 1, "policy": "priority"}))
    first, last, large = (sequences(i, range(1, n), priority=p)[0] for i, n, p in ((0, 5, 1), (1, 5, 0), (2, 40, 0)))
    scheduler.add([first, last, large])
    device = Device(scheduler)
    while device.step() or scheduler.busy:
        pass
    assert device.served == [last, large, first]


def test_a_full_queue_says_so():
    scheduler = Scheduler(Limits(**{**LIMITS, "queue": 3}))
    scheduler.add(sequences(0, [1], n=5))  # nobody waits: it may
    with pytest.raises(QueueFull, match="5 requests are waiting, and at most 3 may"):
        scheduler.add(sequences(1, [1]))


def test_completions_of_a_prompt_share_its_pages():
    """n completions: the pages of the prompt are there once, and all but the last token is computed once."""
    scheduler = Scheduler(Limits(**{**LIMITS, "tokens": 64}))
    scheduler.add(sequences(0, range(1, 14), n=3, max_tokens=2))
    work, _ = scheduler.schedule()
    assert [(c.sequence.index, c.start, c.count) for c in work[0].chunks] == [
        *((0, at, min(4, 13 - at)) for at in (0, 4, 8, 12)),
        (1, 12, 1),
        (2, 12, 1),
    ]
    assert scheduler.used == 3 + 3
    assert (scheduler.queries, scheduler.hits) == (39, 24)


def test_a_page_is_found_until_it_is_taken_again():
    pages = Pages(3, 2)
    keys = [chain(b"", [1, 2]), chain(chain(b"", [1, 2]), [3, 4])]
    mine = [pages.take(), pages.take()]
    for key, page in zip(keys, mine, strict=True):
        pages.publish(key, page)
    pages.release(mine)
    assert pages.found(keys) == mine
    assert pages.found([keys[1]]) == [mine[1]]
    assert pages.take() not in mine  # what never held anything goes first
    assert pages.take() == mine[1]  # then the end of a text, before its beginning
    assert pages.found(keys) == mine[:1]
    with pytest.raises(AssertionError, match="counts 1 owners, 0 have it"):
        pages.check_integrity()


def test_keys_stand_for_all_that_is_before():
    a, b = chain(b"", [1, 2, 3]), chain(b"", [1, 2, 4])
    assert len({a, b, chain(a, [5]), chain(b, [5]), chain(b"", [5])}) == 5
    assert chain(b"", [1, 2, 3]) == a
