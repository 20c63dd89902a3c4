"""Shapes come in buckets, so that few programs serve every request.

A bucket is 1, 1.25, 1.5 or 1.75 times a power of two: at most a fifth of it is padding.
"""

from __future__ import annotations

MIN_TOKENS, MIN_SLOTS = 32, 128
MAX_NUM_SEQS, MAX_BATCHED_TOKENS = 256, 8192  # LLM's defaults: rows that run together, prompt tokens of a prefill call
LOGITS_TOKENS, MIN_LOGITS_TOKENS = 512, 32  # of a row in training, whose logits exist at a time; below, all of them do
BUSY_TOKENS = 512  # what a stage should have in one tick of prefill


def bucket(size: int, *, least: int) -> int:
    """The smallest bucket that holds `size`; `least` is a power of two, at least 4."""
    step = least
    while step * 2 <= size:
        step *= 2
    quarter = max(step // 4, least // 4)
    return max(least, -(-size // quarter) * quarter)


def rows(count: int, *, dp: int) -> int:
    """Rows of a batch: each of dp groups holds a power of two of them."""
    each = -(-count // dp)
    return dp * (1 << (each - 1).bit_length())


def slots(filled: int, total: int) -> int:
    """Slots of the cache for rows that hold `filled` tokens now and `total` at the end.

    Attention reads all slots, so a cache that would start mostly empty starts smaller and grows by doubling.
    """
    first, last = bucket(filled, least=MIN_SLOTS), bucket(total, least=MIN_SLOTS)
    return last if last <= 2 * first else 2 * first


def chunks(length: int, *, largest: int, alike: bool = False) -> list[tuple[int, int]]:
    """How a prompt of `length` tokens is prefilled: (start, tokens) of each chunk, the last one rounded up to a bucket.

    alike: all chunks have the same size, as those that go through stages together must.
    """
    if alike:
        count = -(-length // largest)
        size = min(largest, bucket(-(-length // count), least=MIN_TOKENS))
        return [(i * size, size) for i in range(count)]
    found, start = [], 0
    while start < length:
        size = min(largest, bucket(length - start, least=MIN_TOKENS))
        found.append((start, size))
        start += size
    return found


def logits_chunk(length: int, *, most: int = LOGITS_TOKENS) -> int:
    """Tokens of a row in training whose logits exist at a time: a divisor of the row's `length`, or all where that is tiny."""
    size = next(size for size in range(min(most, length), 0, -1) if length % size == 0)
    return size if size >= MIN_LOGITS_TOKENS else length


def filling(longest: int, ranks: int, groups: int, rows: int) -> int:
    """Prompt tokens of a row in one chunk, so that chunks fill a pipeline: its ranks idle for about a fifth of the time, as far
    as chunks keep enough tokens for a GPU to be busy. rows: of a group, on one device.
    """
    chunks = -(-4 * (ranks - 1) // groups)
    return bucket(max(-(-longest // chunks), -(-BUSY_TOKENS // rows)), least=MIN_TOKENS)


def chunk_size(rows: int, chunk_tokens: int) -> int:
    """Prompt tokens of each row in one prefill call: a power of two, so that all chunks but the last are alike."""
    each = max(chunk_tokens // rows, MIN_TOKENS)
    return 1 << (each.bit_length() - 1)
