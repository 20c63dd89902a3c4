"""Chat templates: Jinja in a sandbox, with what transformers' templates may use (`transformers.utils.chat_template_utils`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Around what a template puts between {% generation %} and {% endgeneration %}. U+FDD0 to U+FDEF are no characters of any text.
_OPEN, _CLOSE = "\ufdd0\ufdd1", "\ufdd0\ufdd2"

Span = tuple[int, int]


class Template:
    """A chat template, compiled. Raises ValueError where it is not Jinja."""

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            tree = _environment().parse(source)
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid: {_line(error)}") from None
        self.reads_parts = _loops_over_content(tree)
        """Whether it takes the parts of a content one by one; else they have to be joined."""
        self.reads_mappings = any(test.name == "mapping" for test in tree.find_all(nodes.Test))
        """Whether it looks for contents that are objects, as what tools return may be."""
        self.marks_generation = any(
            isinstance(call.node, nodes.ExtensionAttribute) and call.node.identifier == _Generation.identifier
            for call in tree.find_all(nodes.Call)
        )
        """Whether it says with {% generation %} what the assistant says."""

    def render(self, values: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """The text, and where in it the template says that the assistant speaks. Raises ValueError for whatever goes wrong."""
        try:
            marked = self._template.render(**values)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {_line(error)}") from None
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            raise ValueError(f"the chat template fails on this conversation: {type(error).__name__}: {_line(error)}") from None
        return _unmarked(marked)


@functools.lru_cache(maxsize=32)
def compiled(source: str) -> Template:
    """The template of a source, compiled once."""
    return Template(source)


class _Generation(Extension):
    """The tag {% generation %}: what stands in it is marked."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class _Dict:
    """`dict` for templates, without what a class would give away."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates, in which no name begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace holds no names that begin with an underscore, such as {name!r}")


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _unmarked(marked: str) -> tuple[str, list[Span]]:
    text, spans = "", []
    for i, part in enumerate(marked.split(_OPEN)):
        inside, _, behind = part.partition(_CLOSE) if i else ("", "", part)
        if i:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + behind
    return text, spans


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether a loop goes over a message's content, by that name or another that it was given."""
    names = {"content"}

    def is_content(node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Filter):
            return is_content(node.node)
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name in names

    for given in tree.find_all(nodes.Assign):
        if isinstance(given.target, nodes.Name) and is_content(given.node):
            names.add(given.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
