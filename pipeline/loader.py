"""Cursor → Batch: reads by offset, executes views ahead of the consumer, slices each global batch by rank."""

import hashlib
import importlib.util
import json
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.console import InputError, WorkFailed
from pipeline.images import Undecodable, plain_bytes, upright_rgb
from pipeline.index import Index
from pipeline.order import Order
from pipeline.replay import PillowExecutor
from pipeline.sampling import ViewKind, draw_captions, sample_vectors
from pipeline.schema import SCHEMA_VERSION, Batch

PREFETCHED_BATCHES = 2
OPEN_SHARDS = 64
BUDGET_GRACE = 100  # samples before the share of bad ones means anything
_BLANK = b"P6 1 1 255\n\0\0\0"  # stands in for an image that cannot be decoded; its group is marked invalid


class Executor(Protocol):
    """Encoded images (B), vectors (B, V, 11), ids (B,) → V views (B, 3, S, S), vectors, ids on the executor's device."""

    def __call__(self, encoded: list[bytes], vector_BVA: np.ndarray, sample_id_B: np.ndarray
                 ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """What is drawn from each sample: kinds of views, output size in pixels, executor and its threads (0 = all cores)."""

    kinds: tuple[ViewKind, ...]
    size: int
    executor: str = "auto"
    threads: int = 0

    def fingerprint(self) -> str:
        """Hash of everything that changes what a sample becomes (not who executes it)."""
        drawn = {"kinds": [asdict(kind) for kind in self.kinds], "size": self.size}
        return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cursor:
    """The whole state of a data stream. Equal cursors give equal streams, at any number of ranks."""

    seed: int
    samples_seen: int
    index: str
    data: str
    schema: int = SCHEMA_VERSION

    def refuse_other(self, saved: "Cursor") -> None:
        """Raise InputError that names the field in which a saved stream differs from this one."""
        for name in ("schema", "seed", "index", "data"):
            mine, theirs = getattr(self, name), getattr(saved, name)
            if mine != theirs:
                raise InputError(f"cannot resume: the data stream's {name!r} was {theirs} and is now {mine}; "
                                 "use the index and [data] settings of the run, or start a new run")


def make_executor(recipe: Recipe, device: str) -> Executor:
    """DALI wherever it is installed (on the GPU when `device` is one), Pillow elsewhere or when asked for.

    Raises InputError when DALI is wanted, or needed for CUDA, and missing.
    """
    dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    threads = recipe.threads or None
    if recipe.executor == "pillow" or (recipe.executor == "auto" and not dali and device == "cpu"):
        return PillowExecutor(recipe.size, threads)
    if not dali:
        raise InputError(f"executor {recipe.executor!r} on {device} needs DALI: pip install nvidia-dali-cuda130, "
                         "or set data.executor = \"pillow\" to run the views on the CPU")
    from pipeline.views import DaliExecutor

    return DaliExecutor(recipe.size, threads, None if device == "cpu" else torch.device(device).index or 0)


def slice_of(rank: int, world: int, batch: int) -> slice:
    """Rank r of W takes positions ⌊rB/W⌋ … ⌊(r+1)B/W⌋ of a global batch of B."""
    return slice(rank * batch // world, (rank + 1) * batch // world)


def group_ids(sample_id_N: np.ndarray, group_N: np.ndarray, captions: list[str]) -> np.ndarray:
    """Connected components of "same sample, same duplicate group or same drawn caption" → (N,) int64.

    Computed on the global batch, so every rank numbers them alike: the component's first position. A group of −1 is
    nobody's duplicate.
    """
    count = len(captions)
    alone = np.where(group_N < 0, -1 - np.arange(count), group_N)
    relations = [np.unique(x, return_inverse=True)[1] for x in (sample_id_N, alone, np.array(captions, dtype=object))]
    positions = np.tile(np.arange(count), len(relations))
    nodes = np.concatenate([count * (n + 1) + relation for n, relation in enumerate(relations)])
    size = count * (len(relations) + 1)
    _, component = connected_components(coo_array((np.ones(len(nodes)), (positions, nodes)), shape=(size, size)))
    _, first, inverse = np.unique(component[:count], return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


class ShardReader:
    """Bytes of tar members by offset; keeps the last OPEN_SHARDS files open."""

    def __init__(self, folder: Path, shards: list[str]):
        self._folder, self._shards = folder, shards
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Raises OSError when the shard is gone or shorter than the index says."""
        if shard not in self._open:
            self._open[shard] = os.open(self._folder / self._shards[shard], os.O_RDONLY)
            if len(self._open) > OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        data = os.pread(self._open[shard], size, offset)
        if len(data) != size:
            raise OSError(f"{len(data)} bytes where the index says {size}")
        return data

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1])


@dataclass
class Ledger:
    """Bad samples met at run time: a JSON line each, and the share of them that ends the run."""

    path: Path | None = None
    budget: float = 0.01
    seen: int = 0
    bad: int = 0

    def count(self, samples: int, bad: list[dict]) -> None:
        """Record; raises WorkFailed once more than `budget` of at least BUDGET_GRACE samples were bad."""
        self.seen, self.bad = self.seen + samples, self.bad + len(bad)
        if bad and self.path:
            with self.path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in bad)
        if self.seen >= BUDGET_GRACE and self.bad > self.budget * self.seen:
            where = f"see {self.path}" if self.path else f"the last: {bad[-1]}"
            raise WorkFailed(f"{self.bad} of {self.seen} samples could not be decoded, more than the budget of "
                             f"{self.budget:.2%} (data.bad_sample_budget); {where}")


@dataclass(frozen=True)
class _Drawn:
    """This rank's slice of one global batch before any image is read."""

    rows: np.ndarray
    columns: dict[str, np.ndarray]
    vectors: np.ndarray
    captions: list[str]
    groups: np.ndarray


class Loader:
    """Iterates (Batch, Cursor after it) without end, from `cursor` on; a thread works ahead.

    batch_size is the global one; this rank gets its slice. Captions and vectors are pure functions of the cursor.
    """

    def __init__(self, index: Index, tokenizer: Callable[[list[str]], np.ndarray], recipe: Recipe, cursor: Cursor,
                 batch_size: int, device: str = "cpu", rank: int = 0, world: int = 1, ledger: Ledger | None = None):
        self.index, self.tokenizer, self.recipe = index, tokenizer, recipe
        self.cursor, self.batch_size, self.device = cursor, batch_size, device
        self._mine = slice_of(rank, world, batch_size)
        self._order = Order(cursor.seed, tuple(int(s) for s in index.shard_starts))
        self._ledger = ledger or Ledger()
        self._executor = make_executor(recipe, device)
        self._reader = ShardReader(index.folder, index.shards)

    def _encoded(self, columns: dict[str, np.ndarray], b: int) -> bytes:
        """The image's bytes, fit for any executor. Raises OSError, Undecodable."""
        data = self._reader.read(int(columns["shard"][b]), int(columns["offset"][b]), int(columns["size"][b]))
        if not columns["plain"][b]:
            return plain_bytes(data)
        if b"\xff\xd9" not in data[-1024:]:  # no end marker: decoders differ on what they make of it
            upright_rgb(data)
        return data

    def _fetch(self, rows: np.ndarray, columns: dict[str, np.ndarray]) -> tuple[list[bytes], list[dict]]:
        encoded, bad = [], []
        for b, row in enumerate(rows):
            try:
                encoded.append(self._encoded(columns, b))
            except (OSError, Undecodable) as error:
                encoded.append(_BLANK)
                bad.append(self._bad(b, int(row), str(error)))
        return encoded, bad

    def _bad(self, b: int, row: int, reason: str) -> dict:
        shard = self.index.shards[int(self.index.columns(np.array([row]))["shard"][0])]
        return {"position": b, "shard": shard, "key": self.index.key(row), "reason": reason}

    def _execute(self, rows: np.ndarray, encoded: list[bytes], vectors: np.ndarray, ids: np.ndarray):
        """Run the executor; when it breaks on an image nobody suspected, find that image and run again without it."""
        try:
            return *self._executor(encoded, vectors, ids), []
        except (RuntimeError, Undecodable):
            checked, bad = [], []
            for b, data in enumerate(encoded):
                try:
                    checked.append(plain_bytes(data))
                except Undecodable as error:
                    checked.append(_BLANK)
                    bad.append(self._bad(b, int(rows[b]), str(error)))
            return *self._executor(checked, vectors, ids), bad

    def _draw(self, position: int) -> _Drawn:
        """Captions and group ids are drawn for the whole global batch, vectors for this rank's slice."""
        rows, epochs = self._order.rows(position, self.batch_size)
        columns = self.index.columns(rows)
        seed, ids = self.cursor.seed, columns["sample_id"]
        choices = [self.index.captions(int(row)) for row in rows]
        drawn = draw_captions(seed, epochs, 0, ids, np.array([len(c) for c in choices]))
        captions = [c[d] for c, d in zip(choices, drawn, strict=True)]
        groups = group_ids(ids, columns["group"], captions)
        sizes = np.stack([columns["width"], columns["height"]], axis=1)[self._mine]
        mine = {name: column[self._mine] for name, column in columns.items()}
        vectors = sample_vectors(seed, epochs[self._mine], 0, mine["sample_id"], sizes, self.recipe.kinds)
        return _Drawn(rows[self._mine], mine, vectors, captions[self._mine], groups[self._mine])

    def batch_at(self, position: int) -> Batch:
        """The batch that starts at global position `position`. Raises WorkFailed past the bad-sample budget."""
        drawn = self._draw(position)
        encoded, bad = self._fetch(drawn.rows, drawn.columns)
        views, vectors, ids, late = self._execute(drawn.rows, encoded, drawn.vectors, drawn.columns["sample_id"])
        valid = torch.ones(len(drawn.rows), dtype=torch.bool)
        for line in (bad := bad + late):
            valid[line.pop("position")] = False
        self._ledger.count(len(drawn.rows), [{"samples": position + self.batch_size, **line} for line in bad])
        tokens = torch.from_numpy(self.tokenizer(drawn.captions))[:, None]
        return Batch(views, vectors, tokens, ids, torch.from_numpy(drawn.groups), valid).to(self.device)

    def __iter__(self) -> Generator[tuple[Batch, Cursor], None, None]:
        ahead: queue.Queue = queue.Queue(PREFETCHED_BATCHES)
        stop = threading.Event()
        worker = threading.Thread(target=self._work, args=(ahead, stop), name="loader", daemon=True)
        worker.start()
        try:
            while True:
                item = ahead.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while worker.is_alive():  # the worker may be waiting for room
                try:
                    ahead.get(timeout=0.05)
                except queue.Empty:
                    continue
            self.close()

    def _work(self, ahead: queue.Queue, stop: threading.Event) -> None:
        cursor = self.cursor
        try:
            while not stop.is_set():
                batch = self.batch_at(cursor.samples_seen)
                cursor = replace(cursor, samples_seen=cursor.samples_seen + self.batch_size)
                ahead.put((batch, cursor))
        except BaseException as error:  # handed to the consumer, who raises it
            ahead.put(error)

    def close(self) -> None:
        """Give back files, threads and the executor's memory."""
        self._executor.close()
        self._reader.close()
