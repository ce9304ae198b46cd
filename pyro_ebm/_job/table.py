"""Read tables of numbers, and say exactly where one is wrong."""

from __future__ import annotations

import csv
import itertools
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_ebm._job.base import JobError, Table, need

MIN_ROWS = 10  # fewer cannot be split into rows to learn from, to stop by and to judge by


def read_table(
    path: str | None, columns: list[str] | None = None, array: str | None = None
) -> Table:
    """Read a table of numbers.

    Args:
        path: A CSV, NPY or NPZ file; None is the wine data that ships with scikit-learn.
        columns: The columns to take, by name or by number from 1; all if None.
        array: The array to take from an NPZ file that holds several.

    Returns:
        The table, in float64.

    Raises:
        JobError: If it cannot be read, or is no table of finite numbers of ten rows or more.
    """
    if path is None:
        return _check_table(_pick(_wine(), columns))
    readers = {".csv": _read_csv, ".npy": _read_array, ".npz": _read_array}
    file = Path(path)
    reader = readers.get(file.suffix.lower())
    if reader is None:
        known = ", ".join(readers)
        raise JobError(f"{path} must end in one of {known}, got {file.suffix or 'no suffix'!r}")
    if array is not None and file.suffix.lower() != ".npz":
        raise JobError(f"{path} holds one table: --array is for NPZ files")
    try:
        if file.stat().st_size == 0:
            raise JobError(f"{path} is empty")
        table = reader(path, columns) if reader is _read_csv else _read_array(path, columns, array)
    except UnicodeDecodeError:
        raise JobError(f"{path} is no text in UTF-8") from None
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror or error}") from None
    return _check_table(table)


def _wine() -> Table:
    data = need("sklearn.datasets", "the default data, wine,").load_wine()
    return Table(torch.tensor(data.data), list(data.feature_names), "wine")


def _numbered(count: int) -> list[str]:
    return [f"column {i}" for i in range(1, count + 1)]


def _places(names: list[str], columns: list[str] | None, source: str) -> list[int]:
    """Return where the chosen columns stand, by name or by number from 1."""
    if columns is None:
        return list(range(len(names)))
    places = []
    for column in columns:
        number = int(column) if column.isascii() and column.isdigit() else 0
        if column in names:
            places.append(names.index(column))
        elif 1 <= number <= len(names):
            places.append(number - 1)
        else:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise JobError(f"{source} has no column {column!r}; it has {known}")
    if len(set(places)) < len(places):
        raise JobError(f"--columns must name each column once, got {','.join(columns)}")
    return places


def _pick(table: Table, columns: list[str] | None) -> Table:
    places = _places(table.names, columns, table.source)
    return table._replace(values=table.values[:, places], names=[table.names[i] for i in places])


def _check_table(table: Table) -> Table:
    """Refuse what has no density that can be learned."""
    values, names, source = table
    if len(values) < MIN_ROWS:
        rows = "1 row" if len(values) == 1 else f"{len(values)} rows"
        raise JobError(f"{source} has {rows}, at least {MIN_ROWS} are needed")
    low, high = values.min(0).values, values.max(0).values
    for name, least, most in zip(names, low.tolist(), high.tolist(), strict=True):
        if most - least <= 1e-12 * max(abs(least), abs(most)):
            raise JobError(
                f"{source}: {_column(name)} is constant, {least:g} in every row: it has no "
                "density; leave it out with --columns"
            )
        if not math.isfinite(most - least) or max(abs(least), abs(most)) > 1e150:
            raise JobError(
                f"{source}: {_column(name)} reaches {most:g}: measure it in other units"
            )
    return table


def _column(name: str) -> str:
    return name if name.startswith("column ") else f"column {name!r}"


# CSV ------------------------------------------------------------------------------------------


