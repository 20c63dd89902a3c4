"""Prompts from files, each with the sampling settings that its line has."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtp import files

if TYPE_CHECKING:
    from jaxtp import SamplingParams

KEYS = ("prompt", "prompt_token_ids")
Asked = tuple[str | list[int], "SamplingParams"]


def read_prompts(path: Path, params: SamplingParams) -> list[Asked]:
    """The prompts of a file, and how each is sampled: by `params`, but for what its own record says.

    A text file holds one prompt a line. JSON (.jsonl, .json, or standard input that begins like it) holds records, one a line
    or in one list: a text, a list of token ids, or an object with "prompt" or "prompt_token_ids" and any setting of
    SamplingParams. Raises FileNotFoundError, and ValueError that names file and line.
    """
    if str(path) == "-":
        where, text = "standard input", files.decoded(sys.stdin.buffer.read(), "standard input")
        json = all(line.startswith('{"') for _, line in files.lines(text))
    else:
        where, text = str(path), files.read_text(path)
        json = path.suffix in (".json", ".jsonl")
    lines = files.lines(text)
    records = _records(text, where, path.suffix == ".json") if json else ((f"{where}:{number}", line) for number, line in lines)
    found = [_asked(record, at, params) for at, record in records]
    if not found:
        raise ValueError(f"{where} holds no prompts")
    return found


def _records(text: str, where: str, whole: bool) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of each record: of the one list that a .json file may be, or line by line."""
    if whole and text.strip() and not _line_by_line(text):
        value = files.parsed(text, where)
        yield from (
            ((f"{where}, record {i}", v) for i, v in enumerate(value, 1)) if isinstance(value, list) else [(where, value)]
        )
        return
    for number, line in files.lines(text):
        yield f"{where}:{number}", files.parsed(line, f"{where}:{number}")


def _line_by_line(text: str) -> bool:
    """Whether the first line is a record of its own and not the beginning of a longer one."""
    first = next(line for _, line in files.lines(text))
    try:
        return isinstance(files.parsed(first, ""), dict)
    except ValueError:
        return False


def _asked(record: Any, where: str, params: SamplingParams) -> Asked:
    own = {key: value for key, value in record.items() if key not in KEYS} if isinstance(record, dict) else {}
    prompt = next((record[key] for key in KEYS if record.get(key) is not None), None) if isinstance(record, dict) else record
    if not (isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt))):
        raise ValueError(f'{where} is no prompt: a text, a list of token ids, or an object with "{KEYS[0]}" or "{KEYS[1]}"')
    unknown = sorted(own.keys() - {field.name for field in dataclasses.fields(params)})
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is no setting of SamplingParams; a record holds a prompt and such settings")
    try:
        return prompt, dataclasses.replace(params, **own)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
