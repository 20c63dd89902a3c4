"""Conversations as people write them, for chat templates: messages, contents in parts, and which template a model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtp.text.template import Template

Message = Mapping[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that a message's reasoning goes by
_CUT = "CUT_HERE "  # stands where a final message is to be continued; its space shows whether the template trims


def chosen(templates: Mapping[str, str], wanted: str | None, *, tools: bool) -> str:
    """The source of the template to use: `wanted` is a name or a source. Raises ValueError where there is none."""
    if wanted is not None:
        return templates.get(wanted, wanted)
    if not templates:
        raise ValueError("this tokenizer has no chat template; give a prompt to generate(), or a model tuned for chat")
    for name in ("tool_use", "default") if tools else ("default",):
        if name in templates:
            return templates[name]
    raise ValueError(f"this tokenizer has several chat templates and no default; chat_template= one of {sorted(templates)}")


def turns_of(messages: Sequence[Message], template: Template) -> list[dict[str, Any]]:
    """Messages as a template reads them: plain JSON values, keys without a value left out, contents in parts joined where
    the template does not take them one by one (by newlines, as vLLM does). Raises ValueError for what cannot be read.
    """
    if not messages:
        raise ValueError("a conversation has at least one message")
    turns = []
    for i, message in enumerate(messages):
        where = f"message {i}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'{where} must be a dict with a "role" and a "content"; given: {_short(message)}')
        turn = {key: plain(value, f"{where}: {key}") for key, value in message.items() if value is not None}
        reasoning = next((turn[key] for key in _REASONING if key in turn), None)
        if reasoning is not None:
            turn = {"thinking": reasoning, **turn, "reasoning_content": reasoning}
        if "content" in turn:
            turn["content"] = _content(turn["content"], template, where)
        turns.append(turn)
    return turns


def _content(content: Any, template: Template, where: str) -> Any:
    if isinstance(content, str) or (isinstance(content, dict) and template.reads_mappings):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} has a content that is neither a text nor a list of parts: {_short(content)}")
    texts = [_text(part, where) for part in content]
    return [{"type": "text", "text": text} for text in texts] if template.reads_parts else "\n".join(texts)


def _text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise ValueError(f"{where} has a part of type {kind!r}; this model reads text alone")
    if not isinstance(part.get("text"), str):
        raise ValueError(f'{where} has a part without a "text": {_short(part)}')
    return part["text"]


def plain(value: Any, where: str) -> Any:
    """A value made of JSON's own types alone: templates come from others, and other objects have methods. Raises ValueError."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner, where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, where) for inner in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # an enum's member, for one, is one with more to it
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    raise ValueError(f"{where} holds {_short(value)} ({type(value).__name__}), which is no JSON value")


def open_end(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with a mark at the end of the last one, which `cut_end` finds again."""
    content = turns[-1].get("content")
    if isinstance(content, list) and content:
        marked: Any = [*content[:-1], {**content[-1], "text": content[-1]["text"] + _CUT}]
    elif isinstance(content, str):
        marked = content + _CUT
    else:
        raise ValueError("continue_final_message needs a last message with a text")
    return [*turns[:-1], {**turns[-1], "content": marked}]


def cut_end(text: str) -> str:
    """What stands before the mark; without the space before it where the template trims contents."""
    at = text.rfind(_CUT.strip())
    if at < 0:
        raise ValueError("continue_final_message: the chat template does not give the last message back as it is")
    return text[:at] if text.startswith(_CUT, at) else text[:at].rstrip()


def answer_end(whole: str, start: int, alone: str, said: str) -> int:
    """Where an answer ends that begins at `start` of the whole conversation. `alone` is how it is written at the end of a
    conversation, where templates may say more of it (an empty thought): what stands in the whole is an end of that.

    Raises ValueError where the answer is not found.
    """
    tail = said.rstrip()[-24:]
    for cut in range(len(alone)):
        rest = alone[cut:]
        if tail not in rest:
            break
        if whole.startswith(rest, start):
            return start + len(rest)
    raise ValueError("the chat template changes earlier turns as a conversation grows; its answers have no place")


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."
