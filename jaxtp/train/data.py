"""Rows of tokens from files: text, JSONL, token arrays, conversations.

Everything is addressed by one global sample index, so the state of the data is (seed, step): a run that goes on with
another number of devices or hosts sees the same samples, and each process makes only its own rows. Shuffling, repetition
and reading ahead are grain's.

    corpus   tokens of all documents in one array, with the documents' bounds
    windows  the samples of T tokens: a running text cut up, or whole documents packed side by side
    batches  of B samples for each step, on the mesh
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtp.log import logger
from jaxtp.train.loss import Batch

Format = Literal["auto", "text", "jsonl", "tokens", "chat"]


@dataclass(frozen=True)
class Corpus:
    """Documents one after another.

    tokens [N] int; bounds [docs + 1]: where each starts. learn [N] bool: which tokens count as labels, None for all.
    characters: of the text, 0 where there is none.
    """

    tokens: np.ndarray
    bounds: np.ndarray
    learn: np.ndarray | None = None
    characters: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, share: float) -> tuple[Corpus, Corpus]:
        """The first documents, and the last ones with about `share` of the tokens; a single document is cut in two."""
        cut = round(len(self) * (1 - share))
        if len(self.bounds) > 2:
            cut = int(self.bounds[np.searchsorted(self.bounds, cut)])
        if not 0 < cut < len(self):
            raise ValueError(f"{len(self)} tokens in {len(self.bounds) - 1} documents leave no {share:.0%} for validation")
        inner = self.bounds[(self.bounds > 0) & (self.bounds < len(self))]
        first = np.concatenate([[0], inner[inner < cut], [cut]])
        last = np.concatenate([[cut], inner[inner > cut], [len(self)]]) - cut
        learn = (None, None) if self.learn is None else (self.learn[:cut], self.learn[cut:])
        letters = self.characters * cut // len(self)
        return (
            Corpus(self.tokens[:cut], first, learn[0], letters),
            Corpus(self.tokens[cut:], last, learn[1], self.characters - letters),
        )


class Windows:
    """Samples of `length` tokens, found by index: what a packed row holds.

    Running text (`pack=False`): sample i is tokens [i·T, i·T + T], the last one a label only. Documents (`pack=True`): each
    is cut to T, and rows are filled best-fit; no document is spread over rows.
    """

    def __init__(self, corpus: Corpus, length: int, *, pack: bool) -> None:
        """Raises ValueError where there are too few tokens for a single sample."""
        self.corpus, self.length, self.pack = corpus, length, pack
        if pack:
            sizes = np.minimum(np.diff(corpus.bounds), length + 1)
            cut = int((np.diff(corpus.bounds) > length + 1).sum())
            if cut:
                logger.warning("%d of %d documents have more than %d tokens and are cut", cut, len(sizes), length + 1)
            self._rows = best_fit(sizes - 1, length)
        self.count = len(self._rows) if pack else (len(corpus) - 1) // length
        if self.count == 0:
            raise ValueError(f"{len(corpus)} tokens give no sample of sequence_length={length}; give more text, or less length")

    def __len__(self) -> int:
        return self.count

    def sample(self, i: int, *, shift: int = 0) -> dict[str, np.ndarray]:
        """The row: tokens, labels, positions, segment_ids [T] int32 and weights [T] float32. `shift` moves running text."""
        corpus, T = self.corpus, self.length
        bounds = corpus.bounds
        if self.pack:
            spans = [(bounds[d], min(bounds[d + 1], bounds[d] + T + 1)) for d in self._rows[i]]
        else:
            start = min(i * T + shift, len(corpus) - T - 1)
            end = start + T + 1
            inner = bounds[np.searchsorted(bounds, start, "right") : np.searchsorted(bounds, end, "left")]
            marks = [start, *inner.tolist(), end]
            spans = list(itertools.pairwise(marks))
        row = {name: np.zeros(T, np.int32) for name in ("tokens", "labels", "positions", "segment_ids")}
        row["weights"] = np.zeros(T, np.float32)
        at = 0
        for segment, (first, last) in enumerate(spans, 1):
            # a document's last token is a label of the one before it, and predicts nothing itself
            n = min(last - first - 1, T - at) if self.pack else min(last - first, T - at)
            into = slice(at, at + n)
            row["tokens"][into] = corpus.tokens[first : first + n]
            known = min(n, last - first - 1)  # labels that lie in the same document
            row["labels"][at : at + known] = corpus.tokens[first + 1 : first + 1 + known]
            learn = 1 if corpus.learn is None else corpus.learn[first + 1 : first + 1 + known]
            row["weights"][at : at + known] = learn
            row["positions"][into] = np.arange(n)
            row["segment_ids"][into] = segment
            at += n
        return row


def best_fit(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Indices of `sizes` (each at most `room`) in rows that hold at most `room`: largest first, where they fit tightest."""
    order = [int(i) for i in np.argsort(-sizes, kind="stable") if sizes[i] > 0]
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows
    for i in order:
        size = int(sizes[i])
        left = next((n for n in range(size, room) if open_rows.get(n)), None)
        if left is None:
            rows.append([i])
            open_rows.setdefault(room - size, []).append(len(rows) - 1)
        else:
            row = open_rows[left].pop()
            rows[row].append(i)
            open_rows.setdefault(left - size, []).append(row)
    return rows


