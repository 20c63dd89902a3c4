"""What an engine tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """running, waiting: completions with and without a row. pages, pages_used: of the cache, of page_size tokens.

    Since the start: prefix_queries, prefix_hits: tokens of prompts looked for in the prefix cache, and found; preemptions;
    prompt_tokens, generation_tokens; steps.
    """

    running: int
    waiting: int
    pages: int
    pages_used: int
    page_size: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    steps: int


@dataclass(frozen=True)
class Landing:
    """Of a step whose tokens came back: tokens of prompts that went along, tokens made, steps, and slots of the cache that it
    read, of all rows in all of its steps.
    """

    prompt_tokens: int
    tokens: int
    steps: int
    slots: int
