"""The bodies of requests: OpenAI's fields, and those that vLLM has beside them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from jaxtp.serve.fields import (
    INT32,
    INT64,
    Absent,
    AbsentList,
    AbsentMap,
    Bias,
    Body,
    Content,
    Form,
    Metadata,
    Name,
    Never,
    Prompt,
    Stop,
    TextForm,
    TextOnly,
    TokenKey,
    ToolCall,
    ToolChoice,
    Tools,
)


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Never = None


class Accepted(Body):
    """Fields of the API that change nothing here: they are taken and not looked at."""

    user: str | None = None
    metadata: Metadata | None = None
    store: Never = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Unsupported(Body):
    """Fields that other servers have and that cannot be done here: refused by name."""

    allowed_token_ids: AbsentList = None
    bad_words: AbsentList = None
    cache_salt: Absent = None
    prompt_logprobs: Absent = None
    logits_processors: AbsentList = None
    use_beam_search: Never = None
    length_penalty: Absent = None
    return_tokens_as_token_ids: Never = None
    kv_transfer_params: Absent = None
    vllm_xargs: AbsentMap = None
    response_format: TextForm = None
    structured_outputs: Form = None
    guided_json: Form = None
    guided_regex: Form = None
    guided_choice: Form = None
    guided_grammar: Form = None


class Sampled(Accepted, Unsupported):
    """What completions and answers in a chat have in common."""

    model: Name | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[TokenKey, Bias] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Stop | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-INT32, lt=INT32)] | None = None
    request_id: Name | None = None
    return_token_ids: bool | None = None

    default_max_tokens: ClassVar[int | None] = None

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """How long an answer may be, and the field that says it."""
        return "max_tokens", self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """The alternatives to tell at each token."""
        raise NotImplementedError

    @property
    def usage(self) -> tuple[bool, bool]:
        """Whether a stream ends with the usage, and whether each chunk tells it."""
        asked = self.stream_options or StreamOptions()
        return bool(asked.include_usage), bool(asked.include_usage and asked.continuous_usage_stats)


class CompletionRequest(Sampled):
    """The body of /v1/completions."""

    prompt: Prompt
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Absent = None

    default_max_tokens: ClassVar[int | None] = 16

    @property
    def wanted_logprobs(self) -> int | None:
        """The alternatives to tell at each token."""
        return self.logprobs


class Message(Body):
    """A turn of a conversation. Its template says which roles there are."""

    role: Name
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    refusal: Absent = None
    audio: Absent = None
    tool_calls: Tools = None
    tool_call_id: ToolCall = None
    function_call: ToolCall = None


class Conversation(Body):
    """What a chat template is given."""

    messages: Annotated[list[Message], Field(min_length=1)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(Sampled, Conversation):
    """The body of /v1/chat/completions."""

    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    echo: Never = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    functions: Tools = None
    function_call: ToolChoice = None
    modalities: TextOnly = None
    audio: Absent = None
    prediction: Absent = None
    web_search_options: Absent = None
    reasoning_effort: Absent = None
    verbosity: Absent = None
    documents: AbsentList = None
    mm_processor_kwargs: AbsentMap = None

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """How long an answer may be, and the field that says it."""
        if self.max_completion_tokens is None:
            return super().wanted_tokens
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """The alternatives to tell at each token."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeText(Body):
    """The body of /tokenize, of a text."""

    model: Name | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(Conversation):
    """The body of /tokenize, of a conversation."""

    model: Name | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: Tools = None


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: Name | None = None
    tokens: list[int]


TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag("(text)")] | Annotated[TokenizeChat, Tag("(chat)")],
    Discriminator(lambda body: "(chat)" if isinstance(body, dict) and "messages" in body else "(text)"),
]
