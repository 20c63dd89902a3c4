"""A corpus from files: the tokens of all documents, and which of them are learned."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jaxtp.log import console, interactive, logger
from jaxtp.train.records import Encoded, Encoder, Kind, TrainOn, texts
from jaxtp.train.sources import counted, document, expand, form_of, records, token_ids

Format = Literal["auto", "text", "tokens", "jsonl", "chat", "sharegpt", "prompt_completion", "alpaca"]
LONG = 4 << 20  # bytes of files from which on a bar is drawn
_OPEN = ("auto", "jsonl", "tokens")  # kinds of files that do not say what a record holds
_TOLD = 8  # files that the log tells of one by one


@dataclass(frozen=True)
class Corpus:
    """Documents one after another.

    tokens [N] int; bounds [docs + 1]: where each starts. learn [N] bool: which tokens count as labels, None for all.
    characters: of the text, 0 where it is not text alone. name: of its files, for messages.
    """

    tokens: np.ndarray
    bounds: np.ndarray
    learn: np.ndarray | None = None
    characters: int = 0
    name: str = "the data"

    def __len__(self) -> int:
        return len(self.tokens)

    def learned(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """How many tokens in each [start, stop) are labels that count: all but the first of a document, or those of `learn`."""
        firsts = np.unique(self.bounds)
        if self.learn is None:
            return stops - starts - (np.searchsorted(firsts, stops) - np.searchsorted(firsts, starts))
        labels = self.learn.copy()
        labels[firsts[:-1]] = False
        before = np.zeros(len(labels) + 1, np.uint32)
        np.cumsum(labels, dtype=np.uint32, out=before[1:])
        return before[stops] - before[starts]

    def split(self, share: float) -> tuple[Corpus, Corpus]:
        """The first documents, and the last ones with about `share` of the tokens; a single document is cut in two.

        Raises ValueError where a part has no tokens, or none that is learned.
        """
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
        parts = (
            Corpus(self.tokens[:cut], first, learn[0], letters, f"{self.name} (without the last {share:.0%})"),
            Corpus(self.tokens[cut:], last, learn[1], self.characters - letters, f"{self.name} (the last {share:.0%})"),
        )
        for part in parts:
            if not part.learned(part.bounds[:-1], part.bounds[1:]).any():
                raise ValueError(f"{part.name}: nothing in it is learned; give another validation_share, or data.validation")
        return parts


def read(
    paths: Sequence[str | Path],
    tokenizer: Any,
    *,
    kind: Format = "auto",
    key: str = "text",
    eos: int | None = None,
    train_on: TrainOn = "assistant",
) -> Corpus:
    """A corpus from files, patterns and folders (see `sources.expand`).

    .txt and .md: a file is a document. .jsonl, .json, .parquet: records of one kind, that of the file's first (see `records`),
    or `kind`; "jsonl" reads lines whatever a file's name, "text" learns files of other names as they stand. .npy: token ids;
    documents end at `eos`. train_on: what is learned of conversations, and of prompts with completions: what the assistant
    says, its last words alone, or all.

    Raises FileNotFoundError for missing files, and ValueError, which names the file and the line, for empty ones, for records
    that are not of the kind, and where nothing is learned.
    """
    files = expand(paths)
    if not files:
        raise ValueError("no file to read")
    sizes = [path.stat().st_size for path in files]
    columns = (TextColumn("reading {task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    disable = sum(sizes) < LONG or not interactive()
    encoder, done, parts, told = Encoder(tokenizer, key, eos, train_on), 0, [], []
    with Progress(*columns, disable=disable, transient=True, console=console) as bar:
        task = bar.add_task("", total=sum(sizes))
        for path, size in zip(files, sizes, strict=True):

            def seen(share: float, before: int = done, size: int = size) -> None:
                bar.update(task, completed=before + min(share, size))

            bar.update(task, description=path.name)
            part, what = _read(path, encoder, kind, seen)
            parts.append(part)
            told.append((path, *what))
            done += size
    _tell(told)
    return _joined(parts, ", ".join(map(str, paths)) if len(paths) < 4 else counted(len(files), "file"))


_What = tuple[int, str, str]  # what the log tells of a file: how many, of what, and more of them


def _read(path: Path, encoder: Encoder, asked: Format, seen: Callable[[float], None]) -> tuple[Corpus, _What]:
    """A file's documents. seen: told how many bytes are behind."""
    form, eos = form_of(path, asked), encoder.eos
    if form == "tokens":
        ids = token_ids(path)
        ends = np.zeros(0, int) if eos is None else np.flatnonzero(ids == eos) + 1
        return Corpus(ids, np.unique(np.concatenate([[0], ends, [len(ids)]]))), (len(ids), "token id", "")
    if encoder.tokenizer is None:
        raise ValueError(f"{path} is text: data.tokenizer must name a folder with a tokenizer")
    made = _Growing()
    if form == "text":
        made.add(encoder.text(document(path)))
        return made.corpus(path), (made.characters, "character", " of text")
    number, behind, kind = 0, 0.0, None if asked in _OPEN else cast(Kind, asked)
    for where, record, size in records(path, form):
        try:
            kind = kind or encoder.kind(record)
            missing = [key for key in encoder.keys(kind) if key not in record]
            if missing:
                why = f"data.kind={kind}" if asked not in _OPEN else "the file's first record is one of"
                raise ValueError(f'no "{missing[0]}" ({why}: {encoder.told(kind)}); its keys: {", ".join(record)}')
            made.add(encoder.encode(kind, record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        number, behind = number + 1, behind + size
        seen(behind)
    if kind is None or not number:
        raise ValueError(f"{path} is empty: it holds no record")
    corpus = made.corpus(path)
    if corpus.learn is not None and not corpus.learned(corpus.bounds[:-1], corpus.bounds[1:]).any():
        raise ValueError(
            f"{path}: nothing is learned of its {counted(number, 'record')}, {encoder.told(kind)}: with "
            f"data.train_on={encoder.train_on} only the assistant's answers are, and there are none"
        )
    return corpus, (number, "record", f", {encoder.told(kind)} ({'by the first record' if asked in _OPEN else 'data.kind'})")


class _Growing:
    """Documents while they are read: tokens grow in place, 4 bytes each."""

    def __init__(self) -> None:
        self._tokens, self._bounds, self._learn = array("i"), array("q", [0]), bytearray()
        self._masked, self.characters = False, 0

    def add(self, found: Encoded) -> None:
        """A document; one without tokens is none."""
        if not found.ids:
            return
        self._tokens.extend(found.ids)
        self._bounds.append(len(self._tokens))
        self.characters += found.characters
        if found.learn is not None:
            self._masked = True
            self._learn.extend(found.learn)

    def corpus(self, path: Path) -> Corpus:
        """All of them. Raises ValueError where there are none."""
        if not self._tokens:
            raise ValueError(f"{path} holds no text")
        learn = np.frombuffer(self._learn, bool) if self._masked else None
        return Corpus(np.frombuffer(self._tokens, np.int32), np.frombuffer(self._bounds, np.int64), learn, self.characters)


def _joined(parts: Sequence[Corpus], name: str) -> Corpus:
    if len(parts) == 1:
        return replace(parts[0], name=name)
    kinds = {part.tokens.dtype for part in parts}
    dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.int32)  # every id fits, see `token_ids`
    tokens = np.concatenate([part.tokens for part in parts], dtype=dtype, casting="unsafe")
    starts = np.cumsum([0, *(len(part) for part in parts)])
    bounds = np.concatenate([[0], *(part.bounds[1:] + start for part, start in zip(parts, starts, strict=False))])
    learn = None
    if any(part.learn is not None for part in parts):
        learn = np.concatenate([np.ones(len(part), bool) if part.learn is None else part.learn for part in parts])
    letters = [part.characters for part in parts]
    return Corpus(tokens, bounds, learn, sum(letters) if all(letters) else 0, name)


def _tell(told: Sequence[tuple[Path, int, str, str]]) -> None:
    """What was found, file by file, or by kind where they are many."""
    if len(told) <= _TOLD:
        for path, number, noun, more in told:
            logger.info("%s: %s%s", path, counted(number, noun), more)
        return
    found: Counter[tuple[str, str]] = Counter()
    for _, number, noun, more in told:
        found[noun, more] += number
    for (noun, more), number in found.items():
        files = sum((noun, more) == one[2:] for one in told)
        logger.info("%s: %s%s", counted(files, "file"), counted(number, noun), more)


def text_of(paths: Sequence[str | Path], *, kind: Format = "auto", key: str = "text") -> Iterator[str]:
    """The text that files hold, line by line or value by value, to learn a tokenizer from. Raises as `read`."""
    encoder = Encoder(None, key)
    for path in expand(paths):
        form = form_of(path, kind)
        if form == "tokens":
            raise ValueError(f"{path} holds token ids; a tokenizer is learned from text")
        if form == "text":
            yield from (line[0] for line in re.finditer(r"[^\n]*\n|[^\n]+", document(path)))
            continue
        for where, record, _ in records(path, form):
            try:
                named = encoder.kind(record) if kind in _OPEN else cast(Kind, kind)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            yield from texts(record, (*encoder.keys(named), "input", "system"))


def check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Raises ValueError where a token lies outside the model's vocabulary."""
    least, largest = int(corpus.tokens.min()), int(corpus.tokens.max())
    if least < 0 or largest >= vocab_size:
        wrong = least if least < 0 else largest
        raise ValueError(
            f"{corpus.name} holds token {wrong}, but the model's vocabulary has {vocab_size}; the tokenizer is not its own"
        )