def _read_csv(path: str, columns: list[str] | None) -> Table:
    """Read a CSV file: a line of names or none; commas, semicolons or tabs between cells."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        first = list(itertools.islice((line for line in file if line.strip()), 2))
        file.seek(0)
        separator = max(",;\t", key=lambda mark: min((r.count(mark) for r in first), default=0))
        reader = csv.reader(file, delimiter=separator, skipinitialspace=True)
        try:
            rows = [
                (reader.line_num, [cell.strip() for cell in row])
                for row in reader
                if any(cell.strip() for cell in row)
            ]
        except csv.Error as error:
            raise JobError(f"{path}, row {reader.line_num}: {error}") from None
    if not rows:
        raise JobError(f"{path} is empty")
    names = _header(path, *rows[0])
    if names is not None:
        rows = rows[1:]
    names = names or _numbered(len(rows[0][1]))
    places = _places(names, columns, path)
    for number, row in rows:
        if len(row) != len(names):
            cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
            raise JobError(f"{path}, row {number}: it has {cells}, the first has {len(names)}")
    values = [
        [_number(row[i], f"{path}, row {n}, {_column(names[i])}") for i in places]
        for n, row in rows
    ]
    chosen = [names[i] for i in places]
    return Table(torch.tensor(values, dtype=torch.float64).reshape(-1, len(places)), chosen, path)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # which Python takes for a number


def _header(path: str, number: int, row: list[str]) -> list[str] | None:
    """Return the names in a first row, or None if it holds numbers."""
    row = [row[0].removeprefix("#").strip(), *row[1:]]  # as numpy.savetxt writes it
    given = [cell for cell in row if cell]
    numbers = [cell for cell in given if _is_number(cell)]
    if len(numbers) == len(given):
        return None
    if numbers:
        place, text = next((i, c) for i, c in enumerate(row, 1) if c and not _is_number(c))
        raise JobError(
            f"{path}, row {number}, column {place}: {text!r} is not a number, but "
            f"{numbers[0]!r} is: the first row must hold numbers only, or names only"
        )
    names = [cell or f"column {i}" for i, cell in enumerate(row, 1)]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise JobError(f"{path}, row {number}: two columns are called {name!r}")
    return names


def _number(cell: str, where: str) -> float:
    if not cell:
        raise JobError(f"{where}: the cell is empty")
    if not _is_number(cell):
        raise JobError(f"{where}: {cell!r} is not a number")
    if not math.isfinite(value := float(cell)):
        raise JobError(f"{where}: {cell} is not a finite number")
    return value


# NumPy ----------------------------------------------------------------------------------------


def _read_array(path: str, columns: list[str] | None, name: str | None) -> Table:
    """Read an array of rows and columns from an NPY or NPZ file, without running any code."""
    import numpy as np

    try:
        with open(path, "rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.lib.npyio.NpzFile):
                found = found[_which(path, list(found.files), name)]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = "it holds Python objects" if "pickle" in str(error).lower() else str(error)
        raise JobError(f"{path} is no array of numbers: {reason}") from None
    if found.dtype.kind not in "biuf":
        raise JobError(f"{path} must hold real numbers, got {found.dtype}")
    if found.ndim != 2 or found.shape[1] == 0:
        raise JobError(f"{path} must hold an array of rows and columns, got shape {found.shape}")
    names = _numbered(found.shape[1])
    places = _places(names, columns, path)
    values = torch.from_numpy(found[:, places].astype(np.float64))
    _check_finite(path, values, [names[i] for i in places])
    return Table(values, [names[i] for i in places], path)


def _which(path: str, names: list[str], name: str | None) -> str:
    if name is not None and name not in names:
        raise JobError(f"{path} has no array {name!r}; it has {', '.join(names) or 'none'}")
    if name is None and len(names) != 1:
        listed = f"{len(names)} arrays ({', '.join(names)})" if names else "no array"
        raise JobError(f"{path} holds {listed}: choose one with --array NAME")
    return name or names[0]


def _check_finite(path: str, values: Tensor, names: list[str]) -> None:
    bad: Any = (~values.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        value = values[row, column].item()
        raise JobError(f"{path}, row {row + 1}, {names[column]}: {value:g} is not a finite number")
