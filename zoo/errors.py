"""The errors a user can cause: each one clear line that says what was given and what is allowed.

The command line prints the line and leaves with status 2; Python users catch `ZooError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """Base of all errors that bad input causes; its text is one line that says what to do."""

    def __str__(self) -> str:
        # Defined here because KeyError, a base of `UnknownNameError`, shows the repr of its text.
        return " ".join(str(argument) for argument in self.args)


class UnknownNameError(ZooError, KeyError):
    """A name that is not in the registry, or one that fits several entries."""


class ConfigError(ZooError, ValueError):
    """A configuration value with an unknown key, a wrong type, or out of range."""


class CheckpointError(ZooError):
    """A checkpoint folder that is missing, damaged, unsafe or not understood."""


class SolverError(ZooError, ArithmeticError):
    """An integration in time that cannot be carried to its end."""


class DataError(ZooError):
    """A data set or a user's file that is missing, damaged or too small."""


def nearest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """Suggest the choices most like `name`, for the end of an error message.

    Args:
        name: What the user gave.
        choices: All that is allowed.
        n: Largest number of suggestions.

    Returns:
        `" Did you mean 'a' or 'b'?"` with a leading space, or `""` when nothing is near.
    """
    by_folded_name = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), by_folded_name, n=n)
    # The ratio of difflib is blind to a forgotten tail ("cached" for "cached-transformer-lm").
    found += [key for key in sorted(by_folded_name) if name and key.startswith(name.lower())]
    suggestions = [repr(by_folded_name[key]) for key in dict.fromkeys(found)][:n]
    if not suggestions:
        return ""
    return f" Did you mean {' or '.join(suggestions)}?"
