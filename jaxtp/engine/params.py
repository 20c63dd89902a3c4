"""SamplingParams, named and checked as in vLLM."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from jaxtp.checks import flags, seed, whole

MOST = 16384  # completions of a prompt
LEAST_REAL, MOST_REAL = 1.2e-38, 3.4e38  # of float32, which devices have them in


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends.

    n: completions a prompt, at most 16384 (vLLM's bound). temperature: 0 (as in vLLM anything below 1e-5) is greedy. top_k: 0
    or -1 is off. top_p in (0, 1], min_p in [0, 1].
    repetition_penalty > 0 (1 is off), presence_penalty and frequency_penalty in [-2, 2] (0 is off).
    logit_bias: token id -> added to its logit, in [-100, 100]. seed: None takes the next of the LLM's own.
    max_tokens: None generates up to `max_model_len`. min_tokens: no end before that many. stop: strings that end the
    text (not part of it unless include_stop_str_in_output). stop_token_ids: ids that end it, beside the model's own
    end-of-sequence ids (unless ignore_eos). logprobs: how many alternatives to report at each token, besides the one taken.

    Raises ValueError or TypeError for values outside these ranges.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias or {}))
        object.__setattr__(self, "stop_token_ids", _ids(self.stop_token_ids or ()))
        _check_types(self)
        whole("n", self.n, least=1, most=MOST)
        if 0 < self.temperature < 1e-5:
            object.__setattr__(self, "temperature", 0.0)
        _check(
            "temperature",
            self.temperature,
            0 <= self.temperature <= MOST_REAL,
            "at least 0 (0 is greedy) and finite in float32",
        )
        _check("top_p", self.top_p, LEAST_REAL <= self.top_p <= 1, "in (0, 1]")
        _check("top_k", self.top_k, self.top_k >= -1, "at least 1, or 0 or -1 for all tokens")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            LEAST_REAL <= self.repetition_penalty <= MOST_REAL,
            "above 0 (1 is off) and finite, in float32",
        )
        _check("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "in [-2, 2]")
        _check("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "in [-2, 2]")
        _check("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1 or None")
        limit = math.inf if self.max_tokens is None else self.max_tokens
        _check("min_tokens", self.min_tokens, 0 <= self.min_tokens <= limit, f"in [0, max_tokens={self.max_tokens}]")
        _check("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 64, "in [0, 64] or None")
        for token, bias in self.logit_bias.items():
            _check(f"logit_bias[{token}]", bias, -100 <= bias <= 100, "in [-100, 100]")
        if self.seed is not None:
            seed("seed", self.seed)


def _biases(given: Any) -> dict[int, float]:
    """logit_bias; its keys may be text, as JSON has them."""
    try:
        return {int(k) if isinstance(k, str) else operator.index(k): float(v) for k, v in given.items()}
    except (TypeError, ValueError, AttributeError):
        raise TypeError(f"logit_bias={given!r} must map token ids to numbers") from None


def _ids(given: Any) -> list[int]:
    """stop_token_ids."""
    ids: list[Any] = list(given) if isinstance(given, Iterable) else [None]
    if not all(isinstance(token, Integral) and not isinstance(token, bool) for token in ids):
        raise TypeError(f"stop_token_ids={given!r} must be a list of ints")
    return ids


def _strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    given = (stop,) if isinstance(stop, str) else stop or ()
    if not isinstance(given, list | tuple) or not all(isinstance(s, str) for s in given):
        raise TypeError(f"stop={stop!r} must be a string or a list of strings")
    if "" in given:
        raise ValueError("stop holds an empty string, which every text contains")
    return tuple(given)


_INTS, _OPTIONAL_INTS = ("n", "top_k", "min_tokens"), ("seed", "max_tokens", "logprobs")
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def _check_types(params: SamplingParams) -> None:
    for names, kind, said in (
        (_INTS, Integral, "an int"),
        (_OPTIONAL_INTS, Integral, "an int or None"),
        (_NUMBERS, Real, "a number"),
    ):
        for name in names:
            value = getattr(params, name)
            if (not isinstance(value, kind) or isinstance(value, bool)) and not (value is None and names is _OPTIONAL_INTS):
                raise TypeError(f"{name}={value!r} must be {said}")
    flags(**{name: getattr(params, name) for name in _FLAGS})


def _check(name: str, value: object, legal: bool, rule: str) -> None:
    if not legal:
        raise ValueError(f"{name}={value} must be {rule}")
