"""A user's files: text, lines, JSON, YAML. Whatever is wrong with one is a ValueError of one line that names it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # UTF-32's little-endian mark begins like this as well
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Line ends stay as they are.

    Raises FileNotFoundError where there is none, and ValueError for a folder, a compressed file, and any other encoding.
    """
    return decoded(_file(path).read_bytes(), str(path))


def decoded(content: bytes, where: str, *, line: int = 1) -> str:
    """Bytes of a file (or of standard input) as text; `where` names them, and they begin at `line`. Raises as `read_text`."""
    if line == 1:
        for magic, (kind, tool) in _PACKED.items():
            if content.startswith(magic):
                raise ValueError(f"{where} is compressed ({kind}); unpack it first: {tool} {where}")
        if content.startswith(_UTF16):
            raise ValueError(f"{where} is UTF-16 or UTF-32, not UTF-8; convert it first: iconv -f UTF-16 -t UTF-8")
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte, line = content[error.start], content.count(b"\n", 0, error.start) + line
        raise ValueError(f"{where}:{line} is not UTF-8 text (byte 0x{byte:02x}); convert it first: iconv -t UTF-8") from None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of every line that is not blank, as `lines` cuts them; read one by one, as they are asked for.

    Raises as `read_text`, at the line that is at fault.
    """
    with _file(path).open("rb") as file:
        for number, content in enumerate(file, 1):
            line = decoded(content, str(path), line=number)
            if line.strip():
                yield number, line.removesuffix("\n").removesuffix("\r")


def lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of every line that is not blank. Lines end at a newline, never at the other separators of Unicode,
    which JSON has unescaped inside strings.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises FileNotFoundError, and ValueError where it is none."""
    return parsed(read_text(path), str(path))


def parsed(text: str, where: str) -> Any:
    """The value of JSON text. Raises ValueError, which begins with `where`, for anything else and for text that no encoding has
    (half of a surrogate pair).
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if "\\u" in text and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff alone), which is no character")
    return value


def read_object(path: str | Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object. Raises as `read_json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file, None of an empty one. Raises as `read_json`."""
    import yaml

    try:
        return yaml.safe_load(read_text(path))
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise ValueError(f"{where} is not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def local(path: str | Path) -> Path:
    """The path of a file or folder here, "~" spelled out. Raises ValueError for the address of a remote one (gs://, s3://)."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}", str(path))  # Path makes one slash of two
    if scheme:
        raise ValueError(f"{path} is a remote address ({scheme[1]}); jaxtp reads and writes local folders: copy or mount it")
    return Path(path).expanduser()


def _file(path: str | Path) -> Path:
    path = local(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file")
    return path
