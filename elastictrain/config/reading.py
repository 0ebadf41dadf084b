"""From YAML and dotted overrides to plain data; and what is wrong with it: the value, the field, the way out."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from elastictrain.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Refuses a field that is there twice: YAML would take the last, and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def read_yaml(path: Path, kind: str = "config file") -> dict[str, Any]:
    """The sections in a YAML file, called by its `kind` in errors; raises ConfigError."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"there is no {kind} {path}.{hint}") from None
    except OSError as error:
        raise ConfigError(f"can't read the {kind} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if data is None:
        raise ConfigError(f"{path} is empty: write sections such as `train:` in it, as jobs/llm_tiny.yaml has them")
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, not sections such as `train:`")
    return data


def apply_override(model: type[BaseModel], data: dict[str, Any], override: str) -> None:
    """Put `section.field=value` into plain data for a model; raises ConfigError when it is none."""
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", key):
        raise ConfigError(f"{override!r} is no override: write section.field=value, such as train.steps=50")
    if text.startswith("@"):
        source = Path(text[1:])
        try:
            value = yaml.safe_load(source.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{override}: can't read {source}: {error}") from None
    else:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override}: the value is not valid YAML: {error}") from None
        value = as_field_value(model, key, value)
    set_field(data, key, value, override)


def set_field(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put the value of a field (`section.field`) into plain data; `where` names its origin in errors."""
    *parents, last = key.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{where}: {parent} is not a section")
        data = child
    data[last] = value


def as_field_value(model: type[BaseModel], key: str, value: Any) -> Any:
    """A value from YAML as it is meant for this field: YAML 1.1 reads 1e-3 as text."""
    return _number(value) if isinstance(value, str) and not _takes_text(model, key) else value


def _takes_text(model: Any, key: str) -> bool:
    for name in key.split("."):
        field = getattr(model, "model_fields", {}).get(name)
        model = field.annotation if field else None
    return model is str or str in get_args(model)


def _number(text: str) -> str | float:
    return float(text) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", text) else text


def refuse_unknown(whole: type[BaseModel], data: Any, where: str) -> None:
    """Raise ConfigError for a key that the model does not have, with the nearest that it has."""
    _refuse_unknown(whole, data, "", where, _known_keys(whole))


def _refuse_unknown(model: type[BaseModel], data: Any, prefix: str, where: str, known: list[str]) -> None:
    if not isinstance(data, dict):
        return
    for key, value in data.items():
        if key not in model.model_fields:
            names = [prefix + k for k in model.model_fields]
            near = difflib.get_close_matches(f"{prefix}{key}", [*names, *known], n=1, cutoff=0.5)
            near = near or [k for k in known if k.endswith(f".{key}")][:1]
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}: {hint}")
        annotation = model.model_fields[key].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            _refuse_unknown(annotation, value, f"{prefix}{key}.", where, known)
        elif isinstance(value, list):
            for item in get_args(annotation):
                if isinstance(item, type) and issubclass(item, BaseModel):
                    for i, entry in enumerate(value):
                        _refuse_unknown(item, entry, f"{prefix}{key}.{i}.", where, known)


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += _known_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


_WORDS = {
    "missing": "is missing",
    "tuple_type": "must be a list",
    "model_type": "must be a section of fields, such as {example}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must match {pattern}",
    "string_type": "must be text",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
}
"""Pydantic's types of errors, in the words of this project."""


def explain(error: ValidationError, where: str) -> str:
    """What is wrong, field by field, with the values."""
    lines: list[str] = []
    for e in error.errors():
        if not e["loc"] or e["type"] == "value_error":
            lines.append(e["msg"].removeprefix("Value error, "))
            continue
        field = ".".join(map(str, e["loc"]))
        example = "{at: 50, rank: 1, kind: kill}" if e["loc"][0] == "faults" else "{field: value}"
        words = _WORDS.get(e["type"], e["msg"]).format(example=example, **e.get("ctx", {}))
        lines.append(f"{field} {words}" if e["type"] == "missing" else f"{field} = {e['input']!r}: {words}")
    return f"{where}: " + "; ".join(lines)
