"""Print the documentation of the Python that runs this file, one JSON object a line.

A script of its own, standard library only, for `reader.documents` to run in a fresh interpreter:

    python -P -s -S inspection.py

A document is a public module, class, function, method or property with a docstring, or one of the
language-reference topics that ship with `pydoc`. What is re-exported stands once, under the name
that its users import: `asyncio.run`, not `asyncio.runners.run`; `str.join`, not
`builtins.str.join`; `os.path.join`, not `posixpath.join`.
"""

import functools
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

# Modules that act when imported, are not for users, or need a display.
_NOT_READ = {"antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "this"}
_NOT_READ |= {"tkinter", "turtle", "turtledemo"}
# The platform's half of `os` and `os.path`, which are read under those names.
_NOT_READ |= {"genericpath", "nt", "ntpath", "posix", "posixpath"}
# C modules that test the interpreter, and one for Windows installers.
_NOT_READ |= {"xxlimited", "xxlimited_35", "xxsubtype", "msilib"}
# A hundred codecs that say the same, and test suites inside packages.
_NOT_WALKED = ("encodings", "ctypes.test", "ctypes.macholib", "distutils", "unittest.test")
_PROPERTIES = (property, functools.cached_property)


class Entry(NamedTuple):
    """A documented thing: its name, what it is called with, and its raw docstring."""

    doc_id: str
    signature: str
    doc: str


def public_modules() -> Iterator[tuple[str, ModuleType]]:
    """Public modules that this platform can import, in order of name."""
    names = (n for n in sys.stdlib_module_names if not n.startswith("_") and n not in _NOT_READ)
    for name in sorted(names):
        yield from _with_submodules(name)
    yield "os.path", os.path


def _with_submodules(name: str) -> Iterator[tuple[str, ModuleType]]:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return  # Another platform's module (`winreg`), or one this Python was built without.
    yield name, module
    if name in _NOT_WALKED:
        return
    for child in sorted(
        info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))
    ):
        if not child.startswith("_") and f"{name}.{child}" not in _NOT_WALKED:
            yield from _with_submodules(f"{name}.{child}")


