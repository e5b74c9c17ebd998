"""Nested frozen dataclasses from text and JSON, strictly: every unknown name and wrong type is a `UserError`."""

import dataclasses
import difflib
import json
import reprlib
import types
import typing
from typing import Any, Literal

from jaxcap.errors import UserError


def assign(root: Any, key: str, text: str) -> Any:
    """`root` with the setting of the dotted `key` read from `text`; tuple items are reached by index (`phases.0.steps`).

    Raises `UserError` on an unknown key (naming the nearest valid one) or a value of the wrong type.
    """
    return _replace(root, key.split("."), text, key, list(flat(root)))


def to_dict(root: Any) -> dict:
    """Plain JSON types (tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(root)))


def flat(root: Any) -> dict:
    """Every setting by its dotted key."""
    return _flat(to_dict(root))


def _replace(node, path: list[str], text: str, key: str, known: list[str]):
    head, rest = path[0], path[1:]
    if isinstance(node, tuple) and node and dataclasses.is_dataclass(node[0]):
        if not head.isdigit() or int(head) >= len(node):
            raise UserError(f"{key!r}: {head!r} must be an index below {len(node)}")
        items = list(node)
        if not rest:
            raise UserError(f"{key!r} is a group of settings, not one setting")
        items[int(head)] = _replace(items[int(head)], rest, text, key, known)
        return tuple(items)
    names = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
    if head not in names:
        raise UserError(f"there is no setting {key!r}{_nearest(key, known)}")
    value = getattr(node, head)
    if rest:
        return dataclasses.replace(node, **{head: _replace(value, rest, text, key, known)})
    kind = typing.get_type_hints(type(node))[head]
    if dataclasses.is_dataclass(kind) or (isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])):
        raise UserError(f"{key!r} is a group of settings, not one setting{_nearest(key, known)}")
    return dataclasses.replace(node, **{head: _parse(kind, text, key)})


def _parse(kind, text: str, key: str):
    """A value of type `kind` from the text of a command line."""
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_parse(item, part.strip(), key) for part in text.strip("()[]").split(",") if part.strip())
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"{key} must be true or false, not {text!r}")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"{key} must be {_describe(kind)}, not {text!r}") from None
    return _typed(kind, text, key)


def _typed(kind, value, key: str):
    """`value` if it is of type `kind`, else `UserError`. Lists become tuples, whole numbers floats where asked."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"{key} must be one of {', '.join(map(str, choices))}, not {value!r}"
                            f"{_nearest(str(value), [str(c) for c in choices])}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            hint = "; a tuple of one needs a comma, as in (Phase(),)" if dataclasses.is_dataclass(value) else ""
            raise UserError(f"{key} must be a list, not {reprlib.repr(value)}{hint}")
        item = typing.get_args(kind)[0]
        return tuple(_typed(item, v, f"{key}.{i}") for i, v in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return build(kind, value, key + ".")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, types.UnionType):
        raise TypeError(f"{key}: config fields are not unions")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{key} must be {_describe(kind)}, not {value!r}")
    return value


def build(kind: type, values: Any, prefix: str = "") -> Any:
    """The dataclass `kind` from plain JSON types, or one of itself, as strict as `assign`. Missing settings take their default."""
    if isinstance(values, kind):  # Python took its fields as they came
        values = {f.name: getattr(values, f.name) for f in dataclasses.fields(kind)}
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.') or 'config'} must be a group of settings, not {reprlib.repr(values)}")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise UserError(f"there is no setting {prefix + name!r}{_nearest(prefix + name, [prefix + h for h in hints])}")
    return kind(**{name: _typed(hints[name], value, prefix + name) for name, value in values.items()})


def _flat(node, prefix: str = "") -> dict:
    if isinstance(node, dict):
        return {k: v for name, item in node.items() for k, v in _flat(item, f"{prefix}{name}.").items()}
    if isinstance(node, list) and node and isinstance(node[0], dict):
        return {k: v for i, item in enumerate(node) for k, v in _flat(item, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): node}


def _nearest(name: str, choices: typing.Sequence[str]) -> str:
    found = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if not found:  # a bare leaf, as in "learning_rate"
        leaves = [c for c in choices if c.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
        found = leaves[:1]
    return f"; did you mean {found[0]!r}?" if found else ""


def _describe(kind) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, str(kind))
