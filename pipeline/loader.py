"""Cursor → Batch: reads by offset, executes views ahead of the consumer, slices each global batch by rank."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.execution import FORGOTTEN, Guarded, fit, valid_mask
from pipeline.images import Undecodable
from pipeline.index import Index
from pipeline.ledger import Ledger
from pipeline.order import Order
from pipeline.plan import Plan, digest, effective_weights, make_plan
from pipeline.prefetch import delivered
from pipeline.reader import Place, ReadAhead
from pipeline.recipe import Cursor, Recipe, make_executor
from pipeline.sampling import draw_captions, sample_vectors
from pipeline.schema import Batch, sample_id_of
from pipeline.skips import Forgotten, present
from pipeline.text import Alike, cleaned
from pipeline.wording import Draw, tokens_of

READ_AHEAD_BATCHES = 2
CHANGED = "its bytes are not those that were indexed: see `uniclip-data verify`"


def slice_of(rank: int, world: int, batch: int) -> slice:
    """Rank r of W takes positions ⌊rB/W⌋ … ⌊(r+1)B/W⌋ of a global batch of B."""
    return slice(rank * batch // world, (rank + 1) * batch // world)


def group_ids(sample_id_N: np.ndarray, group_N: np.ndarray, captions: Sequence,
              alike: Callable[[Sequence], Sequence] = cleaned) -> np.ndarray:
    """Connected components of "same sample, same duplicate group or same drawn caption" → (N,) int64.

    Computed on the global batch, so every rank numbers them alike: the component's first position. A group of −1 is
    nobody's duplicate. alike: what of captions must be equal, `text.Alike` for their token ids.
    """
    count, number = len(captions), {}
    alone = np.where(group_N < 0, -1 - np.arange(count), group_N)
    texts = np.array([number.setdefault(text, len(number)) for text in alike(captions)])
    relations = [np.unique(x, return_inverse=True)[1] for x in (sample_id_N, alone, texts)]
    positions = np.tile(np.arange(count), len(relations))
    nodes = np.concatenate([count * (n + 1) + relation for n, relation in enumerate(relations)])
    size = count * (len(relations) + 1)
    _, component = connected_components(coo_array((np.ones(len(nodes)), (positions, nodes)), shape=(size, size)))
    _, first, inverse = np.unique(component[:count], return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def to_device(batch: Batch, device: str) -> Batch:
    """The batch on `device`; what lies on the CPU is pinned first, so that its copy to a GPU waits for nobody."""
    if not device.startswith("cuda"):
        return batch.to(device)

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_cuda else tensor.pin_memory()

    return Batch([pinned(view) for view in batch.views], *(pinned(t) for t in (
        batch.vectors, batch.tokens, batch.sample_id, batch.group_id, batch.valid))).to(device)


@dataclass(frozen=True)
class _Drawn:
    """This rank's slice of one global batch, its images still being read."""

    position: int
    rows: np.ndarray
    columns: dict[str, np.ndarray]
    vectors: np.ndarray
    captions: list[str]
    draw: Draw
    groups: np.ndarray
    reads: list[Future]


