"""Secrets out of URIs, wherever they are shown: `s3://key:secret@bucket` becomes `s3://***@bucket`."""

from __future__ import annotations

import re
from typing import Any

_USERINFO = re.compile(r"(?<=://)[^/?#\s'\"]+(?=@)")
_SECRET_PARAMETER = re.compile(r"(?i)([?&][^=&\s]*(?:token|secret|password|credential|sig)[^=&\s]*=)[^&\s'\"]+")


def redact(text: str) -> str:
    """The text with user names, passwords and secret query parameters of all URIs in it replaced by ***."""
    if "://" not in text:
        return text
    return _SECRET_PARAMETER.sub(r"\1***", _USERINFO.sub("***", text))


def redact_all(value: Any) -> Any:
    """Plain data with every string in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {k: redact_all(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(v) for v in value]
    return value
