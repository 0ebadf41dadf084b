"""The files of clusters/, read as their users read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CLUSTERS = Path(__file__).parents[2] / "clusters"


def manifest(name: str) -> dict[str, Any]:
    [document] = manifests(name)
    return document


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTERS / name).read_text(encoding="utf-8")))