class Loader:
    """Iterates (Batch, Cursor after it) without end, from `cursor` on; threads work ahead.

    batch_size is the global one; this rank gets its slice. Captions and vectors are pure functions of the cursor.
    plan: every row once unless given; place: where the shards are. What forgotten.parquet beside index or tars names keeps
    its place in the order, so that a run can go on after a takedown, and is never read again: valid = 0.
    """

    def __init__(self, index: Index, tokenizer: Callable[[list[str]], np.ndarray], recipe: Recipe, cursor: Cursor,
                 batch_size: int, device: str = "cpu", rank: int = 0, world: int = 1, ledger: Ledger | None = None,
                 plan: Plan | None = None, place: Place | None = None):
        self.index, self.tokenizer, self.recipe = index, tokenizer, recipe
        self._alike = Alike(tokenizer)
        self.cursor, self.batch_size, self.device = cursor, batch_size, device
        self._mine = slice_of(rank, world, batch_size)
        self._order = Order(cursor.seed, plan or Plan.whole(index.shard_starts))
        self._ledger = ledger or Ledger()
        self._place = place or Place()
        self._shards = self._place.shards(index.folder, index.manifest["shards"])
        self._executor = Guarded(make_executor(recipe, device))
        self._ahead = ReadAhead()
        self._forgotten = Forgotten.beside(index.folder, index.shards).id_array

    def _read(self, gone: bool, shard: int, offset: int, size: int, plain: bool, image_sum: int) -> bytes:
        if gone:
            raise Undecodable(FORGOTTEN)
        data = self._shards.read(shard, offset, size)
        if image_sum and sample_id_of(data) != image_sum:
            raise Undecodable(CHANGED)
        return fit(data, plain)

    def _draw(self, position: int) -> _Drawn:
        """Captions and group ids are drawn for the whole global batch, vectors for this rank's slice."""
        rows, epochs, repeats = self._order.places(position, self.batch_size)
        columns = self.index.columns(rows)
        seed, ids = self.cursor.seed, columns["sample_id"]
        choices = [self.index.captions(int(row)) for row in rows]
        drawn = draw_captions(seed, epochs, repeats, ids, np.array([len(c) for c in choices]))
        captions = [c[d] for c, d in zip(choices, drawn, strict=True)]
        gone = np.isin(ids, self._forgotten)
        groups = group_ids(ids, np.where(gone, -1, columns["group"]), captions, self._alike)
        sizes = np.stack([columns["width"], columns["height"]], axis=1)[self._mine]
        mine = {name: column[self._mine] for name, column in columns.items()}
        vectors = sample_vectors(seed, epochs[self._mine], repeats[self._mine], mine["sample_id"], sizes,
                                 self.recipe.kinds)
        self._shards.expect(self._order.window_shards(position))
        named = ("shard", "offset", "size", "plain", "image_sum")
        wanted = zip(gone[self._mine].tolist(), *(mine[name].tolist() for name in named), strict=True)
        reads = self._ahead.ask([partial(self._read, *member) for member in wanted])
        return _Drawn(position, rows[self._mine], mine, vectors, captions[self._mine],
                      Draw(seed, epochs[self._mine], repeats[self._mine], mine["sample_id"]), groups[self._mine], reads)

    def _line(self, drawn: _Drawn, b: int, reason: str) -> dict:
        """What the ledger says about a bad sample."""
        return {"samples": drawn.position + self.batch_size, "shard": self.index.shards[int(drawn.columns["shard"][b])],
                "key": self.index.key(int(drawn.rows[b])), "reason": reason}

    def _execute(self, drawn: _Drawn) -> tuple[Batch, list[dict]]:
        encoded = self._ahead.answers(drawn.reads, self._place.timeout)
        (views, vectors, ids), bad = self._executor(encoded, drawn.vectors, drawn.columns["sample_id"])
        tokens = torch.from_numpy(tokens_of(self.tokenizer, drawn.captions, self.recipe.wording, drawn.draw))
        batch = Batch(views, vectors, tokens, ids, torch.from_numpy(drawn.groups), valid_mask(len(encoded), bad))
        lines = [self._line(drawn, b, bad[b]) for b in sorted(bad) if bad[b] != FORGOTTEN]
        return to_device(batch, self.device), lines

    def batch_at(self, position: int) -> Batch:
        """The batch that starts at global position `position`, uncounted."""
        return self._execute(self._draw(position))[0]

    def _batches(self) -> Iterator[tuple[Batch, Cursor, list[dict]]]:
        ahead, position = deque(), self.cursor.samples_seen
        while True:
            while len(ahead) <= READ_AHEAD_BATCHES:
                ahead.append(self._draw(position))
                position += self.batch_size
            drawn = ahead.popleft()
            batch, bad = self._execute(drawn)
            yield batch, replace(self.cursor, samples_seen=drawn.position + self.batch_size), bad

    def __iter__(self) -> Generator[tuple[Batch, Cursor], None, None]:
        """Raises WorkFailed past the bad-sample budget."""
        return delivered(self._batches(), self._ledger, self._ahead.close, self.close)

    def close(self) -> None:
        """Give back files, threads and the executor's memory."""
        self._ahead.close()
        self._executor.close()
        self._shards.close()


@dataclass(frozen=True)
class Indexed:
    """Samples of an index, as training reads them: exact, elastic. `chosen` is what the plan owes to the configuration."""

    index: Index
    plan: Plan
    place: Place
    chosen: dict[str, object]

    @classmethod
    def open(cls, path: Path, weights: dict[str, float], skip_ids: np.ndarray, place: Place) -> "Indexed":
        """Raises InputError, also for shards that are gone or have changed since they were indexed."""
        index = Index.open(path)
        place.check(index.folder, index.manifest["shards"])
        weights = effective_weights(index, weights)
        uneven = {name: weight for name, weight in sorted(weights.items()) if weight != 1}
        chosen = {"weights": uneven, "skip": digest(skip_ids) if len(skip_ids) else ""}
        return cls(index, make_plan(index, weights, skip_ids), place, chosen)

    @property
    def fingerprint(self) -> str:
        """Which samples these are."""
        return self.index.fingerprint

    def __str__(self) -> str:
        return f"{len(self.plan):,} samples"

    def captions(self) -> Iterator[str]:
        """Every caption that is not taken down."""
        return (caption for row in present(self.index) for caption in self.index.captions(int(row)))

    def loader(self, tokenizer: Callable[[list[str]], np.ndarray], recipe: Recipe, cursor: Cursor, batch_size: int,
               device: str = "cpu", rank: int = 0, world: int = 1, ledger: Ledger | None = None) -> Loader:
        """Batches from `cursor` on."""
        return Loader(self.index, tokenizer, recipe, cursor, batch_size, device, rank, world, ledger, self.plan, self.place)
