"""Text files and tables of one's own, read strictly: what could be misread is refused, by line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from zoo.errors import DataError, nearest

__all__ = ["Row", "ordered_names", "read_table", "read_utf8"]


_SEPARATORS = (";", "\t", "|")
"""What programs write in place of a comma."""


class Row(NamedTuple):
    """A row of a table."""

    line: int
    """Number of the line that it ends on, from 1."""
    values: dict[str, str]
    """Field of each column; empty where the row is too short."""


def read_utf8(path: Path, what: str) -> str:
    """Content of a text file.

    Args:
        path: the file.
        what: what it holds, for messages.

    Raises:
        DataError: it is missing or unreadable, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"No {what} at {path}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"The {what} {path} is not UTF-8, at byte {error.start}.") from None
    except OSError as error:
        raise DataError(f"Cannot read the {what} {path}: {error.strerror or error}.") from None


def read_table(text: str, where: str, columns: Sequence[str]) -> list[Row]:
    """Rows of a CSV file with a header, without the blank ones.

    Args:
        text: content of the file.
        where: what it is, for messages.
        columns: those that it must have.

    Raises:
        DataError: a column is missing or is there twice, a quote is not closed, or a row has more
            fields than the header, as one with a comma that is not quoted.
    """
    reader = csv.reader(io.StringIO(text), strict=True)
    rows, begins = [], 1
    try:
        header = next(reader, [])
        for column in columns:
            if column not in header:
                separated = [sign for sign in _SEPARATORS if len(header) == 1 and sign in header[0]]
                if separated:
                    raise DataError(
                        f"{where} separates its columns by {separated[0]!r}; save it with commas."
                    )
                alike = [name for name in header if name.strip().lower() == column.lower()]
                if alike:
                    raise DataError(
                        f"{where} has no column {column!r}, but {alike[0]!r}: rename it, or name "
                        f"it by an option such as data.user_column."
                    )
                raise DataError(
                    f"{where} has no column {column!r}.{nearest(column, header)}"
                    f" There are: {', '.join(header) or 'none'}."
                )
            if header.count(column) > 1:
                raise DataError(f"{where} has {header.count(column)} columns {column!r}.")
        begins = reader.line_num + 1
        for fields in reader:
            if len(fields) > len(header):
                raise DataError(
                    f"{where}, line {reader.line_num}: more fields than the header; quote what "
                    "holds a comma."
                )
            if fields:
                missing = [""] * (len(header) - len(fields))
                values = dict(zip(header, [*fields, *missing], strict=True))
                rows.append(Row(reader.line_num, values))
            begins = reader.line_num + 1
    except csv.Error as error:
        # A quote that is never closed is only found at the end of the file, far from its row.
        raise DataError(f"{where}, in the row from line {begins} on: {error}.") from None
    return rows


def ordered_names(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct names, by number where all are numbers, alphabetical elsewhere."""
    distinct = set(names)
    if all(name.isdecimal() for name in distinct):
        # '1' and '01' are one number; without the name the order of a set would decide.
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))