def members(name: str, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The classes and functions that a module offers: its `__all__`, or what it defines itself.

    A package also offers what its submodules define and its `__init__` imports: Python 3.11 forgot
    `TaskGroup` in `asyncio.__all__`.
    """
    exported = getattr(module, "__all__", None)
    for attribute, value in _attributes(module, exported or ()):
        if attribute.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        home = getattr(value, "__module__", None) or name
        own = _root(home) == _root(name) or home.startswith("_") or name == "builtins"
        below = home.startswith(f"{name}.")
        if below or (attribute in exported if exported is not None else own):
            yield attribute, value


def _attributes(module: ModuleType, exported: Iterable[str]) -> list[tuple[str, Any]]:
    names = sorted({*vars(module), *exported})
    return [(name, getattr(module, name)) for name in names if hasattr(module, name)]


def canonical_names(modules: dict[str, ModuleType]) -> dict[str, Any]:
    """Each class and function once, by the name under which it is best known."""
    values: dict[int, Any] = {}
    names: dict[int, list[tuple[str, str]]] = {}
    for name, module in modules.items():
        for attribute, value in members(name, module):
            value = inspect.unwrap(value) if inspect.isfunction(value) else value
            values[id(value)] = value
            names.setdefault(id(value), []).append((name, attribute))
    found = {}
    for key, value in values.items():
        module_name, attribute = min(names[key], key=lambda name: _distance(name, value))
        found[attribute if module_name == "builtins" else f"{module_name}.{attribute}"] = value
    return found


def _distance(name: tuple[str, str], value: Any) -> tuple[Any, ...]:
    """How far a name is from the one that users know: smaller is nearer."""
    module, attribute = name
    home = getattr(value, "__module__", None) or module
    above = home == module or home.startswith(f"{module}.")
    return (
        module != "builtins",
        _is_alias(attribute, value),
        not above,
        module.count("."),
        module,
        attribute,
    )


def _is_alias(attribute: str, value: Any) -> bool:
    return bool(getattr(value, "__name__", attribute) != attribute)


def methods(doc_id: str, cls: type, documented: set[int]) -> Iterator[tuple[str, Any]]:
    """Methods and properties of a class and of its bases that are not documented themselves."""
    for base in cls.__mro__:
        if base is not cls and id(base) in documented:
            continue
        for attribute, value in sorted(vars(base).items()):
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            read = inspect.isroutine(value) or isinstance(value, _PROPERTIES)
            if read and not attribute.startswith("_"):
                yield f"{doc_id}.{attribute}", value


def entries() -> Iterator[Entry]:
    """Everything documented, the best-known name of each thing first."""
    modules = dict(public_modules())
    for name, module in modules.items():
        yield Entry(name, "", _docstring(module))
    named = canonical_names(modules)
    for doc_id, value in sorted(named.items()):
        yield Entry(doc_id, _signature(value), _docstring(value))
    classes = [(doc_id, value) for doc_id, value in named.items() if inspect.isclass(value)]
    # `_socket.socket` is public as `socket.SocketType` only: `socket.socket` shows its methods.
    aliases = {doc_id for doc_id, cls in classes if _is_alias(doc_id.rpartition(".")[2], cls)}
    documented = {id(cls) for doc_id, cls in classes if doc_id not in aliases} | {id(object)}
    # A base before its subclasses: what both show belongs to the base.
    classes.sort(key=lambda item: (item[0] in aliases, len(item[1].__mro__), item[0]))
    for doc_id, cls in classes:
        for name, method in methods(doc_id, cls, documented):
            yield Entry(name, _signature(method, bound=True), _docstring(method))


def documents() -> Iterator[dict[str, str]]:
    """Documents in order of `doc_id`, then the language topics in an order of their own."""
    found: dict[str, dict[str, str]] = {}
    told = set()
    for entry in entries():
        text = _clean(entry.doc)
        # `random.randint` is a method of a hidden `random.Random`: one text, one document.
        says = (_root(entry.doc_id), entry.doc_id.rpartition(".")[2], text)
        if not text or _is_generated(entry, text) or entry.doc_id in found or says in told:
            continue
        told.add(says)
        title = entry.doc_id + entry.signature
        found[entry.doc_id] = {"doc_id": entry.doc_id, "title": title, "text": text}
    yield from (found[doc_id] for doc_id in sorted(found))
    yield from topics()


def topics() -> Iterator[dict[str, str]]:
    """The language reference that `help('for')` prints; the heading of each is its title."""
    from pydoc_data.topics import topics as texts

    told = set()
    # Of two names of one text, that which the heading quotes: `if`, not `else`.
    for name in sorted(texts, key=lambda name: (f'"{name}"' not in texts[name][:80], name)):
        lines = _clean(texts[name]).split("\n")
        underlined = len(lines) > 2 and lines[1] and not lines[1].strip("*=-~^")
        title, text = (lines[0], "\n".join(lines[2:])) if underlined else (name, "\n".join(lines))
        if text.strip() and text not in told:
            told.add(text)
            yield {"doc_id": f"topic:{name}", "title": title, "text": text.strip()}


def _root(name: str) -> str:
    return name.partition(".")[0]


def _docstring(value: Any) -> str:
    doc = value.__doc__ if not isinstance(value, functools.cached_property) else value.func.__doc__
    return doc if isinstance(doc, str) else ""


def _clean(doc: str) -> str:
    # A lone surrogate has no UTF-8.
    text = doc.encode("utf-8", "replace").decode("utf-8")
    return inspect.cleandoc(text).strip()


def _is_generated(entry: Entry, text: str) -> bool:
    """What Python writes where nobody did: the call of a named tuple, the word for an Enum."""
    name = re.escape(entry.doc_id.rpartition(".")[2])
    return text == "An enumeration." or re.fullmatch(rf"{name}\(.*\)", text) is not None


def _signature(value: Any, bound: bool = False) -> str:
    """The parameters as they are called, without annotations; nothing where Python knows none."""
    if isinstance(value, _PROPERTIES):
        return ""
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError, AttributeError):
        return ""  # AttributeError: `_curses` has its constants only once there is a screen.
    plain = [
        p.replace(annotation=p.empty, default=_Default(p.default))
        if p.default is not p.empty
        else p.replace(annotation=p.empty)
        for p in signature.parameters.values()
    ]
    if bound and plain and plain[0].name in ("self", "cls"):
        plain = plain[1:]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


class _Default:
    """A default value as it is shown: plain values as they are, anything else as dots.

    `cgi.parse` has the whole environment as a default, `platform.architecture` the path of this
    interpreter: what belongs to a machine is not documentation, and may be a secret.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        value = self._value
        if isinstance(value, str | bytes):
            return "..." if os.path.isabs(value) else repr(value)
        if value is None or isinstance(value, bool | int | float) or value in ((), [], {}):
            return repr(value)
        return "..."


def main() -> None:
    # A module that prints when imported (`readline` does, on some terminals) must not reach a line.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    warnings.simplefilter("ignore")
    with lines:
        for document in documents():
            lines.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
