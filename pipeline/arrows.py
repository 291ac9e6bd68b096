"""Arrow files that hold checksums of their own blocks: each is checked when it is first read, before Arrow parses it.

Between the last record batch and the footer, where other readers do not look, stands one line: a mark, then JSON with the
crc32 of every BLOCK bytes before it and of the footer, and where each record batch begins.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.console import InputError
from pipeline.seals import UNREADABLE, Damaged, crc32, open_json, sealed_json

BLOCK = 1 << 18
_MARK = b"uniclip-checksums:"
_FLAG = b"uniclip.checksums"  # of the schema: such a file without the line is damaged
_TAIL = 10  # bytes of the footer's length and the magic
_LINE_WITHIN = 1 << 24  # bytes before the footer


def write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """A whole Arrow file with its checksums."""
    marked, starts = schema.with_metadata({**(schema.metadata or {}), _FLAG: b"1"}), []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, marked) as writer:
        for batch in batches:
            starts.append(sink.tell())
            writer.write_batch(batch.replace_schema_metadata(marked.metadata))
        starts.append(sink.tell())
    _seal(path, starts)


def _seal(path: Path, starts: list[int]) -> None:
    with path.open("r+b") as file, pa.memory_map(str(path)) as source:
        data = memoryview(source.read_buffer())
        at = _footer_at(data)
        footer = bytes(data[at:])
        sums = np.array([crc32(data[start:min(start + BLOCK, at)]) for start in range(0, at, BLOCK)], ">u4")
        told = {"batches": starts, "block": BLOCK, "blocks": sums.tobytes().hex(), "footer": crc32(footer)}
        del data
        file.seek(at)
        file.write(_MARK + sealed_json(told) + b"\n" + footer)


def _footer_at(data: memoryview) -> int:
    return len(data) - _TAIL - int.from_bytes(data[-_TAIL:-_TAIL + 4], "little")


class ArrowFile:
    """A memory-mapped Arrow file, open as long as this is; what it gives has been checked. `sealed`: it has checksums.

    Raises Damaged and what else is in UNREADABLE.
    """

    def __init__(self, path: Path):
        self._buffer = pa.memory_map(str(path)).read_buffer()
        self._data = memoryview(self._buffer)
        told = self._seal()
        self.sealed = told is not None
        if told is not None:
            self._starts, self._sums = told["batches"], np.frombuffer(bytes.fromhex(told["blocks"]), ">u4")
            self._unchecked = np.ones(len(self._sums), bool)
            self._check(0, self._starts[min(1, len(self._starts) - 1)])  # schema, dictionaries, the first batch
        self.file = pa.ipc.open_file(self._buffer)
        if told is None and (_FLAG in (self.file.schema.metadata or {})):
            raise Damaged("its checksums are gone")
        self.schema = self.file.schema
        self.batches = self.file.num_record_batches

    def _seal(self) -> dict | None:
        """What the line says, its place added as `end`; None where there is none."""
        at = max(_footer_at(self._data), 0)  # behind it, and in the batches, strangers' names may look like the mark
        line = bytes(self._data[max(at - _LINE_WITHIN, 0):at])
        begins = line.rfind(_MARK)
        if begins < 0 or line.find(b"\n", begins) != len(line) - 1:
            return None
        told = open_json(line[begins + len(_MARK):-1])
        self._end = at - len(line) + begins
        if told["block"] != BLOCK or crc32(self._data[at:]) != told["footer"]:
            raise Damaged
        return told

    def _check(self, start: int, stop: int) -> None:
        """Raises Damaged unless the blocks that hold these bytes are as they were written."""
        within = slice(start // BLOCK, -(-stop // BLOCK))
        for number in np.flatnonzero(self._unchecked[within]) + within.start:
            if crc32(self._data[number * BLOCK:min((number + 1) * BLOCK, self._end)]) != self._sums[number]:
                raise Damaged(f"block {number} of {len(self._sums)} does not match its checksum")
            self._unchecked[number] = False

    def check_all(self) -> None:
        """Every byte, again where it was checked before. Raises Damaged."""
        if self.sealed:
            self._unchecked[:] = True
            self._check(0, self._end)

    def check_buffers(self, array: pa.Array) -> None:
        """The bytes of a column of `peek`, before they are used."""
        if self.sealed:
            for buffer in filter(None, array.buffers()):
                start = buffer.address - self._buffer.address
                self._check(start, start + buffer.size)

    def peek(self, number: int) -> pa.RecordBatch:
        """A record batch whose columns were not checked, only what says where they are."""
        if self.sealed:
            start = self._starts[number]
            self._check(start, start + 8)
            self._check(start, start + 8 + int.from_bytes(self._data[start + 4:start + 8], "little"))
        return self.file.get_batch(number)

    def batch(self, number: int) -> pa.RecordBatch:
        """A record batch, checked; where there are no checksums, for what would lead out of its bytes."""
        if self.sealed:
            self._check(*self._starts[number:number + 2])
        batch = self.file.get_batch(number)
        if not self.sealed:
            batch.validate(full=True)
        return batch

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers without gaps, which alone is read."""
        parts = [self.peek(number).column(name) for number in range(self.batches)]
        for part in parts:
            self.check_buffers(part)
        return pa.chunked_array(parts, self.schema.field(name).type).to_numpy()

    def table(self) -> pa.Table:
        """All of it."""
        batches = [self.batch(number) for number in range(self.batches)]
        return pa.Table.from_batches(batches, schema=self.schema)


def opened(path: Path, cure: str) -> ArrowFile:
    """Raises InputError for a file that cannot be read."""
    try:
        return ArrowFile(path)
    except UNREADABLE as error:
        raise InputError(f"{path} is damaged ({error}): {cure}") from None
