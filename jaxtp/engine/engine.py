"""The engine: requests come and go; each step takes along what fits, and the host is one step ahead of what it has read."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from jaxtp.engine.arguments import check_prompt, check_request
from jaxtp.engine.buckets import Buckets
from jaxtp.engine.detokenizer import Arrival, Detokenizer
from jaxtp.engine.features import EVERYTHING, RANDOM, Asked, features
from jaxtp.engine.flight import Flight
from jaxtp.engine.outputs import CompletionOutput
from jaxtp.engine.params import SamplingParams
from jaxtp.engine.plan import Cards, Shape, empty
from jaxtp.engine.programs import Programs
from jaxtp.engine.request import Listener, Request
from jaxtp.engine.runner import Runner
from jaxtp.engine.scheduler import Scheduler
from jaxtp.engine.sequence import Sequence
from jaxtp.engine.stats import Landing, Stats
from jaxtp.engine.step import CALL_STEPS
from jaxtp.engine.work import LONG, Limits, Work
from jaxtp.model import Llama
from jaxtp.ops.sampling import Features
from jaxtp.text import Tokenizer

STOP_STRING_STEPS = 8  # the host looks for stop strings this often


class Engine:
    """Runs requests on one model. `submit` and `abort` may be called from any thread, `step` from one.

    ahead: steps that are dispatched before the tokens of the first are read. prompts_first: but a step with prompts is read
    before another one is dispatched, so that who comes meanwhile goes along with that one. patience: seconds that who comes may
    wait for steps that were dispatched together (None: any number of them). asked: what the sampler must know.
    """

    def __init__(
        self,
        model: Llama,
        programs: Programs,
        limits: Limits,
        *,
        buckets: Buckets,
        max_model_len: int,
        tokenizer: Tokenizer | None = None,
        eos: Seq[int] = (),
        ahead: int = 1,
        prompts_first: bool = False,
        patience: float | None = None,
    ) -> None:
        self.model, self.programs, self.limits, self.buckets = model, programs, limits, buckets
        self.max_model_len, self.eos, self.patience = max_model_len, tuple(eos), patience
        self.ahead, self.prompts_first = ahead, prompts_first
        self.scheduler = Scheduler(limits)
        self.runner = Runner(model, programs, pages=limits.pages, size=limits.size, rows=limits.rows)
        self.cards = Cards(groups=limits.groups, rows=limits.rows, pages=buckets.pages, slab=limits.slab)
        self.detokenizer = Detokenizer(tokenizer, self._stopped)
        self.wake = threading.Event()
        self.on_step: list[Callable[[int], None]] = []  # told how many tokens a step has
        self.on_land: list[Callable[[Landing], None]] = []
        self.generation_tokens = self.steps = 0
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._flights: deque[Flight] = deque()
        self._entered: deque[list[Work]] = deque(maxlen=model.stages)  # the work of the last ticks, the newest first
        self.asked = Asked()
        self._landed, self._step_seconds = time.monotonic(), 0.0

    # -- from any thread -----------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        id: str | None = None,
        priority: int = 0,
        seed: int | None = None,
        stream: bool = True,
        listener: Listener | None = None,
    ) -> Request:
        """Puts a prompt into the queue.

        seed: where params has none. stream: whether somebody reads along. listener: is told what is new, in order, in another
        thread once `detokenizer` has started; it must not block.

        Raises ValueError for what can never run, and QueueFull where too many wait.
        """
        self.check(prompt, params)
        number = next(self._numbers)
        chosen = params.seed if params.seed is not None else number if seed is None else seed
        request = Request(id or str(number), prompt, params, seed=chosen, priority=priority, stream=stream, listener=listener)
        request.outputs = [
            CompletionOutput(i, "", [], logprobs=None if params.logprobs is None else []) for i in range(params.n)
        ]
        room = self.max_model_len - len(prompt)
        most = room if params.max_tokens is None else min(room, params.max_tokens)
        stops = (*(() if params.ignore_eos else self.eos), *params.stop_token_ids)
        rank = priority if self.limits.policy == "priority" else 0
        turned = self._turned(len(prompt))
        sequences = [
            Sequence(request, i, order=(rank, number, i), max_tokens=most, stop_ids=stops, turned=turned)
            for i in range(params.n)
        ]
        with self._lock:
            self.scheduler.add(sequences)
            request.sequences = sequences
            self.asked.add(features(params), params.n)
        self.wake.set()
        return request

    def _turned(self, tokens: int) -> bytes:
        """How the keys of so long a prompt are turned, where that depends on its length."""
        config = self.model.config
        if self.limits.turn is not None and tokens > self.limits.turn:
            return LONG
        return b"%d" % tokens if config.rope.kind == "dynamic" and tokens > config.max_position_embeddings else b""

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Raises ValueError for what can never run."""
        check_request(params, self.model.config, self.max_model_len)
        check_prompt(prompt, self.model.config, self.max_model_len)

    def abort(self, request: Request) -> None:
        """Ends what has not ended of a request; its rows and pages are free for the next step."""
        with self._lock:
            mine = [sequence for sequence in request.sequences if sequence.finish_reason is None]
            for sequence in mine:
                self._end(sequence, "abort")
            self.detokenizer.put([Arrival(sequence, [], finish_reason="abort") for sequence in mine])
        self.wake.set()

    def stats(self) -> Stats:
        """How things stand."""
        with self._lock:
            scheduler, limits = self.scheduler, self.limits
            return Stats(
                running=sum(map(len, scheduler.running)),
                waiting=len(scheduler.waiting),
                pages=limits.pages * limits.groups,
                pages_used=scheduler.used,
                page_size=limits.size,
                prefix_queries=scheduler.queries,
                prefix_hits=scheduler.hits,
                preemptions=scheduler.preemptions,
                prompt_tokens=scheduler.prompt_tokens,
                generation_tokens=self.generation_tokens,
                steps=self.steps,
            )

    # -- the loop ------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Dispatches a step, and reads the one before. False: there was nothing to do; `wake` is set when there is."""
        self.wake.clear()
        with self._lock:
            most = self._most_steps()
            work, steps = self.scheduler.schedule(steps=most)
            active = any(mine.rows or mine.chunks for mine in work)
            plan = self._plan(work, steps, loop=most > 1) if active or self._under_way else None
            wanted = self.asked.wanted()
        # a call that comes back with its last step: what was before is read before it, and what it made right after
        waits = plan is not None and plan[1].loop and self.buckets.host_loops
        while waits and self._flights:
            self._land(self._flights.popleft())
        if plan is not None:
            self._dispatch(work, *plan, wanted, steps)
        prompts = self.prompts_first and any(mine.chunks for mine in work)
        while len(self._flights) > (self.ahead if active and not waits and not prompts else 0):
            self._land(self._flights.popleft())
            if not active:
                break
        with self._lock:
            busy = self.scheduler.busy or bool(self._flights) or self._under_way
            if not busy:
                self.check_integrity()
                self.asked.rest()
        return busy

    def run(self) -> None:
        """Steps until there is nothing to do."""
        while self.step():
            pass

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> float:
        """Compiles every step that may come, and returns the seconds that it took. progress: told (programs done, of all).

        On GPUs each is run as well, with nobody in its lanes (but for penalties, whose counts are made when somebody asks for
        them): the first call loads a program, some tenths of a second that a request would wait for.
        """
        start, shapes = time.perf_counter(), list(self.buckets.all(stops=self.cards.stops, biases=self.cards.biases))
        with self._lock:
            asked = (RANDOM, EVERYTHING) if self.asked.levels else (self.asked.wanted(),)
        wanted = list(itertools.product(asked, shapes))
        for done, (found, shape) in enumerate(wanted, start=1):
            self.runner.compile(shape, found)
            if self.buckets.host_loops and self.limits.stages == 1 and not found.penalties:
                self.runner.run(empty(shape, self.limits.groups), shape, found)
            if progress:
                progress(done, len(wanted))
        return time.perf_counter() - start

    def check_integrity(self) -> None:
        """Raises AssertionError where rows or pages are lost."""
        with self._lock:
            self.scheduler.check_integrity()

    @property
    def _under_way(self) -> bool:
        """Whether anything is in the stages of a pipeline yet."""
        before = list(self._entered)[: self.model.stages - 1]
        return any(mine.rows or mine.chunks for work in before for mine in work)

    def _most_steps(self) -> int:
        most = CALL_STEPS
        if self.patience is not None:
            most = max(1, min(most, int(self.patience / self._step_seconds))) if self._step_seconds else 1
        for running in self.scheduler.running:
            for sequence in running:
                if sequence.request.stream:
                    return 1
                if sequence.request.params.stop:
                    most = min(most, STOP_STRING_STEPS)
        return most

    def _plan(self, work: list[Work], steps: int, *, loop: bool) -> tuple[np.ndarray, Shape]:
        for mine in work:
            for chunk in mine.chunks:
                stops, biases = len(chunk.sequence.stop_ids), len(chunk.sequence.request.params.logit_bias)
                self.cards.widen(itertools.chain(*self.scheduler.running), stops=stops, biases=biases)
        shape = self.buckets.shape(work, steps, stops=self.cards.stops, biases=self.cards.biases, loop=loop)
        return self.cards.pack(work, shape), shape

    def _dispatch(self, work: list[Work], plan: np.ndarray, shape: Shape, wanted: Features, steps: int) -> None:
        if wanted.penalties:
            for mine in work:
                for chunk in mine.chunks:
                    if chunk.ends:
                        sequence, prompt = chunk.sequence, chunk.sequence.request.prompt
                        self.runner.recount(sequence.group, sequence.row, prompt, sequence.ids[len(prompt) :])
        made, shape = self.runner.run(plan, shape, wanted, steps)
        self._entered.appendleft(work)
        if len(self._entered) == self.model.stages:
            self._flights.append(Flight.of(made, self._entered[-1], shape, slab=self.limits.slab))
        self.steps += 1
        tokens = sum(len(mine.rows) * steps + sum(chunk.count for chunk in mine.chunks) for mine in work)
        for tell in self.on_step:
            tell(tokens)

    def _land(self, flight: Flight) -> None:
        back = flight.read()
        arrivals, now = [], time.monotonic()
        if self._flights or self._step_seconds:  # one behind another
            self._step_seconds = (now - self._landed) / back.steps
        self._landed = now
        with self._lock:
            for group, lane, sequence, epoch in flight.lanes:
                if sequence.epoch != epoch or sequence.finish_reason is not None:
                    continue
                new = []
                for token in back.tokens[group][lane]:
                    if token < 0 or sequence.finish_reason is not None:
                        break
                    sequence.take(token)
                    new.append(token)
                if not new:
                    continue
                if sequence.request.first_token is None:
                    sequence.request.first_token = now
                self.generation_tokens += len(new)
                asked = sequence.request.params.logprobs is not None
                alternatives = back.alternatives(group, lane, len(new)) if asked else None
                arrivals.append(Arrival(sequence, new, alternatives, sequence.finish_reason))
                if sequence.finish_reason is not None:
                    self._end(sequence, sequence.finish_reason)
                else:
                    self.scheduler.publish(sequence, upto=(len(sequence.ids) - 1) // self.limits.size)
            self.detokenizer.put(arrivals)
        landing = flight.landing(back.steps, sum(len(arrival.tokens) for arrival in arrivals))
        for tell in self.on_land:
            tell(landing)

    def _stopped(self, sequence: Sequence) -> None:
        """A stop string ended it."""
        with self._lock:
            if sequence.finish_reason is None:
                self._end(sequence, "stop")

    def _end(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        self.scheduler.finish(sequence)
        self.asked.drop(features(sequence.request.params))
        if all(other.finish_reason is not None for other in sequence.request.sequences):
            sequence.request.finished_at = time.monotonic()
