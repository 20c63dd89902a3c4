"""An engine without a model: tokens that follow from prompt and seed, and faults on demand. It needs no jax."""

from __future__ import annotations

import queue
import random
import threading
import time

from jaxtp.engine.outputs import CompletionOutput, Logprob
from jaxtp.engine.params import SamplingParams
from jaxtp.engine.request import QueueFull, Request, Update
from jaxtp.engine.stats import Stats
from jaxtp.text import Tokenizer, find_stop, held

EOS, VOCABULARY, PAGE = 2, 128, 16


def tokens_of(prompt: list[int], params: SamplingParams, index: int, seed: int, room: int) -> list[int]:
    """The tokens of a completion: printable characters, and now and then the end."""
    draw = random.Random(f"{prompt} {seed if params.temperature else 0} {index if params.temperature else 0}")
    most = room if params.max_tokens is None else min(room, params.max_tokens)
    tokens: list[int] = []
    while len(tokens) < most:
        ends = not params.ignore_eos and len(tokens) >= params.min_tokens and draw.random() < 0.02
        tokens.append(EOS if ends else draw.randrange(3, 98))
        if tokens[-1] == EOS or (tokens[-1] in params.stop_token_ids and len(tokens) >= params.min_tokens):
            break
    return tokens


class Row:
    """A completion on its way."""

    def __init__(self, request: Request, index: int, tokens: list[int], tokenizer: Tokenizer | None) -> None:
        self.request, self.index, self.tokens, self.at = request, index, tokens, 0
        self.output = request.outputs[index]
        skip = request.params.skip_special_tokens
        self.text = tokenizer.growing(request.prompt, skip_special_tokens=skip) if tokenizer else None
        self.shown = 0

    def advance(self) -> Update:
        params, output, token = self.request.params, self.output, self.tokens[self.at]
        self.at += 1
        output.token_ids.append(token)
        stopped = token in params.stop_token_ids or (token == EOS and not params.ignore_eos)
        stopped = stopped and len(output.token_ids) >= params.min_tokens
        if stopped or self.at == len(self.tokens):
            output.finish_reason = "stop" if stopped else "length"
            output.stop_reason = token if token in params.stop_token_ids else None
        if self.text is not None and (not stopped or params.include_stop_str_in_output):
            self.text.add([token])
        whole = self.text.text if self.text else ""
        end = len(whole) if output.finish_reason or params.include_stop_str_in_output else len(whole) - held(whole, params.stop)
        searched = len(whole) - 1 if len(output.token_ids) >= params.min_tokens else len(whole)
        if not stopped and (found := find_stop(whole, params.stop, searched=searched)):
            end = found[0] + len(found[1]) * params.include_stop_str_in_output
            output.finish_reason, output.stop_reason = "stop", found[1]
        output.text += whole[self.shown : end]
        new, self.shown = whole[self.shown : end], max(self.shown, end)
        return Update(self.index, new, [token], self.logprobs(token), output.finish_reason, output.stop_reason)

    def logprobs(self, token: int) -> list[dict[int, Logprob]] | None:
        count = self.request.params.logprobs
        if count is None:
            return None
        best = [(token + i) % VOCABULARY for i in range(count)]
        found = {token: Logprob(-0.5, 1)} | {other: Logprob(-0.5 - i, i + 1) for i, other in enumerate(best)}
        found[token] = Logprob(-0.5, 1)
        if self.output.logprobs is not None:
            self.output.logprobs.append(found)
        return [found]


