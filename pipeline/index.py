"""index.arrow + manifest.json, read: memory-mapped, opened lazily, looked up through cached views of its columns."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from pipeline.arrows import ArrowFile
from pipeline.console import InputError
from pipeline.schema import INDEX, INDEX_BATCH_ROWS, SCHEMA_VERSION
from pipeline.seals import UNREADABLE, open_json

INDEX_NAME, MANIFEST_NAME = "index.arrow", "manifest.json"
PREVIOUS_NAME = ".manifest.json"  # the manifest of the index before, while the new one has none
_COLUMNS = {"shard": np.int32, "offset": np.int64, "size": np.int64, "width": np.int32, "height": np.int32,
            "plain": np.bool_, "sample_id": np.int64, "group": np.int64, "source": np.int16, "image_sum": np.int64}


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest beside an index, or that of the index before where a run was killed; empty where none can be read."""
    for name in (MANIFEST_NAME, PREVIOUS_NAME, MANIFEST_NAME):  # again: it may just have taken the other's place
        try:
            return open_json((folder / name).read_bytes())
        except (OSError, ValueError):
            continue
    return {}


class _Batch:
    """Zero-copy numpy views of one record batch; `take` and `to_pylist` would cost a hundred times as much.

    Numbers are checked at once, texts, which are most of the bytes, when they are first asked for.
    """

    def __init__(self, file: ArrowFile, number: int):
        self._file, self._batch = file, file.peek(number) if file.sealed else file.batch(number)
        has = [name for name in _COLUMNS if name in self._batch.schema.names]
        for name in has:
            file.check_buffers(self._batch.column(INDEX.get_field_index(name)))
        unknown = np.broadcast_to(np.int64(0), self._batch.num_rows)  # of a column that older versions did not write
        self.numbers = {name: _numbers(self._batch, name, dtype) if name in has else unknown
                        for name, dtype in _COLUMNS.items() if name != "plain"}
        self.plain = np.frombuffer(_buffers(self._batch, "plain")[1], np.uint8)  # bits, lowest first

    def _text_buffers(self, name: str) -> list:
        self._file.check_buffers(self._batch.column(INDEX.get_field_index(name)))
        return _buffers(self._batch, name)

    @cached_property
    def key(self) -> "_Texts":
        return _Texts(self._text_buffers("key"))

    @cached_property
    def captions(self) -> "tuple[np.ndarray, _Texts]":
        """Where each row's captions begin, and all captions."""
        buffers = self._text_buffers("captions")
        return np.frombuffer(buffers[1], np.int32), _Texts(buffers[2:])


def _buffers(batch: pa.RecordBatch, name: str) -> list:
    return batch.column(INDEX.get_field_index(name)).buffers()


def _numbers(batch: pa.RecordBatch, name: str, dtype: type) -> np.ndarray:
    return np.frombuffer(_buffers(batch, name)[1], dtype)


class _Texts:
    """A string column's buffers: validity, starts, bytes."""

    def __init__(self, buffers: list):
        self.starts = np.frombuffer(buffers[1], np.int32)
        self.bytes = memoryview(buffers[2] if buffers[2] is not None else b"")

    def __getitem__(self, row: int) -> str:
        return str(self.bytes[self.starts[row]:self.starts[row + 1]], "utf-8")


