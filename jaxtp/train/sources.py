"""Files of training data: which files are meant, what form each has, and the records or token ids in it."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxtp.files import local, parsed, read_lines, read_text
from jaxtp.log import logger

Form = Literal["text", "lines", "json", "parquet", "tokens"]
FORMS: dict[str, Form] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
    ".npy": "tokens",
}
_PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip")
_NOT_TEXT = (".csv", ".tsv", ".xlsx", ".arrow", ".bin", ".npz", ".pt", ".pkl")
_ABOUT = re.compile(r"_.*|(readme|licen[sc]e|notice|changelog)\b.*|(dataset_(infos?|dict)|state|metadata)\.json", re.IGNORECASE)
_SHOWN = 3  # names of files that were left out


class Record(NamedTuple):
    """An object of a file. where: file:line or "file, record n"; size: about how many bytes of the file it takes."""

    where: str
    value: dict[str, Any]
    size: float


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """The files that paths, patterns (data/*.jsonl) and folders name; those of a folder with all below it, by name.

    Of a folder, only files with the endings in FORMS count, and neither hidden ones nor what tells of the data (README,
    LICENSE, dataset_info.json). Raises FileNotFoundError for what is not there, and ValueError for remote addresses and for
    folders without data.
    """
    found: list[Path] = []
    for path in paths:
        place = local(path)
        if place.exists():
            named = [place]
        elif glob.has_magic(str(place)):
            named = [Path(name) for name in sorted(glob.glob(str(place), recursive=True))]
            if not named:
                raise FileNotFoundError(f"no file is named like {path}")
        else:
            raise FileNotFoundError(f"{path} does not exist")
        for one in named:
            found += _inside(one) if one.is_dir() else [one]
    return found


def _inside(folder: Path) -> list[Path]:
    below = [(path.relative_to(folder), path) for path in folder.rglob("*") if not path.is_dir()]
    seen = sorted((name.as_posix(), path) for name, path in below if not any(part.startswith(".") for part in name.parts))
    data = [path for _, path in seen if not _ABOUT.fullmatch(path.name) and _ending(path) in FORMS]
    if not data:
        raise ValueError(f"{folder} is a folder without data ({', '.join(FORMS)})")
    left = [name for name, path in seen if path not in set(data)]
    rest = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    logger.info("%s: %s%s", folder, counted(len(data), "file"), f"; left out: {', '.join(left[:_SHOWN])}{rest}" if left else "")
    return data


def _ending(path: Path) -> str:
    """What a file's name ends in; of a compressed one (which is refused when it is read), of what is inside."""
    inner = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return inner.suffix.lower()


def form_of(path: Path, kind: str) -> Form:
    """How a file is read: by its name, and where that says nothing by the kind of data that it is said to hold.

    Raises ValueError for names of other formats.
    """
    if kind in ("tokens", "jsonl"):
        return "tokens" if kind == "tokens" else "lines"
    form = FORMS.get(_ending(path))
    if kind not in ("auto", "text") and form in (None, "text"):
        return "lines"
    if kind == "auto" and path.suffix.lower() in _NOT_TEXT:
        raise ValueError(
            f"{path}: {path.suffix} files are not read; convert it to JSONL or Parquet, or token ids to .npy (np.save); "
            "data.kind=text would learn it as text, as it stands"
        )
    return form or "text"


def document(path: Path) -> str:
    """The text of a file that is one document. Raises ValueError where it is blank."""
    text = read_text(path)
    if not text or text.isspace():
        raise ValueError(f"{path} is empty" + (" but for blank space" if text else ""))
    if path.suffix != ".md" and _holds_object(text):
        logger.warning("%s looks like JSON lines, but is learned as text, as it is named (data.kind=jsonl: records)", path)
    return text


def _holds_object(text: str) -> bool:
    line = text[: text.find("\n") + 1 or None]
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def records(path: Path, form: Form) -> Iterator[Record]:
    """The objects in a file of lines, of JSON or of Parquet. Raises ValueError at the first thing that is none."""
    yield from {"lines": _lines, "json": _json, "parquet": _parquet}[form](path)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{where} is not a JSON object, such as {{"text": ...}}')
    return value


def _lines(path: Path) -> Iterator[Record]:
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if number == 1 and line.startswith("["):
            raise ValueError(f"{where} begins an array, not an object on each line; a file that holds an array is named .json")
        yield Record(where, _object(parsed(line, where), where), len(line) + 1)


def _json(path: Path) -> Iterator[Record]:
    """An array of records, or a single one; or lines, which are often named .json as well."""
    text = read_text(path)
    start = len(text) - len(text.lstrip())
    if start == len(text):
        raise ValueError(f"{path} is empty")
    if text[start] == "{":
        try:
            _, end = json.JSONDecoder().raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            end = len(text)  # `parsed` says what is wrong
        if re.compile(r"\S").search(text, end):
            del text
            yield from _lines(path)
            return
    size, value = len(text), parsed(text, str(path))
    del text
    values = value if isinstance(value, list) else [value]
    for number, one in enumerate(values, 1):
        where = f"{path}, record {number}"
        yield Record(where, _object(one, where if isinstance(value, list) else str(path)), size / len(values))


def _parquet(path: Path) -> Iterator[Record]:
    """The rows; null is absent, as columns cannot tell the two apart."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet files need pyarrow: pip install 'jaxtp[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            size = path.stat().st_size / max(file.metadata.num_rows, 1)
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield Record(f"{path}, record {number}", _present(row), size)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {str(error).splitlines()[0]}") from None


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def token_ids(path: Path) -> np.ndarray:
    """The ids in a .npy file, [N] of ints, left on disk. Raises ValueError for whatever else it holds."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path} is no array of token ids as np.save writes them: {reason}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}; token arrays are 1-D and of ints")
    if not len(array):
        raise ValueError(f"{path} is empty")
    for start in range(0, len(array), 1 << 24):
        part = array[start : start + (1 << 24)]
        for wrong in (int(part.min()), int(part.max())):
            if not 0 <= wrong < 2**31:
                raise ValueError(f"{path} holds {wrong}, which is no token id: these are 0 to {2**31 - 1}")
    return array


def counted(number: int, noun: str) -> str:
    """1 file, 2,000 files."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
