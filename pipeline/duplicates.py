"""Duplicates inside an index → its group column; overlap with evaluation sets → a skip list."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import arrows
from pipeline.console import WorkFailed
from pipeline.evalsets import EvalSet
from pipeline.files import alone, replacing
from pipeline.groups import chained, named
from pipeline.hashes import FLAT, OTHER_LOOKS, PLAIN, evalset_hashes, index_hashes, near_pairs
from pipeline.index import INDEX_NAME, MANIFEST_NAME, Index
from pipeline.schema import INDEX, INDEX_BATCH_ROWS
from pipeline.seals import write_sealed_json
from pipeline.skips import present, write_skips

DISTANCE = 4  # of 64 bits: re-encoded and resized copies are 0 to 4 apart, other photographs hardly ever below 10
STRICTER = 2  # of other looks only half as many bits: at 4, eleven pairs or more of 43,000 photographs were false
FINDS = ("of 100 altered copies about: 100 in another size or encoding, 99 mirrored, 97 in a frame of 5 %, 99 cropped "
         "evenly to 95 % of the sides and 90 to 90 %, but 30 cropped elsewhere to 95 % and 6 to 90 % (docs/duplicates.md)")


@dataclass(frozen=True)
class Found:
    """Rows that share their bytes, their pixels or their look with another row, and the groups they form."""

    bytes: int
    pixels: int
    look: int
    groups: int
    rows: int
    largest: int


def duplicates(index: Index, distance: int = DISTANCE, workers: int | None = None) -> Found:
    """Fill the index's group column: equal for rows of one group, −1 for rows that are alone. The fingerprint stays.

    What is taken down is alone. Raises WorkFailed where the index has become another meanwhile.
    """
    rows = present(index)
    hashes = index_hashes(index, workers)[rows]
    edges = [chained(hashes["bytes"]), chained(hashes["pixels"]), _near(hashes, distance)]
    group = np.full(len(index), -1)
    group[rows] = named(np.concatenate(edges, axis=1), index.columns(rows)["sample_id"])
    sizes = np.unique(group[group >= 0], return_counts=True)[1]
    found = Found(*(len(np.unique(edge)) for edge in edges), groups=len(sizes), rows=int(sizes.sum()),
                  largest=int(sizes.max(initial=0)))
    with alone([index.folder]):
        now = Index.open(index.folder)  # a takedown may have changed it
        if now.fingerprint != index.fingerprint:
            raise WorkFailed(f"{index.folder}: the index was made anew meanwhile: run the same command again")
        _write_groups(now, group)
        write_sealed_json(index.folder / MANIFEST_NAME, {**now.manifest, "duplicates": {"distance": distance, **vars(found)}})
    return found


def _near(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Pairs (2, E) of rows that look alike: as they are, or one of them mirrored, cropped or in a frame."""
    rows = np.flatnonzero(hashes["contrast"] >= FLAT)
    looks, first = np.unique(hashes["look"][rows], return_index=True)
    edges = [rows[chained(hashes["look"][rows])]]
    if distance:
        edges.append(rows[first[_joined(near_pairs(looks, distance))]])
    rows = np.flatnonzero(hashes["contrast"] >= PLAIN)
    looks, first = np.unique(hashes["look"][rows], return_index=True)
    for kind in OTHER_LOOKS:
        words, holder, word = np.unique(hashes[kind][rows], return_index=True, return_inverse=True)
        i, j = _joined(near_pairs(looks, distance // STRICTER, words))
        like = np.flatnonzero(np.isin(word, j))
        edges += [rows[np.stack([first[i], holder[j]])], rows[np.stack([like, holder[word[like]]])]]
    found = np.concatenate(edges, axis=1)
    return found[:, found[0] != found[1]]  # a row is like its own middle


def _joined(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.concatenate([np.empty((2, 0), np.int64), *map(np.stack, pairs)], axis=1)


def _write_groups(index: Index, group: np.ndarray) -> None:
    """The same index with another group column."""
    def batches() -> Iterator[pa.RecordBatch]:
        for number in range(index.file.batches):
            batch, start = index.batch(number), number * INDEX_BATCH_ROWS
            column = pa.array(group[start:start + batch.num_rows], pa.int64())
            yield batch.set_column(INDEX.get_field_index("group"), INDEX.field("group"), column)

    with replacing(index.folder / INDEX_NAME) as temporary:
        arrows.write(temporary, index.file.schema, batches())


def overlap(index: Index, evalsets: list[EvalSet], out: Path, distance: int = DISTANCE,
            workers: int | None = None) -> dict[str, dict[str, int]]:
    """Write a skip list of the rows that are images of an evaluation set; set → how many by kind of likeness."""
    rows = present(index)
    hashes, ids = index_hashes(index, workers)[rows], index.columns(rows)["sample_id"]
    reasons: dict[int, str] = {}
    counts: dict[str, dict[str, int]] = {}
    for evalset in evalsets:
        keys, theirs = evalset_hashes(evalset, workers)
        name = f"{evalset.name}/{evalset.split}"
        found = {kind: _match(hashes, theirs, kind, distance) for kind in ("bytes", "pixels", "look")}
        counts[name] = {kind: len(rows) for kind, rows in found.items()}
        for kind, rows in found.items():
            for row, match in rows.items():
                reasons.setdefault(int(ids[row]), f"overlap with {name}, key {keys[match]}, by {kind}")
    write_skips(out, reasons)
    return counts


def _match(ours: np.ndarray, theirs: np.ndarray, kind: str, distance: int) -> dict[int, int]:
    """Row of ours → a row of theirs that is like it."""
    kinds = [(kind, kind, FLAT, distance if kind == "look" else 0)]
    if kind == "look":
        kinds += [(*pair, PLAIN, distance // STRICTER) for name in OTHER_LOOKS for pair in (("look", name), (name, "look"))]
    found: dict[int, int] = {}
    for one, two, contrast, apart in reversed(kinds):  # the whole picture's word goes before its middle's
        mine, other = (np.flatnonzero((kind != "look") | (hashes["contrast"] >= contrast)) for hashes in (ours, theirs))
        at = _like(ours[one][mine], theirs[two][other], apart)
        found |= zip(mine[at >= 0].tolist(), other[at[at >= 0]].tolist(), strict=True)
    return found


def _like(ours: np.ndarray, theirs: np.ndarray, distance: int) -> np.ndarray:
    """For each word of ours the place of one of theirs that is near it, an equal one where there is one; else −1."""
    words, word = np.unique(ours, return_inverse=True)
    values, first = np.unique(theirs, return_index=True)
    like = np.full(len(words), -1)
    for i, j in near_pairs(values, distance, words) if distance else ():
        like[j] = first[i]
    _, i, j = np.intersect1d(values, words, assume_unique=True, return_indices=True)
    like[j] = first[i]
    return like[word]
