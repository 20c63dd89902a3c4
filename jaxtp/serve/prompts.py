"""What requests ask about, as token ids. Texts may be long and templates slow: this runs beside the event loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtp.serve.errors import Failure
from jaxtp.serve.fields import INT32
from jaxtp.serve.protocol import ChatRequest, CompletionRequest, Conversation, Sampled
from jaxtp.serve.sampling import fits
from jaxtp.serve.served import Served
from jaxtp.serve.settings import Settings
from jaxtp.text import Tokenizer

_RESERVED = {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}


@dataclass(frozen=True)
class Asked:
    """A prompt: its token ids, and the text that is given back where that is wanted."""

    ids: list[int]
    echo: str = ""


def tokenizer_of(served: Served, param: str) -> Tokenizer:
    """The tokenizer. Raises Failure where the model has none."""
    if served.tokenizer is None:
        raise Failure(400, "this model has no tokenizer: give token ids to /v1/completions", param=param)
    return served.tokenizer


def prompts_of(body: CompletionRequest | ChatRequest, served: Served, settings: Settings) -> list[Asked]:
    """The prompts of a request, each of a length that fits. Raises Failure."""
    if isinstance(body, ChatRequest):
        ids = chat_ids(body, served, settings, special=bool(body.add_special_tokens))
        return [Asked(_cut(ids, body, served, where="messages"))]
    prompt = body.prompt
    given: list[Any] = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    if len(given) > settings.max_prompts:
        said = f"prompt holds {len(given)}; this server takes at most {settings.max_prompts} in a request (--max-prompts)"
        raise Failure(400, said, param="prompt", code="invalid_value")
    return [_asked(one, body, served) for one in given]


def _asked(prompt: str | list[int], body: CompletionRequest, served: Served) -> Asked:
    if isinstance(prompt, str):
        ids = encoded(prompt, served, special=body.add_special_tokens is not False, param="prompt")
    else:
        ids = prompt
    kept = _cut(ids, body, served, where="prompt")
    if not body.echo:
        return Asked(kept)
    if isinstance(prompt, str) and kept is ids:
        return Asked(kept, prompt)
    tokenizer = tokenizer_of(served, "echo")
    if wrong := [token for token in kept if not 0 <= token < INT32]:  # the engine knows more, but is asked later
        raise Failure(400, f"prompt has token ids {wrong[:5]}, which no vocabulary has", param="prompt", code="invalid_value")
    return Asked(kept, tokenizer.decode(kept, skip_special_tokens=body.skip_special_tokens is not False))


def _cut(ids: list[int], body: Sampled, served: Served, *, where: str) -> list[int]:
    """The last tokens of a prompt, where only so many are wanted."""
    keep = body.truncate_prompt_tokens
    if keep == 0:
        raise Failure(
            400, "truncate_prompt_tokens must be at least 1, or -1 for as many as fit", param="truncate_prompt_tokens"
        )
    if keep == -1:
        keep = max(served.engine.max_model_len - (body.wanted_tokens[1] or body.default_max_tokens or 1), 1)
    if keep is not None and len(ids) > keep:
        ids = ids[-keep:]
    fits(ids, body, served, where=where)
    return ids


def encoded(text: str, served: Served, *, special: bool, param: str) -> list[int]:
    """The token ids of a text. Raises Failure for one that is none."""
    try:
        return tokenizer_of(served, param).encode(text, add_special_tokens=special)
    except ValueError as error:
        raise Failure(400, f"{param}: {error}", param=param, code="invalid_value") from None


def chat_ids(body: Conversation, served: Served, settings: Settings, *, special: bool) -> list[int]:
    """The token ids of a conversation, by the model's chat template. Raises Failure for what it does not take."""
    tokenizer, template, values = tokenizer_of(served, "messages"), body.chat_template, body.chat_template_kwargs or {}
    if template is not None and template not in tokenizer.templates and not settings.trust_request_chat_template:
        known = ", ".join(sorted(tokenizer.templates)) or "none"
        said = f"chat_template must be the name of one that the model has ({known}): the source of one is a program"
        raise Failure(400, f"{said}, which --trust-request-chat-template lets requests bring", param="chat_template")
    if taken := sorted(_RESERVED & values.keys()):
        said = (
            f"chat_template_kwargs cannot set {taken[0]}: it is what the template is given anyway, or is asked for by its field"
        )
        raise Failure(400, said, param="chat_template_kwargs")
    goes_on = bool(body.continue_final_message)
    if goes_on and body.add_generation_prompt:
        said = "add_generation_prompt does not go with continue_final_message: it begins a new message"
        raise Failure(400, said, param="add_generation_prompt", code="invalid_value")
    try:
        text = tokenizer.chat(
            [message.model_dump(exclude_none=True) for message in body.messages],
            chat_template=template,
            add_generation_prompt=not goes_on and body.add_generation_prompt is not False,
            continue_final_message=goes_on,
            **values,
        )
    except (ValueError, TypeError) as error:
        raise Failure(400, str(error), param="messages", code="invalid_value") from None
    return encoded(text, served, special=special, param="messages")
