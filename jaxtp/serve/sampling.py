"""How a request is sampled: by its own values, else as the model's folder says, else by OpenAI's defaults."""

from __future__ import annotations

import re
from typing import Any

from jaxtp.engine.params import SamplingParams
from jaxtp.serve.errors import Failure
from jaxtp.serve.protocol import ChatRequest, CompletionRequest, Sampled
from jaxtp.serve.served import Served
from jaxtp.serve.settings import Settings

_SAME = """
n temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty logit_bias min_tokens stop stop_token_ids
ignore_eos include_stop_str_in_output skip_special_tokens
""".split()  # fields that SamplingParams has by the same names


def params_of(body: Sampled, served: Served, settings: Settings) -> SamplingParams:
    """The request's SamplingParams. Raises Failure, which names the field, for what cannot be."""
    _check(body, served, settings)
    own = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if body.seed is not None:
        own["seed"] = body.seed % 2**32  # OpenAI's have 64 bits
    field, longest = body.wanted_tokens
    own |= {"max_tokens": longest} if longest is not None else {}
    values: dict[str, Any] = {"max_tokens": body.default_max_tokens, **served.defaults, **own, "logprobs": body.wanted_logprobs}
    try:
        return SamplingParams(**values)
    except (ValueError, TypeError) as error:
        raise refused(error, body, renamed={"max_tokens": field}) from None


def refused(error: Exception, body: Sampled, *, renamed: dict[str, str] | None = None, otherwise: str | None = None) -> Failure:
    """What to say of an error of the library's, which begins with the name of a parameter. otherwise: the field that is meant
    where it does not.
    """
    said, names = str(error), {"logprobs": "top_logprobs"} if isinstance(body, ChatRequest) else {}
    found = re.match(r"\w+", said)
    param = found[0] if found and found[0] in SamplingParams.__dataclass_fields__ else None
    if param is None:
        return Failure(400, said, param=otherwise, code="invalid_value")
    name = {**names, **(renamed or {})}.get(param, param)
    return Failure(400, name + said[len(param) :], param=name, code="invalid_value")


def fits(prompt: list[int], body: Sampled, served: Served, *, where: str) -> None:
    """Raises Failure where a prompt, and the tokens that were asked for behind it, are longer than the model's context."""
    most, (field, wanted) = served.engine.max_model_len, body.wanted_tokens
    if len(prompt) + (wanted or 1) > most:
        said = f"the prompt has {len(prompt)} tokens"
        if wanted is not None and len(prompt) < most:
            said, where = f"{said} and {field} asks for {wanted} more", field
        raise Failure(
            400,
            f"{said}; prompt and completion together have at most {most} (truncate_prompt_tokens keeps the prompt's last ones)",
            param=where,
            code="context_length_exceeded",
        )


def _check(body: Sampled, served: Served, settings: Settings) -> None:
    """What no field alone can tell."""

    def refuse(param: str, why: str) -> None:
        raise Failure(400, f"{param} {why}", param=param, code="invalid_value")

    if (body.n or 1) > settings.max_n:
        refuse("n", f"is {body.n}; this server takes at most {settings.max_n} (--max-n)")
    if body.stream_options is not None and not body.stream:
        refuse("stream_options", "goes with stream: true")
    if body.stream_options and body.stream_options.continuous_usage_stats and not body.stream_options.include_usage:
        refuse("stream_options.continuous_usage_stats", "goes with include_usage: true")
    if body.priority and not served.priorities:
        refuse("priority", "changes nothing here: the server was started without --scheduling-policy priority")
    if isinstance(body, CompletionRequest):
        if body.best_of is not None and body.best_of != (body.n or 1):
            refuse("best_of", f"must be n, {body.n or 1}, where it is given: no completions are thrown away")
        if body.echo and body.logprobs is not None:
            refuse("echo", "does not go with logprobs: there are none of the prompt")
    if isinstance(body, ChatRequest):
        if body.top_logprobs is not None and not body.logprobs:
            refuse("top_logprobs", "goes with logprobs: true")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            refuse("max_tokens", "is the old name of max_completion_tokens, and they differ; give one")
