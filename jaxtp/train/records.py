"""Records of fine-tuning data in the forms that people have: their token ids, and which of them are learned.

chat               {"messages": [{"role": "user", "content": ...}, ...]}, as OpenAI and TRL have them
sharegpt           {"conversations": [{"from": "human", "value": ...}, ...]}
prompt_completion  {"prompt": ..., "completion": ...}, both text, or both lists of messages
alpaca             {"instruction": ..., "input": ..., "output": ...}
text               {"text": ...}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxtp.files import parsed

Kind = Literal["chat", "sharegpt", "prompt_completion", "alpaca", "text"]
TrainOn = Literal["assistant", "all", "last"]

KEYS: dict[Kind, tuple[str, ...]] = {  # what tells them apart, in the order in which it is looked for; text has its own key
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

# the text of Stanford's Alpaca, for tokenizers without a chat template
_ALONE = "Below is an instruction that describes a task. "
_PAIRED = "Below is an instruction that describes a task, paired with an input that provides further context. "
_ASK = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


class Encoded(NamedTuple):
    """A document. learn: which tokens count as labels, None for all; characters: of its text, 0 where that is not all of it."""

    ids: list[int]
    learn: list[bool] | None
    characters: int


@dataclass(frozen=True)
class Encoder:
    """From records to tokens. key: of a record's text; eos: ends texts and completions that no chat template ends."""

    tokenizer: Any
    key: str = "text"
    eos: int | None = None
    train_on: TrainOn = "assistant"

    def keys(self, kind: Kind) -> tuple[str, ...]:
        """What a record of this kind must have."""
        return KEYS.get(kind, (self.key,))

    def kind(self, record: dict[str, Any]) -> Kind:
        """What a record holds. Raises ValueError where that is nothing known."""
        kinds: tuple[Kind, ...] = (*KEYS, "text")
        for kind in kinds:
            if all(key in record for key in self.keys(kind)):
                return kind
        known = ", ".join(" + ".join(f'"{key}"' for key in self.keys(kind)) for kind in ("text", *KEYS))
        raise ValueError(f"a record with none of {known}; its keys: {', '.join(record)}")

    def told(self, kind: Kind) -> str:
        """What records of this kind are called, and how they are written where that depends on the tokenizer."""
        if kind == "alpaca":
            return f"Alpaca instructions, {'by the chat template' if self.tokenizer.templates else 'as the text of Alpaca'}"
        return {
            "chat": "conversations (messages)",
            "sharegpt": "ShareGPT conversations",
            "prompt_completion": "prompts with completions",
            "text": "texts",
        }[kind]

    def encode(self, kind: Kind, record: dict[str, Any]) -> Encoded:
        """A record of this kind, which has its keys. Raises ValueError for values that it cannot have."""
        if kind == "text":
            return self.text(_string(record, self.key))
        if kind == "alpaca":
            return self._alpaca(record)
        if kind == "prompt_completion":
            prompt, completion = record["prompt"], record["completion"]
            if isinstance(prompt, str) and isinstance(completion, str):
                return self._completed(prompt, completion)
            if not (isinstance(prompt, list) and isinstance(completion, list)):
                raise ValueError('"prompt" and "completion" are neither both text nor both lists of messages')
            return self._conversation([*turns(record, "prompt"), *turns(record, "completion")], record, given=len(prompt))
        messages = turns(record, KEYS[kind][0])
        if isinstance(record.get("system"), str) and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": record["system"]})
        return self._conversation(messages, record)

    def text(self, text: str) -> Encoded:
        """A text, all of which is learned."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return Encoded([*ids, self.eos] if self.eos is not None else ids, None, len(text))

    def _completed(self, prompt: str, completion: str) -> Encoded:
        """A prompt as `generate` would be given it, then what it should say. What a token shares with both is learned."""
        ids = self.tokenizer.encode(prompt + completion)
        if self.eos is not None and ids[-1:] != [self.eos]:
            ids = [*ids, self.eos]
        given = 0 if self.train_on == "all" else _shared(self.tokenizer.encode(prompt), ids)
        return Encoded(ids, [False] * given + [True] * (len(ids) - given), 0)

    def _conversation(self, messages: list[dict[str, Any]], record: dict[str, Any], *, given: int = 0) -> Encoded:
        """given: so many messages are the prompt, of which nothing is learned."""
        tools = record.get("tools") or None
        if isinstance(tools, str):  # as many data sets keep them
            tools = parsed(tools, '"tools"')
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise ValueError('"tools" is no list of JSON schemas')
        ids, learn = self.tokenizer.conversation(messages, train_on=self.train_on, tools=tools)
        if self.train_on != "all" and any(turn["role"] == "assistant" for turn in messages[:given]):
            before = _shared(self.tokenizer.conversation(messages[:given], tools=tools)[0], ids)
            learn = [False] * before + list(learn[before:])
        return Encoded(ids, learn, 0)

    def _alpaca(self, record: dict[str, Any]) -> Encoded:
        asked, answer = _string(record, "instruction"), _string(record, "output")
        more, system = (_string(record, key) if record.get(key) else "" for key in ("input", "system"))
        history = record.get("history") or []
        if self.tokenizer.templates:
            pairs = history if isinstance(history, list) else [history]
            if not all(isinstance(pair, list) and len(pair) == 2 and {*map(type, pair)} == {str} for pair in pairs):
                raise ValueError('"history" is no list of [question, answer]')
            said = [text for pair in pairs for text in pair] + [f"{asked}\n{more}" if more else asked, answer]
            told = [{"role": "system", "content": system}] if system else []
            roles = itertools.cycle(("user", "assistant"))
            return self._conversation([*told, *({"role": next(roles), "content": text} for text in said)], record)
        if system or history:
            raise ValueError('"system" and "history" can be written only by a tokenizer with a chat template')
        given = f"\n\n### Input:\n{more}" if more else ""
        return self._completed(f"{_PAIRED if more else _ALONE}{_ASK}{asked}{given}\n\n### Response:\n", answer)


def turns(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The messages under `key`, each with role and content, whether they were written so or as from and value.

    Raises ValueError for anything that is no conversation.
    """
    value = record[key]
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{key}" is no list of messages')
    found = []
    for number, turn in enumerate(value, 1):
        where = f'"{key}": message {number}'
        if not isinstance(turn, dict):
            raise ValueError(f"{where} is no object")
        if isinstance(turn.get("from"), str) and "value" in turn:
            role = ROLES.get(turn["from"].lower())
            if role is None:
                raise ValueError(f'{where} is from "{turn["from"]}"; known are {", ".join(ROLES)}')
            turn = {"role": role, "content": turn["value"]}
        content = turn.get("content")
        if not isinstance(turn.get("role"), str) or not (isinstance(content, str | list) or turn.get("tool_calls")):
            raise ValueError(f'{where} has no "role" and "content" (or "from" and "value"); its keys: {", ".join(turn)}')
        found.append({name: inner for name, inner in turn.items() if inner is not None or name == "content"})
    return found


def texts(record: dict[str, Any], keys: Sequence[str]) -> Iterator[str]:
    """The text under these keys, in messages and their parts as well: what a tokenizer can be learned from."""
    for key in keys:
        value = record.get(key)
        if isinstance(value, str):
            yield value
        for inner in value if isinstance(value, list) else ():
            yield from [inner] if isinstance(inner, str) else texts(inner, ("content", "value", "text"))


def _string(record: dict[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f'"{key}" is no text')
    return record[key]


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))