@dataclass(frozen=True)
class Batches:
    """The batches of a run: step s holds the samples s·B … s·B + B - 1 of the endless shuffled order.

    sharding: of arrays [A, B/A, T], A microbatches. segments: whether rows hold several documents.
    """

    windows: Windows
    batch_size: int
    accumulate: int
    seed: int
    sharding: NamedSharding
    segments: bool

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches from `step` on, without end. Each process reads the rows that its devices hold, and no others."""
        windows, B = self.windows, self.batch_size
        order = grain.MapDataset.range(len(windows)).seed(self.seed).shuffle().repeat()
        each = np.arange(B).reshape(self.shape[:2])
        places = self.sharding.addressable_devices_indices_map(self.shape).values()
        mine = sorted({int(row) for index in places for row in each[index[:2]].ravel()})  # type: ignore[index]

        def samples(step: int) -> dict[int, dict[str, np.ndarray]]:
            numbers = {row: step * B + row for row in mine}
            return {row: windows.sample(order[n], shift=self._shift(n // len(windows))) for row, n in numbers.items()}

        steps = grain.MapDataset.range(2**40).slice(slice(step, None)).map(samples)
        for rows in steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)):
            yield self._batch(rows)

    def once(self) -> Iterator[Batch]:
        """Every sample once, in order; the last batch is filled with rows that do not count."""
        blank = {name: np.zeros_like(value) for name, value in self.windows.sample(0).items()}
        for start in range(0, len(self.windows), self.batch_size):
            numbers = range(start, start + self.batch_size)
            yield self._batch({i - start: self.windows.sample(i) if i < len(self.windows) else blank for i in numbers})

    @property
    def shape(self) -> tuple[int, int, int]:
        """[A, B/A, T]."""
        return (self.accumulate, self.batch_size // self.accumulate, self.windows.length)

    def _shift(self, epoch: int) -> int:
        """Each time through, running text is cut up elsewhere."""
        return int(np.random.default_rng((self.seed, epoch)).integers(self.windows.length)) if epoch else 0

    def _batch(self, samples: dict[int, dict[str, np.ndarray]]) -> Batch:
        shape = self.shape
        each = np.arange(self.batch_size).reshape(shape[:2])

        def array(name: str) -> jax.Array:
            def block(index: Any) -> np.ndarray:
                rows = each[index[0], index[1]]
                return np.stack([samples[int(row)][name] for row in rows.ravel()]).reshape(*rows.shape, -1)[..., index[2]]

            return jax.make_array_from_callback(shape, self.sharding, block)

        names = ("tokens", "labels", "weights", "positions", *(("segment_ids",) if self.segments else ()))
        return Batch(**{name: array(name) for name in names})


# -- reading files -----------------------------------------------------------------------------------------------------


def read(
    paths: Sequence[str | Path], tokenizer: Any, *, kind: Format = "auto", key: str = "text", eos: int | None = None
) -> Corpus:
    """A corpus from files.

    text: a file is a document. jsonl: each line an object with text under `key`, or a conversation under "messages". tokens:
    .npy arrays of ids; documents end at `eos`. chat: as jsonl, with "messages" in each line. "auto" goes by the names.
    Conversations go through the tokenizer's chat template, and only what the assistant says is learned.
    Raises FileNotFoundError for missing files, and ValueError for empty ones and for lines that hold neither.
    """
    parts = [part for path in paths for part in _documents(Path(path), tokenizer, kind, key, eos)]
    sizes = [len(tokens) for tokens, _, _ in parts]
    if sum(sizes) == 0:
        raise ValueError(f"no text in {', '.join(map(str, paths))}")
    learn = None
    if any(mask is not None for _, mask, _ in parts):
        learn = np.concatenate([np.ones(len(t), bool) if mask is None else mask for t, mask, _ in parts])
    tokens = parts[0][0] if len(parts) == 1 else np.concatenate([tokens for tokens, _, _ in parts])
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    if eos is not None and all(str(path).endswith(".npy") for path in paths):
        ends = np.flatnonzero(tokens == eos) + 1
        bounds = np.unique(np.concatenate([bounds, ends]))
    return Corpus(tokens, bounds, learn, sum(letters for _, _, letters in parts))


Document = tuple[np.ndarray, np.ndarray | None, int]  # tokens, which of them count, characters


def _documents(path: Path, tokenizer: Any, kind: Format, key: str, eos: int | None) -> Iterator[Document]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if kind == "auto":
        kind = {".npy": "tokens", ".jsonl": "jsonl"}.get(path.suffix, "text")  # type: ignore[assignment]
    if kind == "tokens":
        array = np.load(path, mmap_mode="r")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}; token arrays are 1-D and of ints")
        yield array, None, 0
        return
    if tokenizer is None:
        raise ValueError(f"{path} is text: data.tokenizer must name a folder with a tokenizer")
    text = path.read_text()
    if kind == "text":
        yield _encode(tokenizer, text, eos), None, len(text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            assert isinstance(record, dict)
        except (json.JSONDecodeError, AssertionError) as error:
            raise ValueError(f"{path}:{number} is not a JSON object") from error
        if "messages" in record:
            ids, learn = tokenizer.conversation(record["messages"])
            yield np.asarray(ids, np.int32), np.asarray(learn, bool), 0
        elif kind == "jsonl" and isinstance(record.get(key), str):
            yield _encode(tokenizer, record[key], eos), None, len(record[key])
        else:
            wanted = '"messages"' if kind == "chat" else f'"{key}" or "messages"'
            raise ValueError(f"{path}:{number} has no {wanted}; its keys: {', '.join(record)}")


def _encode(tokenizer: Any, text: str, eos: int | None) -> np.ndarray:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return np.asarray([*ids, eos] if eos is not None else ids, np.int32)


def check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Raises ValueError where a token lies outside the model's vocabulary."""
    least, largest = int(corpus.tokens.min()), int(corpus.tokens.max())
    if least < 0 or largest >= vocab_size:
        wrong = least if least < 0 else largest
        raise ValueError(
            f"the data holds token {wrong}, but the model's vocabulary has {vocab_size}; the tokenizer is not its own"
        )
