"""Prometheus metrics, by the names and labels of vLLM's, so that dashboards made for it work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from jaxtp.engine.params import SamplingParams
from jaxtp.engine.request import Request, Update
from jaxtp.serve.served import Engine

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_LABELS = ("model_name", "engine")
REASONS = ("stop", "length", "abort")


class Metrics:
    """What is counted of an engine and its requests."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._registry, self._labels = CollectorRegistry(), (name, "0")
        lengths = _one_two_five(engine.max_model_len)

        def histogram(name: str, buckets: Sequence[float], said: str) -> Histogram:
            made = Histogram(f"vllm:{name}", said, _LABELS, buckets=buckets, registry=self._registry)
            return made.labels(*self._labels)

        self.first = histogram("time_to_first_token_seconds", _FIRST, "Seconds from arrival to the first token.")
        self.between = histogram("inter_token_latency_seconds", _TOKEN, "Seconds between tokens of a completion.")
        self.each = histogram("request_time_per_output_token_seconds", _TOKEN, "Seconds a token, the first left out.")
        self.whole = histogram("e2e_request_latency_seconds", _WHOLE, "Seconds from arrival to the last token.")
        self.queue = histogram("request_queue_time_seconds", _WHOLE, "Seconds from arrival to the first step.")
        self.inference = histogram("request_inference_time_seconds", _WHOLE, "Seconds from the first step to the last token.")
        self.prefill = histogram("request_prefill_time_seconds", _WHOLE, "Seconds from the first step to the first token.")
        self.decode = histogram("request_decode_time_seconds", _WHOLE, "Seconds from the first token to the last.")
        self.prompt_tokens = histogram("request_prompt_tokens", lengths, "Tokens of a prompt.")
        self.generation_tokens = histogram("request_generation_tokens", lengths, "Tokens of a completion.")
        self.n = histogram("request_params_n", (1, 2, 5, 10, 20), "Completions asked for.")
        self.max_tokens = histogram("request_params_max_tokens", lengths, "Tokens asked for at most.")
        step = histogram("iteration_tokens_total", _STEP, "Tokens in a step of the engine.")
        success = Counter(
            "vllm:request_success",
            "Completions that have ended, by why.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self.ended = {reason: success.labels(*self._labels, reason) for reason in REASONS}
        engine.on_step.append(step.observe)
        self._registry.register(_OfEngine(engine, self._labels))
        ProcessCollector(registry=self._registry)

    def course(self, prompt: list[int], params: SamplingParams) -> Course:
        """What follows a request."""
        return Course(self, prompt, params)

    def text(self, accept: str) -> tuple[bytes, str]:
        """All of them, in the form that is wanted, and its content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type


class Course:
    """The course of a request: when each completion had its last token, and how many."""

    def __init__(self, metrics: Metrics, prompt: list[int], params: SamplingParams) -> None:
        self._metrics, self._prompt, self._params = metrics, len(prompt), params
        self._last: dict[int, float] = {}
        self._made: dict[int, int] = {}

    def add(self, when: float, request: Request, updates: Sequence[Update]) -> None:
        """Counts what is new."""
        metrics = self._metrics
        for update in updates:
            count, before = len(update.token_ids), self._last.get(update.index)
            if count:
                if before is None:
                    if not self._last and request.first_token is not None:
                        metrics.first.observe(request.first_token - request.arrived)
                else:
                    for _ in range(count):
                        metrics.between.observe((when - before) / count)
                self._last[update.index] = when
                self._made[update.index] = self._made.get(update.index, 0) + count
            if update.finish_reason is not None:
                self._end(when, request, update)

    def _end(self, when: float, request: Request, update: Update) -> None:
        metrics, made = self._metrics, self._made.get(update.index, 0)
        metrics.ended[update.finish_reason or "abort"].inc()
        metrics.whole.observe(when - request.arrived)
        metrics.prompt_tokens.observe(self._prompt)
        metrics.generation_tokens.observe(made)
        if update.index == 0:
            metrics.n.observe(self._params.n)
            if self._params.max_tokens is not None:
                metrics.max_tokens.observe(self._params.max_tokens)
        if request.scheduled is not None:
            metrics.queue.observe(request.scheduled - request.arrived)
            metrics.inference.observe(when - request.scheduled)
            if request.first_token is not None:
                metrics.prefill.observe(request.first_token - request.scheduled)
        if request.first_token is not None:
            metrics.decode.observe(max(when - request.first_token, 0.0))
            if made > 1:
                metrics.each.observe(max(when - request.first_token, 0.0) / (made - 1))


class _OfEngine(Collector):
    """What the engine counts itself, read when it is asked for."""

    def __init__(self, engine: Engine, labels: tuple[str, str]) -> None:
        self._engine, self._of = engine, labels

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        stats = self._engine.stats()
        for name, said, value in (
            ("num_requests_running", "Completions that have a row.", stats.running),
            ("num_requests_waiting", "Completions that wait for one.", stats.waiting),
            ("kv_cache_usage_perc", "Share of the KV cache in use, 1 is all.", usage(stats)),
        ):
            yield self._filled(GaugeMetricFamily(f"vllm:{name}", said, labels=_LABELS), value)
        for name, said, value in (
            ("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found there.", stats.prefix_hits),
            ("num_preemptions", "Completions that lost their row for a time.", stats.preemptions),
            ("prompt_tokens", "Prompt tokens.", stats.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens that were cached.", stats.prefix_hits),
            ("generation_tokens", "Tokens made.", stats.generation_tokens),
        ):
            yield self._filled(CounterMetricFamily(f"vllm:{name}", said, labels=_LABELS), value)
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=(*_LABELS, "block_size", "num_gpu_blocks"))
        info.add_metric((*self._of, str(stats.page_size), str(stats.pages)), 1)
        yield info

    def _filled(self, family: Any, value: float) -> Metric:
        family.add_metric(self._of, value)
        return family


def usage(stats: Any) -> float:
    """The share of the cache that is in use."""
    return stats.pages_used / stats.pages if stats.pages else 0.0


def _one_two_five(most: int) -> list[float]:
    """1, 2, 5, 10, 20, 50 and on, up to `most`."""
    return [float(step * 10**power) for power in range(12) for step in (1, 2, 5) if step * 10**power <= most]
