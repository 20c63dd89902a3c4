"""Types of the fields of requests: each says in its own words what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    Tag,
)
from pydantic_core import PydanticCustomError, core_schema

INT32, INT64 = 2**31, 2**63


class Body(BaseModel):
    """What a request holds: no fields but these, each of its own type (1.0 is no int, true is no number)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Only:
    """A field of the API that nothing here stands behind: values are taken that ask for nothing, others refused with `why`."""

    why: str
    values: tuple[Any, ...] = (None,)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """A check of the value."""

        def check(value: Any) -> Any:
            if not any(type(value) is type(taken) and value == taken for taken in self.values):
                raise PydanticCustomError("unsupported", "{why}", {"why": self.why})
            return value

        return core_schema.no_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The values, listed."""
        return {"enum": list(self.values), "description": f"Only such values: else the field {self.why}."}


def _by(kinds: Callable[[Any], str | None], rule: str) -> Discriminator:
    return Discriminator(kinds, custom_error_type="invalid_type", custom_error_message=f"must be {rule}")


def _prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "(text)"
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, str):
        return "(texts)"
    if isinstance(first, list):
        return "(lists)"
    return "(ids)" if isinstance(first, int) else None


def _text_or_list(value: Any) -> str | None:
    return "(text)" if isinstance(value, str) else "(list)" if isinstance(value, list) else None


Ids = Annotated[list[int], Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[str], Field(min_length=1), Tag("(texts)")]
    | Annotated[Ids, Tag("(ids)")]
    | Annotated[list[Ids], Field(min_length=1), Tag("(lists)")],
    _by(_prompt, "a text, a list of texts, token ids, or a list of lists of token ids, and not empty"),
]
Stop = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[str], Field(max_length=4), Tag("(list)")],
    _by(_text_or_list, "a text or a list of at most four"),
]


class Part(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Part], Field(min_length=1), Tag("(list)")],
    _by(_text_or_list, "a text or a list of parts of text"),
]
TokenKey = Annotated[str, StringConstraints(pattern="^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Metadata = Mapping[str, str]

_TOOLS = "is not there yet: no tools are called; leave it out"
_FORMS = "is not there yet: answers are free text; leave it out"
Tools = Annotated[Any, Only(_TOOLS, (None, []))]
ToolChoice = Annotated[Any, Only(_TOOLS, (None, "none"))]
ToolCall = Annotated[Any, Only(_TOOLS)]
Form = Annotated[Any, Only(_FORMS)]
TextForm = Annotated[Any, Only(_FORMS, (None, {"type": "text"}))]
Absent = Annotated[Any, Only("is not supported; leave it out")]
AbsentList = Annotated[Any, Only("is not supported; leave it out", (None, []))]
AbsentMap = Annotated[Any, Only("is not supported; leave it out", (None, {}))]
Never = Annotated[Any, Only("is not supported; leave it out, or say false", (None, False))]
TextOnly = Annotated[Any, Only("is not supported: models here read and write text alone", (None, ["text"]))]
