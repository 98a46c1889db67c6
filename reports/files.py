"""Files that are whole or absent: written beside their place, then moved into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from traces.errors import InputError


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let *write* fill a file beside *path*, which then takes its place."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file to write")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("xb") as file:
            write(file)
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        _remove(unfinished)


def write_folder(directory: Path, files: Mapping[str, bytes]) -> None:
    """Put *files* (path inside *directory* -> content) there once all of them are on the disk.

    The folder is made if it is absent; other files in it are left alone. The files move in one
    after the other in the order given, so name the one that refers to the others last.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = directory / f".unfinished.{os.getpid()}"
        unfinished.mkdir()
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from None
    try:
        for name, content in files.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).write_bytes(content)
        for name in files:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished / name, directory / name)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_writable(folder: Path, asked: str) -> None:
    """Raise :class:`InputError` naming *asked* unless files can be made in *folder*.

    A folder that does not exist yet is judged by the nearest one above it that does.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{asked}: cannot be written: {place} is a file, expected a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{asked}: cannot be written: {place} is not writable")


def _remove(path: Path) -> None:
    """Take away what a failed write left; a folder that is none has nothing left in it."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
