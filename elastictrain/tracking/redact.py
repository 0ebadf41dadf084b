"""Secrets out of whatever is told of a run: `s3://key:secret@bucket` becomes `s3://***@bucket`.

Three ways to know one: by its place (the user part and secret parameters of a URI, `Bearer ...`), by its name
(`password=...`, `"token": "..."`), and by its value, where the process itself was given it in the environment or in a
URI of the config (`secret_values`). The driver redacts every event before the journal, the terminal or MLflow gets
it, so that no reader has to. What a program of the user's prints of its own accord is not seen here. Cost:
microseconds a text; an event of a step has none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar
from urllib.parse import unquote

from elastictrain.events import StepCommitted

T = TypeVar("T")

HIDDEN = "***"
_NAME = r"(?:token|secret|password|passwd|passphrase|credentials?|(?:api|access|account|private|secret)[_-]?key)"
_SECRET_NAME = re.compile(rf"(?i)(?:.*[^a-z0-9])?[a-z0-9]*{_NAME}")
_USERINFO = re.compile(r"(?<=://)[^/?#\s'\"]+(?=@)")
_PARAMETER = re.compile(r"(?i)([?&][^=&\s]*(?:token|secret|password|credential|sig|key)[^=&\s]*=)[^&\s'\"]+")
_ASSIGNED = re.compile(rf"(?i)({_NAME}=)(\"[^\"]*\"|'[^']*'|[^\s'\"&,;)\]}}]+)")
_QUOTED = re.compile(rf"(?i)((['\"])[\w.-]*{_NAME}\2\s*:\s*)(\"[^\"]*\"|'[^']*')")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[a-z0-9._~+/=-]{16,}")
_MIN_VALUE_LENGTH = 8
"""Shorter values are not looked for: they would be found in innocent text."""


def redact(text: str, values: Collection[str] = ()) -> str:
    """The text with every secret in it replaced by ***; `values` are secrets themselves."""
    for value in values:
        text = text.replace(value, HIDDEN)
    if "://" in text:
        text = _PARAMETER.sub(rf"\1{HIDDEN}", _USERINFO.sub(HIDDEN, text))
    text = _ASSIGNED.sub(rf"\1{HIDDEN}", text)
    return _BEARER.sub(rf"\1 {HIDDEN}", _QUOTED.sub(rf"\1\2{HIDDEN}\2", text))


def redact_all(value: Any, values: Collection[str] = ()) -> Any:
    """Plain data with every string in it redacted, and what goes by a secret's name hidden whole."""
    if isinstance(value, str):
        return redact(value, values)
    if isinstance(value, dict):
        return {k: HIDDEN if v and _is_secret(k, v) else redact_all(v, values) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_all(v, values) for v in value)
    return value


def redact_event(event: T, values: Collection[str] = ()) -> T:
    """The event with every text in it redacted; the same object where there is nothing to hide."""
    if isinstance(event, StepCommitted) or not is_dataclass(event) or isinstance(event, type):
        return event
    changes = {}
    for field in fields(event):
        old = getattr(event, field.name)
        if isinstance(old, str | dict | list) or (isinstance(old, tuple) and not any(map(is_dataclass, old))):
            new = redact_all(old, values)
        elif isinstance(old, tuple):
            new = tuple(redact_event(part, values) for part in old)
        else:
            new = redact_event(old, values)
        if new != old:
            changes[field.name] = new
    return replace(event, **changes) if changes else event


def redact_command(arguments: Sequence[str]) -> str:
    """A command line as one text, with what follows `--password` and the like hidden too."""
    shown, hide = [], False
    for argument in arguments:
        shown.append(HIDDEN if hide else redact(argument))
        hide = not hide and argument.startswith("-") and _SECRET_NAME.fullmatch(argument) is not None
    return " ".join(shown)


def secret_values(environment: Mapping[str, str], *uris: str | None) -> tuple[str, ...]:
    """The secrets that this process was given: variables with a secret's name, and passwords inside URIs."""
    found = {value for name, value in environment.items() if _SECRET_NAME.fullmatch(name)}
    for uri in uris:
        found.update(_passwords(uri or ""))
    return tuple(sorted((v for v in found if len(v) >= _MIN_VALUE_LENGTH), key=len, reverse=True))


def _passwords(uri: str) -> Iterator[str]:
    for user in _USERINFO.findall(uri):
        password = user.partition(":")[2]
        yield from (password, unquote(password))


def _is_secret(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, str) and _SECRET_NAME.fullmatch(name) is not None
