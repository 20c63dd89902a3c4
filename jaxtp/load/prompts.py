"""Prompts whose length is known: lists of token ids, text made by a tokenizer, or the conversations of a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxtp import files
from jaxtp.text import Tokenizer

RESERVED = 3  # the first ids, where most vocabularies have their special tokens
TRIES, ROUNDS = 8, 32  # texts that are begun, and changes to each, to reach a length
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Prompt:
    """What is sent: text, or token ids. tokens: how many the model will see, None where only the server knows."""

    content: str | list[int]
    tokens: int | None
    output_tokens: int


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, each as likely as the others: from `least` to `most` (default: always `least`)."""

    least: int
    most: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.top:
            raise ValueError(f"{self.least}:{self.top} is no range of tokens; such as 128, or 64:256")

    @classmethod
    def read(cls, text: str, flag: str) -> Lengths:
        """128, or 64:256. Raises ValueError, which names the flag, for anything else."""
        try:
            return cls(*map(int, text.split(":", 1)))
        except ValueError:
            raise ValueError(f"{flag} {text} is no number of tokens (128) and no range of them (64:256)") from None

    @property
    def top(self) -> int:
        """The longest."""
        return self.least if self.most is None else self.most

    def draw(self, rng: np.random.Generator) -> int:
        """One of them."""
        return int(rng.integers(self.least, self.top, endpoint=True))

    def __str__(self) -> str:
        return str(self.least) if self.top == self.least else f"{self.least}:{self.top}"


class Source(Protocol):
    """Where prompts come from. The same numbers of the generator give the same prompts."""

    def draw(self, rng: np.random.Generator, count: int) -> list[Prompt]:
        """So many prompts."""


@dataclass(frozen=True)
class TokenPrompts:
    """Random token ids, the same number for any tokenizer. below: the ids are less than that."""

    prompt: Lengths
    output: Lengths
    below: int = 256

    def __post_init__(self) -> None:
        if self.below <= RESERVED:
            raise ValueError(f"ids below {self.below}: ids are drawn from {RESERVED} on, so that it must be more than that")

    def draw(self, rng: np.random.Generator, count: int) -> list[Prompt]:
        """So many prompts."""
        lengths = [(self.prompt.draw(rng), self.output.draw(rng)) for _ in range(count)]
        return [Prompt(rng.integers(RESERVED, self.below, n).tolist(), n, new) for n, new in lengths]


@dataclass(frozen=True)
class TextPrompts:
    """Text that the tokenizer makes so many tokens of, its own beginning-of-sequence token included; chat: of one message of a
    user, with what the chat template puts around it.
    """

    tokenizer: Tokenizer
    prompt: Lengths
    output: Lengths
    chat: bool = False

    def draw(self, rng: np.random.Generator, count: int) -> list[Prompt]:
        """So many prompts. Raises ValueError where the tokenizer makes no text of a length."""
        lengths = [(self.prompt.draw(rng), self.output.draw(rng)) for _ in range(count)]
        return [Prompt(self._text(rng, n), n, new) for n, new in lengths]

    def count(self, text: str) -> int:
        """Tokens of the prompt that the text becomes."""
        if not self.chat:
            return len(self.tokenizer.encode(text))
        whole = self.tokenizer.chat([{"role": "user", "content": text}])
        return len(self.tokenizer.encode(whole, add_special_tokens=False))

    def _text(self, rng: np.random.Generator, length: int) -> str:
        """Random tokens as text, of which the tokenizer makes others: these are cut or lengthened until their text is right."""
        for _ in range(TRIES):
            ids: list[int] = []
            missing = length
            for _ in range(ROUNDS):
                more = rng.integers(0, self.tokenizer.size, max(missing, 1)).tolist()
                ids = ids[:missing] if missing < 0 else ids + more
                text = "".join(filter(str.isprintable, self.tokenizer.decode(ids))).replace("\ufffd", "").strip()
                missing = length - self.count(text)
                if not missing and text:
                    return text
                ids = self.tokenizer.encode(text, add_special_tokens=False)
        raise ValueError(
            f"found no text of exactly {length} tokens: {self.tokenizer.folder} makes {self.count('a')} of one letter"
        )


class Dataset:
    """First messages of the conversations in a JSON file like ShareGPT's, none twice; outputs as long as the answers there.

    The file holds a list of {"conversations": [{"from": "human", "value": ...}, ...]} or of {"messages": [{"role": "user",
    "content": ...}, ...]}. Those without a message of a user and an answer are left out. Raises ValueError for any other file.
    """

    def __init__(self, path: Path, *, output: Lengths | None, tokenizer: Tokenizer | None = None, chat: bool = False) -> None:
        self.path, self.output = path, output
        self._count: Callable[[str], int] | None = None
        if tokenizer is not None:
            self._count = TextPrompts(tokenizer, Lengths(1), Lengths(1), chat).count
            self._answer = lambda text: max(len(tokenizer.encode(text, add_special_tokens=False)), 1)
        elif output is None:
            raise ValueError(f"{path}: how long are the outputs? --output-tokens says so, or --tokenizer counts the answers'")
        records = files.read_json(path)
        if not isinstance(records, list):
            raise ValueError(f"{path} holds no list of conversations")
        turns = [_first_turns(record, f"{path}, record {i}") for i, record in enumerate(records, 1)]
        self._turns = [turn for turn in turns if turn]
        if not self._turns:
            raise ValueError(f"{path}: none of its {len(records)} records begins with a user's message and an answer to it")

    def draw(self, rng: np.random.Generator, count: int) -> list[Prompt]:
        """So many prompts. Raises ValueError where the file has fewer."""
        if count > len(self._turns):
            raise ValueError(f"{self.path} has {len(self._turns)} conversations, and {count} are asked for, warm-up included")
        found = []
        for i in rng.permutation(len(self._turns))[:count]:
            asked, answered = self._turns[i]
            new = self.output.draw(rng) if self.output else self._answer(answered)
            found.append(Prompt(asked, self._count(asked) if self._count else None, new))
        return found


def _first_turns(record: Any, where: str) -> tuple[str, str] | None:
    """The first message and its answer; None where it does not begin so."""
    turns = record.get("conversations", record.get("messages")) if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f'{where} is no conversation: it has no list of "conversations" or "messages"')
    said = [(ROLES.get(str(turn.get("from", turn.get("role")))), turn.get("value", turn.get("content"))) for turn in turns]
    if said and said[0][0] is None:
        said = said[1:]  # a system prompt
    match said[:2]:
        case [("user", str(asked)), ("assistant", str(answered))] if asked:
            return asked, answered
    return None
