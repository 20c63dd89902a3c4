"""A folder's tokenizer as transformers 5 reads it: `AutoTokenizer`, and the classes that it makes of what a folder declares."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from jaxtp.files import read_object, read_text
from jaxtp.text.rebuild import REBUILT, Rebuilt

EXTRA = "sentencepiece"  # of jaxtp: what folders without tokenizer.json take
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Loaded:
    """What a folder holds. named: special tokens by role ("bos_token" ...), which chat templates know. extra: others."""

    backend: tokenizers.Tokenizer
    named: dict[str, str]
    extra: tuple[str, ...]
    templates: dict[str, str]


def load(folder: Path) -> Loaded:
    """Reads tokenizer.json and what says more of it: tokenizer_config.json, special_tokens_map.json, added_tokens.json, the
    chat templates. Raises ValueError where a file is none, and where a folder without tokenizer.json cannot be read;
    FileNotFoundError where there is no tokenizer.
    """
    settings = _optional(folder / "tokenizer_config.json")
    templates = _templates(folder, settings)
    path = folder / "tokenizer.json"
    if not path.exists():
        return _by_transformers(folder, templates)
    content, ids = read_text(path), {}
    kind = _rebuilt(settings, _optional(folder / "config.json"), content)
    if "added_tokens_decoder" not in settings:  # before transformers 4.34
        settings = settings | _optional(folder / "special_tokens_map.json")
        ids = _optional(folder / "added_tokens.json")
    try:
        return _made(content, kind, settings, ids, templates)
    except Exception as error:  # `tokenizers` raises no other, and settings may be anything
        raise ValueError(f"{path} is no tokenizer that can be read, or {folder} says what fits none: {_line(error)}") from None


def _made(
    content: str, kind: Rebuilt | None, settings: Mapping[str, Any], ids: Mapping[str, int], templates: dict[str, str]
) -> Loaded:
    """The tokenizer of a tokenizer.json's `content`; `ids` are those of added_tokens.json."""
    if kind is None:
        backend = tokenizers.Tokenizer.from_str(content)
        own = backend.get_added_tokens_decoder()
    else:
        spec = json.loads(content)
        own = {token["id"]: _added(token) for token in spec["added_tokens"]}
        backend = tokenizers.Tokenizer.from_str(json.dumps(kind.rebuild(spec, settings)))
    defaults = dict(kind.named) if kind else {}
    if backend.padding:
        defaults["pad_token"] = backend.padding["pad_token"]
    named, extra, added = _special(settings, ids, own, defaults)
    _add(backend, named, extra, added)
    if kind and kind.marks_special:
        backend.add_tokens([AddedToken(str(token), special=True) for token in (*named.values(), *extra)])
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    return Loaded(backend, {key: str(token) for key, token in named.items()}, tuple(map(str, extra)), templates)


def _rebuilt(settings: Mapping[str, Any], config: Mapping[str, Any], content: str) -> Rebuilt | None:
    """The class that transformers makes anew of tokenizer.json's vocabulary, or None where it takes the file as it is."""
    model_type = config.get("model_type")
    declared = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or "").removesuffix("Fast")
    if model_type == "mistral" or (declared == "LlamaTokenizer" and model_type != "qwen2" and '"ByteLevel"' in content):
        return None
    if model_type == "qwen2" or (model_type == "qwen3" and not declared):
        declared = "Qwen2Tokenizer"
    if declared in REBUILT and '"BPE"' not in content:
        return None
    return REBUILT.get(declared)


