"""Finished files: written under a temporary name, then renamed, so that a name that exists is a whole file; locked folders."""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.console import err

# What a killed command may leave half written; others may be at work on other names, on other machines too.
_HALVES = (".index.arrow.*.tmp", ".manifest.json.*.tmp", ".quarantine.jsonl.*.tmp", ".forgotten.parquet.*.tmp",
           ".scans/.*.arrow.*.tmp", ".scans/.*.npy.*.tmp")
_HASHED = 6 * 3600.0  # seconds: `duplicates` writes .npy files, on another machine perhaps, and nobody waits for it
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, a full or broken disk is one that names the file. The system does not, where the file is open already."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK:
            error.filename = error.filename or str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes `path`'s name when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def homes(folder: Path) -> set[Path]:
    """A folder, and those in which its tars really are where it holds links to them."""
    return {folder, *(path.resolve().parent for path in folder.rglob("*.tar") if path.exists())}


@contextmanager
def alone(folders: Iterable[Path]) -> Iterator[None]:
    """Wait until no other command changes indexes or tars of these folders; where a file system has no locks nobody waits."""
    with ExitStack() as stack:
        for folder in sorted({folder.resolve() for folder in folders}):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                err.print(f"waiting: another command is at work in {folder}", highlight=False)
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:
                continue
            _sweep(folder)
        yield


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half written."""
    for path in (path for pattern in _HALVES for path in folder.glob(pattern)):
        try:
            if ".npy." in path.name and time.time() - path.stat().st_mtime < _HASHED:
                continue
            os.kill(int(path.name.split(".")[-2]), 0)
        except ProcessLookupError:
            with suppress(OSError):  # in a folder that is not ours
                path.unlink()
        except (ValueError, OSError):
            pass  # not ours, or its process lives
