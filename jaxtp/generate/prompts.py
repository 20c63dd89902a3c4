"""Prompts as users write them: texts, token ids, and vLLM's dicts."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Prompt = str | Sequence[int] | Mapping[str, Any]


def listed(prompts: Prompt | Sequence[Prompt]) -> list[str | Sequence[int]]:
    """One prompt or several, as a list of texts and lists of ids: a list of ints is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [_bare(prompts)]
    if len(prompts) == 0:
        raise ValueError("the batch is empty: give at least one prompt")
    if not isinstance(prompts[0], str | Mapping) and np.ndim(prompts[0]) == 0:  # type: ignore[arg-type,index]
        return [prompts]  # type: ignore[list-item]
    return [_bare(prompt) for prompt in prompts]  # type: ignore[arg-type]


def _bare(prompt: Prompt) -> str | Sequence[int]:
    """A prompt as vLLM's dicts hold it: {"prompt": text} or {"prompt_token_ids": ids}."""
    if not isinstance(prompt, Mapping):
        return prompt
    for key, kind in (("prompt", str), ("prompt_token_ids", Sequence)):
        if isinstance(prompt.get(key), kind):
            return prompt[key]
    raise TypeError(f'a prompt is a text, token ids, or a dict with "prompt" or "prompt_token_ids"; given: {prompt!r}')


def token_id(token: Any) -> int:
    """An int of any kind, NumPy's too. Raises TypeError for anything else."""
    try:
        return operator.index(token)
    except TypeError:
        raise TypeError(f"token ids are ints; given: {token!r}") from None
