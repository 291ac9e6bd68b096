"""A folder to put finished files into: on this machine, or behind any fsspec URL (s3://…, gs://…, memory://…)."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec

from pipeline.console import InputError
from pipeline.faults import driving
from pipeline.seals import open_json, sealed_json, write_sealed_json


class Store:
    """Files by name in one folder. A name that exists is a whole file: local ones are renamed, objects are put whole.

    Raises InputError for a URL that fsspec does not know or has no driver for.
    """

    def __init__(self, place: str | os.PathLike):
        self.url = os.fspath(place).removeprefix("file://")
        self.local = None if "://" in self.url else Path(self.url)
        if self.local is None:
            try:
                self._fs, self._root = fsspec.core.url_to_fs(self.url)
            except (ValueError, ImportError, OSError) as error:
                told = str(error).partition("\n")[0]
                cure = "install it with pip" if isinstance(error, ImportError) else "give a folder, or a URL such as s3://…"
                raise InputError(f"{self.url}: {told}: {cure}") from None

    def __str__(self) -> str:
        return self.url

    def __reduce__(self):
        return Store, (self.url,)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def under(self, name: str) -> "Store":
        """A folder in this one."""
        return Store(f"{self.url.rstrip('/')}/{name}")

    def exists(self, name: str) -> bool:
        if self.local:
            return (self.local / name).exists()
        with driving():
            return self._fs.exists(self._path(name))

    def names(self) -> set[str]:
        """What the folder holds; nothing where it is not there."""
        if self.local:
            return {path.name for path in self.local.iterdir()} if self.local.is_dir() else set()
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError), driving():
            return {entry.rstrip("/").rpartition("/")[2] for entry in self._fs.ls(self._root, detail=False)}
        return set()

    def read(self, name: str) -> bytes:
        if self.local:
            return (self.local / name).read_bytes()
        with driving():
            return self._fs.cat_file(self._path(name))

    def read_json(self, name: str) -> dict[str, Any]:
        """Raises InputError for a damaged file."""
        try:
            return open_json(self.read(name))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self}/{name} is damaged ({error}): delete it and run the download again, or choose another "
                             "folder") from None

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        if self.local:
            write_sealed_json(self.local / name, value)
            return
        with driving():
            self._fs.pipe_file(self._path(name), sealed_json(value, indent=2, ensure_ascii=False))

    def take(self, path: Path) -> None:
        """Move a finished file of this machine here, under its own name."""
        if self.local:
            path.replace(self.local / path.name)
            return
        with driving():
            self._fs.put_file(str(path), self._path(path.name))
        path.unlink()

    def remove(self, name: str) -> None:
        """Nothing happens where it is not there."""
        if self.local:
            (self.local / name).unlink(missing_ok=True)
            return
        with suppress(FileNotFoundError), driving():
            self._fs.rm_file(self._path(name))
