"""JSON that every parser reads and that loses no float.

Finite floats are written with `repr`, so they come back bit for bit. JSON has no NaN and no infinity: they become the
strings "NaN", "Infinity" and "-Infinity", which `float()` reads. A loss that blew up must not blow up its report.
"""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """The value as strict JSON; keys keep their order."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent)
    except ValueError:
        return json.dumps(_spelled(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _spelled(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
