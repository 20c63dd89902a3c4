"""Shapes come in buckets, so that few programs serve every request; and how large a step of generation is.

A bucket is 1, 1.25, 1.5 or 1.75 times a power of two: at most a fifth of it is padding.
"""

from __future__ import annotations

MAX_NUM_SEQS = 256  # LLM's default: rows that run together
LOGITS_TOKENS, MIN_LOGITS_TOKENS = 512, 32  # of a row in training, whose logits exist at a time; below, all of them do
PAGE = 64  # slots of a page of the cache
MIN_REACH = 512  # slots that are gathered for a chunk of a prompt, at least
CHUNK = {"cpu": 32, "gpu": 128}  # tokens of a chunk of a prompt
TOKENS = {"cpu": 512, "gpu": 2048}  # of a step, beyond which it takes longer
ONE_KERNEL_BYTES = 4 << 20  # the largest all-reduce that XLA:GPU does in a kernel of its own; beyond it calls NCCL


def bucket(size: int, *, least: int) -> int:
    """The smallest bucket that holds `size`; `least` is a power of two, at least 4."""
    step = least
    while step * 2 <= size:
        step *= 2
    quarter = max(step // 4, least // 4)
    return max(least, -(-size // quarter) * quarter)


def power(n: int) -> int:
    """The least power of two that is at least n; 0 for none."""
    return 1 << (n - 1).bit_length() if n else 0


def lanes(chunks: int) -> int:
    """Lanes for so many chunks of prompts: a power of two, and beyond 8 what is halfway as well, for a step of prompts takes as
    long as it has tokens.
    """
    up = power(chunks)
    return 3 * up // 4 if 8 < chunks <= 3 * up // 4 else up


def reach(end: int, most: int) -> int:
    """Of rows that are read up to slot `end`, the bucket; most: slots of a row."""
    return min(most, bucket(end, least=MIN_REACH))


def chunk_reach(end: int, most: int) -> int:
    """The same where chunks of prompts go along: such a step is a matter of products, and needs no close bound."""
    return min(most, max(MIN_REACH, power(end)))


def step_tokens(platform: str, *, token_bytes: int, shared: bool) -> int:
    """Tokens of a group in one step: on GPUs that share layers so many that what they send each other stays one kernel.

    token_bytes: of the residual stream.
    """
    if platform == "gpu" and shared:
        return ONE_KERNEL_BYTES // token_bytes
    return TOKENS.get(platform, TOKENS["gpu"])


def chunk_tokens(platform: str) -> int:
    """Tokens of a chunk of a prompt."""
    return CHUNK.get(platform, CHUNK["gpu"])


def chunk_lanes(tokens: int, *, rows: int, chunk: int) -> int:
    """Chunks that may go along with so many rows, so that a step keeps within `tokens`; one always does."""
    return max(1, (tokens - rows) // chunk)


def logits_chunk(length: int, *, most: int = LOGITS_TOKENS) -> int:
    """Tokens of a row in training whose logits exist at a time: a divisor of the row's `length`, or all where that is tiny."""
    size = next(size for size in range(min(most, length), 0, -1) if length % size == 0)
    return size if size >= MIN_LOGITS_TOKENS else length
