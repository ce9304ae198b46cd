"""Files that are whole or not there: written aside, flushed, renamed; checked when read."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "load", "save", "write_whole"]

_MAGIC = b"pyro_ebm checkpoint 1\n"


class CheckpointError(ValueError):
    """A file is no checkpoint, is damaged, or belongs to another run."""


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file so that at any moment the old or the new one is there, whole.

    Args:
        path: Where the file shall be; its folder is made.
        write: Writes the file at the path that it is given, beside ``path``.

    Raises:
        OSError: If it cannot be written; an older file is unharmed.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_whole(path, lambda part: part.write_text("whole"))
        >>> path.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and strings, in nested dictionaries and lists, with their SHA-256.

    Args:
        path: The file, which is replaced as a whole.
        state: What to keep.

    Raises:
        OSError: If the file cannot be written; an older one is unharmed.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.ckpt"
        >>> save(path, {"x": torch.ones(2), "count": 3})
        >>> load(path)["count"]
        3
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest().encode()
    write_whole(Path(path), lambda part: part.write_bytes(_MAGIC + digest + b"\n" + data))


def load(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save` wrote, if it is whole; nothing in it is run as code.

    Args:
        path: The file.

    Returns:
        The state.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is no checkpoint or is damaged.

    Example:
        >>> load("missing.ckpt")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'missing.ckpt'
    """
    data = Path(path).read_bytes()
    head = len(_MAGIC) + 65
    if not data.startswith(_MAGIC):
        raise CheckpointError(f"{path} must be a checkpoint of pyro_ebm, got another file")
    if hashlib.sha256(data[head:]).hexdigest().encode() != data[len(_MAGIC) : head - 1]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one written in it")
    try:
        return torch.load(io.BytesIO(data[head:]), weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
