"""The tokenizer of a checkpoint folder: text to token ids and back, and conversations to prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxtp.text import chat
from jaxtp.text.folder import load
from jaxtp.text.grow import GrowingText, Spelling

if TYPE_CHECKING:
    from jaxtp.text.template import Span, Template

Learn = Literal["assistant", "all", "last"]


class Tokenizer:
    """The tokenizer of a checkpoint folder, the same as transformers' AutoTokenizer, without transformers.

    backend: the `tokenizers` one. size: tokens that have a name. special: ids of the special tokens that have a role, such as
    eos_id, which ends a document. templates: the chat templates by name. Raises ValueError for files that are none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        found = load(self.folder)
        self.backend, self.templates, self._named = found.backend, found.templates, found.named
        self.size = self.backend.get_vocab_size(with_added_tokens=True)
        special = (self._id(name) for name in (*self._named.values(), *found.extra))
        self.special = frozenset(token for token in special if token is not None)
        self.bos_id, self.eos_id = self._id(self._named.get("bos_token")), self._id(self._named.get("eos_token"))

    def _id(self, name: str | None) -> int | None:
        """The id of a named special token, that of the unknown one where the vocabulary does not have it."""
        if name is None:
            return None
        found, unknown = self.backend.token_to_id(name), self._named.get("unk_token")
        return self.backend.token_to_id(unknown) if found is None and unknown else found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the tokenizer's own beginning-of-sequence token where it adds one.

        Raises ValueError for a text that no encoding has (half of a surrogate pair).
        """
        return self.backend.encode(_sound(text), add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text, exactly as the tokens spell it."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def growing(self, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> GrowingText:
        """The text of a completion of `prompt`, to which tokens are added."""
        return GrowingText(self._spelling, prompt, skip_special_tokens=skip_special_tokens)

    def spelled(self, token: int) -> bytes:
        """The bytes of one token as it stands within a text, a special one's too; none of an id beyond the vocabulary."""
        piece = self._spelling.piece(token, skip_special_tokens=False) or b""
        return piece if isinstance(piece, bytes) else piece.encode()

    @functools.cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self.backend)

    def hidden(self, text: str) -> list[int]:
        """The special tokens that `text` holds and that no text shows from which they are skipped."""
        special = self.backend.get_added_tokens_decoder().items()
        return [token for token, added in special if added.special and added.content in text]

    # -- conversations -------------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **values: Any,
    ) -> str:
        """The prompt of a conversation, ready for the assistant's answer (or to continue its last message).

        A content is a text, or a list of parts of text. tools: JSON schemas. chat_template: a name or a source, instead of the
        tokenizer's own. `values` are the template's own, such as enable_thinking. Raises ValueError without a chat template,
        for messages that it refuses, and for parts that are no text.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message=True goes with add_generation_prompt=False: it starts no new message")
        template = self._template(chat_template, tools)
        turns = chat.turns_of(messages, template)
        values |= self._tools(tools=tools, documents=documents)
        if continue_final_message:
            return chat.cut_end(self._render(template, chat.open_end(turns), False, values)[0])
        return self._render(template, turns, add_generation_prompt, values)[0]

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        train_on: Learn = "assistant",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and which of them are learned: what the assistant says (its answers, with what
        ends them), all, or the last answer.

        Where the template marks what is generated, that is what the assistant says. Raises ValueError as `chat` does, and
        where the template writes the answers so that they have no place.
        """
        if train_on not in ("assistant", "all", "last"):
            raise ValueError(f'train_on={train_on!r} must be "assistant", "all" or "last"')
        template = self._template(None, tools)
        turns, values = chat.turns_of(messages, template), self._tools(tools=tools, documents=None)
        whole, spans = self._render(template, turns, False, values)
        found = self.backend.encode(_sound(whole), add_special_tokens=False)
        if train_on == "all":
            return found.ids, [True] * len(found.ids)
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if train_on == "last":
            answers = answers[-1:]
        if not template.marks_generation:
            spans = [self._answer(template, turns, i, whole, values) for i in answers]
        elif train_on == "last" and answers and answers[0] > 0:
            spans = spans[len(self._render(template, turns[: answers[0]], False, values)[1]) :]
        return found.ids, [any(start < b and end > a for a, b in spans) for start, end in found.offsets]

    def _answer(self, template: Template, turns: list[dict[str, Any]], i: int, whole: str, values: Mapping[str, Any]) -> Span:
        """Where in the whole conversation the answer stands that is turn `i`."""
        before = self._render(template, turns[:i], True, values)[0] if i else ""
        after = self._render(template, turns[: i + 1], False, values)[0]
        if not (whole.startswith(before) and after.startswith(before)):
            raise ValueError("the chat template changes earlier turns as a conversation grows; its answers have no place")
        content = turns[i].get("content") or ""
        said = content if isinstance(content, str) else content[-1]["text"]
        return len(before), chat.answer_end(whole, len(before), after[len(before) :], said)

    def _template(self, wanted: str | None, tools: Any) -> Template:
        from jaxtp.text.template import compiled  # Jinja, which many never need

        return compiled(chat.chosen(self.templates, wanted, tools=tools is not None))

    def _render(
        self, template: Template, turns: list[dict[str, Any]], prompt: bool, values: Mapping[str, Any]
    ) -> tuple[str, list[Span]]:
        return template.render({**self._named, "messages": turns, "add_generation_prompt": prompt, **values})

    def _tools(self, **given: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """Tools and documents as a template reads them."""
        for name, values in given.items():
            if values is not None and not all(isinstance(value, Mapping) for value in values):
                raise ValueError(f"{name} must be a list of dicts" + " (JSON schemas)" * (name == "tools"))
        return {name: chat.plain(values, name) for name, values in given.items()}


def _sound(text: str) -> str:
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("the text holds half of a surrogate pair (\\ud800 to \\udfff alone), which is no character")
    return text