class Index:
    """Rows of a folder of shards, sorted by (shard, key); rows of one shard are contiguous.

    folder: where the shards' relative paths begin; shards: their paths; shard_starts (S+1,): shard s has the rows
    shard_starts[s] … shard_starts[s+1]; fingerprint: sha256 over all columns except `group`; file: index.arrow, which stays
    as it was opened when another takes its name. Picklable. Whatever reads raises InputError where the file is damaged.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], file: ArrowFile, cure: str):
        self.folder, self.manifest, self.file, self._cure = folder, manifest, file, cure
        self.fingerprint: str = manifest["fingerprint"]
        self.shards: list[str] = [shard["name"] for shard in manifest["shards"]]
        self.shard_starts = np.cumsum([0, *(shard["samples"] for shard in manifest["shards"])])
        self._batches: dict[int, _Batch] = {}

    @classmethod
    def open(cls, path: Path | str) -> "Index":
        """Open a folder with index.arrow and manifest.json, or the index.arrow in it. Raises InputError."""
        path = Path(path)
        folder = path.parent if path.name == INDEX_NAME else path
        merged = "merged_from" in manifest_of(folder)
        cure = f"run `uniclip-data merge {folder} DIR...` again" if merged else f"run `uniclip-data index {folder}`"
        for name in (INDEX_NAME, MANIFEST_NAME):
            if not (folder / name).exists():
                raise InputError(f"{folder / name} does not exist: {cure}")
        try:
            name = MANIFEST_NAME
            manifest = open_json((folder / name).read_bytes())
            name = INDEX_NAME
            file = ArrowFile(folder / name)
            _check(folder, manifest, file, cure)
            return cls(folder, manifest, file, cure)
        except InputError:
            raise
        except (*UNREADABLE, TypeError, AttributeError) as error:
            raise InputError(f"{folder / name} is damaged and cannot be read ({error!r}): {cure}") from None

    def __reduce__(self):
        return Index.open, (self.folder,)

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            raise InputError(f"{self.folder / INDEX_NAME} is damaged ({error}): {self._cure}") from None

    def batch(self, number: int) -> pa.RecordBatch:
        """A record batch as Arrow has it."""
        with self._reading():
            return self.file.batch(number)

    def check(self) -> None:
        """Read all of index.arrow. Raises InputError."""
        with self._reading():
            self.file.check_all()

    def _batch(self, number: int) -> _Batch:
        if number not in self._batches:
            with self._reading():
                self._batches[number] = _Batch(self.file, number)
        return self._batches[number]

    def _locate(self, row: int) -> tuple[_Batch, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index of {len(self)} rows")
        return self._batch(row // INDEX_BATCH_ROWS), row % INDEX_BATCH_ROWS

    def columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """schema.INDEX without its texts, for each row (n,); `shard` is a code into `shards`, `source` into the sources."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} … {rows.max()} of an index of {len(self)} rows")
        number, local = np.divmod(rows, INDEX_BATCH_ROWS)
        if len(rows) and (number == number[0]).all():
            return _gather(self._batch(int(number[0])), local)
        found = {name: np.empty(len(rows), dtype) for name, dtype in _COLUMNS.items()}
        order = np.argsort(number, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(number[order])) + 1) if len(rows) else ():
            for name, values in _gather(self._batch(int(number[part[0]])), local[part]).items():
                found[name][part] = values
        return found

    def captions(self, row: int) -> list[str]:
        """All captions of a row; never empty."""
        batch, local = self._locate(row)
        with self._reading():
            starts, texts = batch.captions
            return [texts[i] for i in range(starts[local], starts[local + 1])]

    def key(self, row: int) -> str:
        """The WebDataset key, unique in its shard."""
        batch, local = self._locate(row)
        with self._reading():
            return batch.key[local]

    def source(self, row: int) -> str:
        """The name of the source the row came from; empty where none was given."""
        batch, local = self._locate(row)
        return self._sources[batch.numbers["source"][local]]

    @cached_property
    def _sources(self) -> list[str]:
        column = self.batch(0).column(INDEX.get_field_index("source"))
        return cast(pa.DictionaryArray, column).dictionary.to_pylist()


def _gather(batch: _Batch, local: np.ndarray) -> dict[str, np.ndarray]:
    found = {name: column[local] for name, column in batch.numbers.items()}
    found["plain"] = (batch.plain[local >> 3] >> (local & 7) & 1).astype(bool)
    return found


def _check(folder: Path, manifest: dict[str, Any], file: ArrowFile, cure: str) -> None:
    """Raises InputError unless schema version and row count are what this program and the manifest say."""
    expected, found = ((schema.metadata or {}).get(b"uniclip.schema", b"none").decode()
                       for schema in (INDEX, file.schema))
    if found != expected or manifest.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{folder / INDEX_NAME} has schema {found}, this program reads {expected}: {cure}")
    rows = (file.batches - 1) * INDEX_BATCH_ROWS + file.peek(file.batches - 1).num_rows if file.batches else 0
    if rows != manifest["counts"]["samples"]:
        raise InputError(f"{folder / INDEX_NAME} has {rows:,} rows, its {MANIFEST_NAME} says "
                         f"{manifest['counts']['samples']:,}: {cure}")
