"""Code of yours that a config names: `path/to/file.py:NAME`, or `package.module:NAME` of what is installed.

A file is for what fits into one; every node needs it at the same path, and it can't import its neighbours. What it
defines is imported once a process. Only the config that a command was given is followed: what a run left in its
storage names code too, and nothing imports that.
"""

from __future__ import annotations

import ast
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from hashlib import sha256
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from elastictrain.errors import ConfigError, ElasticTrainError, UserCodeError

NAMES_SHOWN = 8
"""Of a file, where none is near."""


def check_named(field: str, named: str | None) -> None:
    """Raise ConfigError when there is no such file or package, or surely no such name in the file.

    Nothing of it is run, unless it is in a package.
    """
    if named is None:
        return
    _find(field, named)
    where, _, name = named.partition(":")
    if where.endswith(".py"):
        _check_defined(field, named, Path(where).expanduser(), name)


def _find(field: str, named: str) -> None:
    where, _, _ = named.partition(":")
    if where.endswith(".py"):
        if not Path(where).expanduser().is_file():
            raise ConfigError(f"{field} {named}: there is no file {where}. Give its path, the same on every node.")
    elif find_spec(where.partition(".")[0]) is None:
        raise ConfigError(
            f"{field} {named}: no package {where.partition('.')[0]} is installed here. Install it on every node, or "
            "name a file: path/to/file.py:NAME."
        )


def _check_defined(field: str, named: str, path: Path, name: str) -> None:
    try:
        names = _names(ast.parse(path.read_bytes(), str(path)))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{field} {named}: {path.name} can't be read as Python: {error}. Mend it.") from None
    if names is not None and name not in names and not name.startswith("__"):
        public = [known for known in names if not known.startswith("_")]
        has = ", ".join(get_close_matches(name, public) or public[:NAMES_SHOWN]) or "nothing"
        raise ConfigError(f"{field} {named}: {path.name} has nothing named {name}: it has {has}.")


def _names(module: ast.Module) -> dict[str, None] | None:
    """What a module binds, in its order, without running it; None where only that would tell."""
    bound: dict[str, None] = {}
    for node in ast.walk(module):
        match node:
            case ast.FunctionDef(name="__getattr__"):
                return None
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                bound[name] = None
            case ast.Name(id=name, ctx=ast.Store()):
                bound[name] = None
            case ast.alias(name="*") | ast.Global() | ast.Call(func=ast.Name(id="globals" | "setattr" | "exec")):
                return None
            case ast.alias(name=name, asname=asname):
                bound[asname or name.partition(".")[0]] = None
    return bound


def absolute(named: str | None) -> str | None:
    """The same code by an absolute path, where it is in a file."""
    if named is None or not named.partition(":")[0].endswith(".py"):
        return named
    where, _, name = named.partition(":")
    return f"{Path(where).expanduser().resolve()}:{name}"


def load_named(field: str, named: str) -> Callable[..., Any]:
    """What the config's `field` names.

    Raises ConfigError where it is not there or can't be called, UserCodeError with the traceback of what it raises.
    """
    _find(field, named)
    where, _, name = named.partition(":")
    with theirs(f"{field} {named}: {where} can't be imported"):
        module = _file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    found = getattr(module, name, None)
    if not callable(found):
        what = "nothing" if found is None else f"a {type(found).__name__}, which can't be called,"
        raise ConfigError(f"{field} {named}: {where} has {what} named {name}. Name a class or a function of it.")
    called: Callable[..., Any] = found
    return called


@contextmanager
def theirs(message: str) -> Iterator[None]:
    """What is done here is the user's code: what it raises becomes a UserCodeError, its traceback before `message`."""
    try:
        yield
    except ElasticTrainError:
        raise
    except Exception:  # noqa: BLE001 - it may raise anything
        raise UserCodeError(f"{traceback.format_exc().rstrip()}\n\n{message}") from None


def _file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    name = f"elastictrain_named_{sha256(str(path).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        sys.modules[name] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
