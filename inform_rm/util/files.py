"""Writing results so that a kill leaves the last good file, and naming the software that made them."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inform_rm.errors import InputError

_REPORTED_PACKAGES = ("inform-rm", "torch", "transformers", "accelerate", "datasets", "peft", "numpy", "scikit-learn")


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file under a temporary name in the same folder, flush it to disk, then rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` for UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused, because JSON has no such numbers."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that takes the place of `path` only when the block ends without an error.

    An existing folder at `path` is moved aside first and removed last, so that at every moment one complete folder
    exists. After an error the temporary folder is removed and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            previous = temporary.with_suffix(".old")
            os.replace(path, previous)
            os.replace(temporary, path)
            shutil.rmtree(previous)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def open_to_readers(folder: Path) -> None:
    """Give weights the permissions of any other new file: safetensors 0.8 lets nobody but their owner read them."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # a file system without them
            path.chmod(0o666 & ~mask)


def check_output_directory(path: str | Path) -> Path:
    """Create the folder; raise `InputError` where it cannot be written, before hours of work rather than after."""
    path = Path(path)
    if path.is_file():
        raise InputError(f"output: {path} is a file; expected a folder. Name another folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"output: cannot write to {path} ({error.strerror}). Choose a folder that you may write to."
        ) from error
    return path


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in _REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = package_version(package)
    return found


@functools.cache
def package_version(package: str) -> str:
    """`importlib.metadata.version`, which parses the package's whole description each time."""
    return importlib.metadata.version(package)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