def _special(
    settings: Mapping[str, Any], ids: Mapping[str, int], own: Mapping[int, AddedToken], defaults: Mapping[str, str]
) -> tuple[dict[str, str | AddedToken], list[str | AddedToken], dict[int, AddedToken]]:
    """(special tokens by role, others, all added tokens by id). `own`: the added tokens of tokenizer.json."""
    given = dict(settings)
    if "added_tokens_decoder" in given:
        added = {int(token): _added(value) for token, value in given["added_tokens_decoder"].items()}
    else:
        names = {str(_added(value)) for key, value in given.items() if key in _NAMED and value}
        added = {token: AddedToken(n, normalized=n not in names, special=n in names) for n, token in ids.items()}
        added |= own
    extra = given.get("extra_special_tokens") or given.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        given |= {key: given.get(key, value) for key, value in extra.items()}
    roles = dict.fromkeys(
        [*_NAMED, *defaults, *(key for key in given if key.endswith("_token")), *(extra if isinstance(extra, dict) else ())]
    )
    by_name = {str(token): token for token in added.values()}
    named: dict[str, str | AddedToken] = {}
    for role in roles:
        value = given.get(role, defaults.get(role))
        if isinstance(value, str | dict) and value:
            token = value if isinstance(value, str) else _added(value)
            named[role] = by_name.get(str(token), token) if role in _NAMED else token
    others = [] if isinstance(extra, dict) else [value if isinstance(value, str) else _added(value) for value in extra]
    return named, others, added


def _add(
    backend: tokenizers.Tokenizer,
    named: Mapping[str, str | AddedToken],
    extra: list[str | AddedToken],
    added: Mapping[int, AddedToken],
) -> None:
    """Adds to tokenizer.json's tokens those that it does not have, or has otherwise."""
    there = list(backend.get_added_tokens_decoder().values())
    known = {repr(token) for token in there}
    missing: list[str | AddedToken] = [token for _, token in sorted(added.items()) if repr(token) not in known]
    names = {str(token) for token in (*there, *missing)}
    for token in (*named.values(), *extra):
        if str(token) not in names:
            names.add(str(token))
            missing.append(token)
    roles = {str(token) for token in named.values()}
    tokens = [AddedToken(token, special=True) if isinstance(token, str) else token for token in missing]
    for token in tokens:
        token.special = token.special or str(token) in roles
    if tokens:
        backend.add_tokens(tokens)


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """A folder's chat templates by name, "default" where there is one without any: chat_template.jinja and what lies in
    additional_chat_templates/, else those of tokenizer_config.json, else that of chat_template.json.
    """
    single = folder / "chat_template.jinja"
    found = {"default": read_text(single)} if single.is_file() else {}
    found |= {path.stem: read_text(path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if found:
        return found
    given = settings.get("chat_template")
    if given is None and (folder / "chat_template.json").is_file():
        given = read_object(folder / "chat_template.json").get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    found = {} if given is None else given
    if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise ValueError(f"chat_template in {folder} is neither a text nor a list of names and templates")
    return found


def _by_transformers(folder: Path, templates: dict[str, str]) -> Loaded:
    """A tokenizer in another form (SentencePiece, tiktoken, vocab.json and merges.txt), which transformers converts."""
    if not any(any(folder.glob(name)) for name in ("*.model", "vocab.*", "*.tiktoken", "tekken.json")):
        raise FileNotFoundError(f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model, vocab.json)")
    packages = {"transformers": "transformers"}  # by the module that they are imported as
    if any(folder.glob("*.model")) or any(folder.glob("*.tiktoken")):  # either may hold either kind
        packages |= {"sentencepiece": "sentencepiece", "google": "protobuf", "tiktoken": "tiktoken"}
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(
            f'{folder} has no tokenizer.json; other forms of a tokenizer take pip install "jaxtp[{EXTRA}]" '
            f"(not there: {', '.join(missing)})"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        try:
            found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of any library
            raise ValueError(f"{folder} holds no tokenizer that can be read: {_line(error)}") from None
    backend = getattr(found, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(f"{folder} holds a {type(found).__name__}, which has no fast form; save it as tokenizer.json first")
    return Loaded(backend, dict(found.special_tokens_map), tuple(found.extra_special_tokens), templates)


def _added(value: Any) -> AddedToken:
    """A token as files hold it: a text, or an object with flags."""
    if not isinstance(value, dict):
        return AddedToken(str(value), special=True)
    flags = {key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in value}
    return AddedToken(value["content"], **flags)


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
