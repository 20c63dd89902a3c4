"""What the sampler of a step must know, from what requests ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jaxtp.engine.params import SamplingParams
from jaxtp.ops.sampling import Features

RANDOM = Features(random=True)
EVERYTHING = Features(random=True, min_p=True, truncate=True, penalties=True, bias=True, min_tokens=True, logprobs=20)


def features(params: SamplingParams) -> Features:
    """What a request asks of the sampler."""
    hot = params.temperature > 0
    penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return Features(
        random=hot,
        min_p=hot and params.min_p > 0,
        truncate=hot and (params.top_k > 0 or params.top_p < 1),
        penalties=penalised,
        bias=bool(params.logit_bias),
        min_tokens=params.min_tokens > 0,
        logprobs=params.logprobs,
    )


def union(each: Sequence[Features]) -> Features:
    """What all of them ask for."""
    flags = ("random", "min_p", "truncate", "penalties", "bias", "min_tokens")
    logprobs = max((found.logprobs for found in each if found.logprobs is not None), default=None)
    return Features(**{flag: any(getattr(found, flag) for found in each) for flag in flags}, logprobs=logprobs)


def level(found: Features) -> Features:
    """The lesser of two that holds it: at a temperature, 0 included, or everything."""
    return RANDOM if union([RANDOM, found]) == RANDOM else union([EVERYTHING, found])


class Asked:
    """What all requests that have not ended ask of the sampler. The engine uses it with its lock held.

    levels: it comes in two levels, which can both be compiled before; else it is exactly what they ask, and never less than
    before until all rest.
    """

    def __init__(self) -> None:
        self.levels, self._counts, self._held = False, Counter[Features](), Features()

    def add(self, found: Features, count: int) -> None:
        """So many completions more ask for it."""
        self._counts[found] += count

    def drop(self, found: Features) -> None:
        """One that asked for it has ended."""
        self._counts[found] -= 1
        if not self._counts[found]:
            del self._counts[found]

    def wanted(self) -> Features:
        """What the next step must know."""
        if self.levels:
            return level(union(list(self._counts)))
        self._held = union([self._held, *self._counts])
        return self._held

    def rest(self) -> None:
        """Nothing runs: what comes next begins with the least."""
        self._held = Features()
