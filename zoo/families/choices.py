"""Checks of closed choices, for the configurations of all families."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

__all__ = ["check_choice", "check_choices"]


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Check that a value is one of a `Literal`.

    Args:
        name: what it is, for messages.
        value: what was given.
        choices: the `Literal`.

    Raises:
        ValueError: it is none of them.
    """
    if value not in get_args(choices):
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}"
        )


def check_choices(config: Any) -> None:
    """Check all fields of a configuration, a dataclass, whose type is a `Literal`.

    Raises:
        ValueError: the value of one is none of its choices.
    """
    for name, annotation in get_type_hints(type(config)).items():
        if get_origin(annotation) is Literal:
            check_choice(name, getattr(config, name), annotation)
