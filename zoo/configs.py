"""Between plain JSON and frozen dataclasses: every key, type and range is checked on the way in.

A configuration file is untrusted. It can choose values of the fields a dataclass declares and
nothing else: no class paths, no module names, no further keys.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast

from zoo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

_PLAIN_TYPES = (bool, int, float, str, type(None))
_OMIT = "zoo.omit_default"


def omit_default(default: Any) -> Any:
    """A dataclass field that `to_json` leaves out where it has its default.

    For fields that came later than files in use, whose bytes are under a checksum.
    """
    return dataclasses.field(default=default, metadata={_OMIT: True})


def _omitted(field: dataclasses.Field[Any]) -> bool:
    """Whether the field is left out where it has its default."""
    return bool(field.metadata.get(_OMIT))


def build(cls: type[T], values: object, where: str) -> T:
    """Build a dataclass from plain JSON.

    Fields may be of type `bool`, `int`, `float`, `str`, `None`, `Literal[...]`, `tuple[...]`,
    `dict[str, ...]`, `Any`, another dataclass, or a union of these.

    Args:
        cls: The dataclass; nested dataclasses are built from nested mappings.
        values: A mapping from field name to plain JSON value; lists become tuples.
        where: What the values were read from; opens every error message.

    Returns:
        The dataclass, with every field of its declared type.

    Raises:
        ConfigError: For an unknown or missing key, a value of the wrong type (a bool is not an
            int; an int is a float), or a `ValueError` raised by the class's `__post_init__`.
    """
    return cast(T, _build(cls, values, where, ()))


def to_json(config: DataclassInstance) -> dict[str, Any]:
    """Turn a dataclass into plain JSON, the inverse of `build`.

    Args:
        config: The dataclass; tuples become lists and nested dataclasses become mappings.

    Returns:
        A mapping from field name to plain JSON value, in the order of the fields; without those
        of `omit_default` that have their default.
    """
    return {
        field.name: _plain(value)
        for field in dataclasses.fields(config)
        if field.init
        and ((value := getattr(config, field.name)) != field.default or not _omitted(field))
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _error(where: str, path: tuple[str, ...], message: str) -> ConfigError:
    return ConfigError(": ".join(filter(None, [where, ".".join(path), message])))


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _required(cls: type) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]


def _build(cls: type, values: object, where: str, path: tuple[str, ...]) -> Any:
    if not isinstance(values, Mapping):
        raise _error(where, path, f"expected a mapping of options, got {_shown(values)}")
    field_types = _field_types(cls)
    for key in values:
        if key not in field_types:
            allowed = ", ".join(field_types) or "none"
            hint = nearest(str(key), field_types) or f" Allowed: {allowed}."
            raise _error(where, path, f"unknown key {key!r}.{hint}")
    missing = [repr(name) for name in _required(cls) if name not in values]
    if missing:
        raise _error(where, path, f"missing key {', '.join(missing)}")
    converted = {
        name: _convert(values[name], annotation, where, (*path, name))
        for name, annotation in field_types.items()
        if name in values
    }
    try:
        return cls(**converted)
    except ConfigError:
        raise
    except ValueError as error:
        raise _error(where, path, str(error)) from error


def _convert(value: Any, annotation: Any, where: str, path: tuple[str, ...]) -> Any:
    """Check one value against one annotation and bring it to that type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, object):
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where, path)
    if origin is Literal:
        # `1 == True`, so equality alone would let a bool stand for a number.
        for choice in arguments:
            if value == choice and type(value) is type(choice):
                return choice
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return _convert_tuple(value, arguments, where, path)
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {
                key: _convert(item, arguments[1], where, (*path, key))
                for key, item in value.items()
            }
    elif dataclasses.is_dataclass(annotation):
        return value if isinstance(value, annotation) else _build(annotation, value, where, path)  # type: ignore[arg-type]
    elif annotation is float:
        # An int is a float, except one too large for it; infinity and NaN are not JSON.
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
    elif annotation in (None, type(None)):
        if value is None:
            return None
    elif annotation in _PLAIN_TYPES:
        if type(value) is annotation:
            return value
    else:
        raise TypeError(f"{'.'.join(path)}: configurations cannot hold {annotation!r}")
    expected = _described(annotation)
    hint = nearest(value, filter(_is_text, arguments)) if isinstance(value, str) else ""
    raise _error(where, path, f"expected {expected}, got {_shown(value)}.{hint}")


def _convert_union(value: Any, members: tuple[Any, ...], where: str, path: tuple[str, ...]) -> Any:
    for member in members:
        try:
            return _convert(value, member, where, path)
        except ConfigError:
            continue
    # Where the value can have been meant for one member only, that one's message says most.
    meant = [
        member
        for member in members
        if member is not type(None)
        and isinstance(value, Mapping) == dataclasses.is_dataclass(member)
    ]
    if len(meant) == 1:
        return _convert(value, meant[0], where, path)
    expected = " or ".join(_described(member) for member in members)
    raise _error(where, path, f"expected {expected}, got {_shown(value)}")


def _convert_tuple(
    value: list[Any] | tuple[Any, ...],
    arguments: tuple[Any, ...],
    where: str,
    path: tuple[str, ...],
) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    elif len(value) != len(arguments):
        raise _error(where, path, f"expected {len(arguments)} values, got {len(value)}")
    return tuple(
        _convert(item, annotation, where, (*path, str(index)))
        for index, (item, annotation) in enumerate(zip(value, arguments, strict=True))
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _described(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        choices = [repr(choice) for choice in typing.get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if annotation in (None, type(None)):
        return "null"
    if annotation is float:
        return "a finite number"
    return {tuple: "a list", dict: "a mapping", Mapping: "a mapping"}.get(
        typing.get_origin(annotation) or annotation, getattr(annotation, "__name__", "a value")
    )


def _shown(value: object) -> str:
    text = repr(value)
    if len(text) > 60:
        text = f"{text[:57]}..."
    return f"{text} ({type(value).__name__})"
