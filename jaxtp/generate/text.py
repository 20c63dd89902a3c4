"""Between text and token ids: the checkpoint's tokenizer, text that grows token by token, and stop strings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

_UNFINISHED = "\ufffd"  # what decoding gives for a character whose last bytes are still to come
_CONTEXT = 6  # tokens of the prompt that the first new ones are decoded with


class Tokenizer:
    """The tokenizer of a checkpoint folder (transformers' AutoTokenizer)."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="IProgress not found")  # of bars that are not drawn here
            from transformers import AutoTokenizer

        self.hf = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.folder, self.size = folder, len(self.hf)
        self.special = frozenset(self.hf.all_special_ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the tokenizer's own beginning-of-sequence token where it adds one."""
        return self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text, exactly as the tokens spell it."""
        return str(self.hf.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of a conversation, ready for the assistant's answer. Raises ValueError without a chat template."""
        if not self.hf.chat_template:
            raise ValueError("this tokenizer has no chat template; give a prompt to generate(), or a model tuned for chat")
        return str(self.hf.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True))

    @property
    def templates(self) -> dict[str, str]:
        """How conversations are written: chat templates by name, none where the tokenizer does not say."""
        found = self.hf.chat_template or {}
        return {"default": found} if isinstance(found, str) else found

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        train_on: Literal["assistant", "all", "last"] = "assistant",
        tools: list[Any] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and which of them are learned: what the assistant says (its answers, with what
        ends them), only the last of these, or all.

        Raises ValueError without a chat template, and where a template changes what came before as a conversation grows.
        """
        turns = [dict(m) for m in messages]

        def text(count: int, prompt: bool) -> str:
            if not self.hf.chat_template:
                raise ValueError("this tokenizer has no chat template: conversations cannot be learned")
            return str(self.hf.apply_chat_template(turns[:count], tools=tools, tokenize=False, add_generation_prompt=prompt))

        whole, spans = text(len(turns), False), []
        for i, turn in enumerate(turns):
            if turn.get("role") == "assistant":
                before, after = text(i, True), text(i + 1, False)
                if not (after.startswith(before) and whole.startswith(after)):
                    raise ValueError(
                        "the chat template changes earlier turns as a conversation grows; its answers have no place"
                    )
                spans.append((len(before), len(after)))
        found = self.hf(whole, add_special_tokens=False, return_offsets_mapping=True)
        spans = {"assistant": spans, "all": [(0, len(whole))], "last": spans[-1:]}[train_on]
        learn = [any(first <= start < last for first, last in spans) for start, _ in found["offset_mapping"]]
        return list(found["input_ids"]), learn

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document."""
        return self.hf.eos_token_id


class GrowingText:
    """The text of a growing sequence of tokens, decoding each token a bounded number of times.

    Tokenizers decode a token by its neighbours (spaces, split characters), so a window that starts a few tokens back is
    decoded with and without the new ones; the difference is the new text, once it ends in a whole character. The end of
    the prompt is the first such neighbour, so that prompt + text reads as the model wrote it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids = list(prompt[-_CONTEXT:])
        self._from, self._to = 0, len(self._ids)  # the window that is decoded again, and what of it is text already
        self.text = ""

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The new text; with `last`, also what is left of an unfinished character."""
        self._ids.extend(ids)
        known = self._decode(self._from, self._to)
        whole = self._decode(self._from, len(self._ids))
        if not last and (len(whole) <= len(known) or whole.endswith(_UNFINISHED)):
            return ""
        self._from, self._to = self._to, len(self._ids)
        self.text += whole[len(known) :]
        return whole[len(known) :]

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=self._skip)


def find_stop(text: str, stops: Sequence[str], *, searched: int) -> tuple[int, str] | None:
    """Where the first stop string stands in `text`, and which; the first `searched` characters are known to hold none."""
    longest = max(map(len, stops), default=0)
    found = [(at, stop) for stop in stops if (at := text.find(stop, max(0, searched - longest + 1))) >= 0]
    return min(found, default=None, key=lambda f: f[0])