class FakeEngine:
    """rows: completions that run together. queued: those that may wait. seconds: that a step takes. fails_at: the step that
    raises. hold(): no step is made before go().
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        rows: int = 8,
        queued: int = 10_000,
        seconds: float = 0.0,
        max_model_len: int = 512,
        fails_at: int | None = None,
    ) -> None:
        self.tokenizer, self.rows, self.queued, self.seconds = tokenizer, rows, queued, seconds
        self.max_model_len, self.fails_at = max_model_len, fails_at
        self.wake, self.on_step = threading.Event(), []
        self.waiting: list[tuple[int, int, Row]] = []
        self.running: list[Row] = []
        self.aborted: list[Request] = []
        self.seen: set[tuple[int, ...]] = set()
        self.made = self.prompted = self.hits = self.steps = self.number = 0
        self._going = threading.Event()
        self._going.set()
        self._lock = threading.RLock()
        self._told: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._tell, daemon=True).start()

    def hold(self) -> None:
        self._going.clear()

    def go(self) -> None:
        self._going.set()
        self.wake.set()

    # -- the interface -------------------------------------------------------------------------------------------------

    def submit(self, prompt, params, *, id=None, priority=0, stream=True, listener=None) -> Request:
        if not prompt:
            raise ValueError("a prompt has no tokens")
        if len(prompt) >= self.max_model_len:
            raise ValueError(f"a prompt has {len(prompt)} tokens, but max_model_len is {self.max_model_len}")
        for name, ids in (("a prompt", prompt), ("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            if wrong := [token for token in ids if not 0 <= token < VOCABULARY]:
                raise ValueError(f"{name} has token ids {wrong[:5]}, outside the vocabulary of {VOCABULARY}")
        if params.top_k > VOCABULARY:
            raise ValueError(f"top_k={params.top_k} must be at most {VOCABULARY}, the size of the vocabulary")
        if params.logprobs is not None and params.logprobs > VOCABULARY:
            raise ValueError(f"logprobs={params.logprobs} must be at most {VOCABULARY}, the size of the vocabulary")
        if params.min_tokens > self.max_model_len:
            raise ValueError(f"min_tokens={params.min_tokens} must be at most {self.max_model_len}, max_model_len")
        with self._lock:
            if len(self.waiting) + params.n > self.queued:
                raise QueueFull(f"{len(self.waiting)} completions wait already, at most {self.queued} may")
            self.number += 1
            seed = self.number if params.seed is None else params.seed
            request = Request(id or str(self.number), prompt, params, seed=seed, priority=priority, listener=listener)
            logprobs = params.logprobs is not None
            request.outputs = [CompletionOutput(i, "", [], logprobs=[] if logprobs else None) for i in range(params.n)]
            for i in range(params.n):
                tokens = tokens_of(prompt, params, i, seed, self.max_model_len - len(prompt))
                self.waiting.append((priority, self.number, Row(request, i, tokens, self.tokenizer)))
            self.waiting.sort(key=lambda entry: entry[:2])
        self.wake.set()
        return request

    def abort(self, request: Request) -> None:
        with self._lock:
            self.aborted.append(request)
            self.waiting = [entry for entry in self.waiting if entry[2].request is not request]
            self.running = [row for row in self.running if row.request is not request]
            left = [output for output in request.outputs if output.finish_reason is None]
            for output in left:
                output.finish_reason = "abort"
            request.finished_at = time.monotonic()
            self._put(request, [Update(o.index, "", [], None if o.logprobs is None else [], "abort") for o in left])
        self.wake.set()

    def step(self) -> bool:
        self.wake.clear()
        if not self._going.is_set():
            return False
        if self.seconds:
            time.sleep(self.seconds)
        with self._lock:
            while self.waiting and len(self.running) < self.rows:
                self._begin(self.waiting.pop(0)[2])
            if not self.running:
                return False
            self.steps += 1
            if self.steps == self.fails_at:
                raise RuntimeError("the device is gone")
            told: dict[Request, list[Update]] = {}
            for row in self.running:
                told.setdefault(row.request, []).append(row.advance())
                row.request.first_token = row.request.first_token or time.monotonic()
            self.made += len(self.running)
            for tell in self.on_step:
                tell(len(self.running))
            self.running = [row for row in self.running if row.output.finish_reason is None]
            for request, updates in told.items():
                request.finished_at = time.monotonic() if request.finished else None
                self._put(request, updates)
        return True

    def stats(self) -> Stats:
        with self._lock:
            used = sum(-(-(len(row.request.prompt) + row.at) // PAGE) for row in self.running)
            counts = (len(self.running), len(self.waiting), 64, min(used, 64), PAGE, self.prompted, self.hits, 0)
            return Stats(*counts, self.prompted, self.made, self.steps)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _begin(self, row: Row) -> None:
        request = row.request
        if request.scheduled is None:
            request.scheduled = time.monotonic()
            known = tuple(request.prompt) in self.seen
            request.cached_tokens = (len(request.prompt) - 1) // PAGE * PAGE if known else 0
            self.seen.add(tuple(request.prompt))
            self.prompted += len(request.prompt)
            self.hits += request.cached_tokens
        self.running.append(row)

    def _put(self, request: Request, updates: list[Update]) -> None:
        if updates and request.listener:
            self._told.put((request, updates))

    def _tell(self) -> None:
        while True:
            request, updates = self._told.get()
            request.listener(request, updates)
