"""Duplicate groups: how they are named, and how they outlive the index in which they were found."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.arrows import ArrowFile


def chained(values: np.ndarray) -> np.ndarray:
    """Pairs (2, E) that chain rows of equal values."""
    order = np.argsort(values, kind="stable")
    same = values[order][1:] == values[order][:-1]
    return np.stack([order[:-1][same], order[1:][same]])


def named(edges: np.ndarray, sample_id: np.ndarray) -> np.ndarray:
    """Each row's group, named by the smallest id in it; −1 where a row is alone."""
    rows = len(sample_id)
    graph = coo_array((np.ones(edges.shape[1], np.bool_), (edges[0], edges[1])), shape=(rows, rows))
    count, label = connected_components(graph, directed=False)
    name = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(name, label, sample_id)
    return np.where(np.bincount(label, minlength=count)[label] > 1, name[label], -1)


@dataclass(frozen=True)
class Grouped:
    """An index's samples and their groups; left: how many `duplicates` has not seen, None where it never ran."""

    sample_id: np.ndarray
    group: np.ndarray
    left: int | None

    @classmethod
    def read(cls, path: Path, manifest: dict) -> "Grouped | None":
        """Of an index.arrow; None where there is none. Raises what is in seals.UNREADABLE where it is damaged."""
        if not path.exists():
            return None
        file, told = ArrowFile(path), manifest.get("duplicates")
        return cls(file.numbers("sample_id"), file.numbers("group"), left=told.get("uncompared", 0) if told else None)


@dataclass(frozen=True)
class Carried:
    """Groups for an index that is being made: sample_id ascending, their groups; `told` goes into its manifest."""

    sample_id: np.ndarray
    group: np.ndarray
    told: dict

    def of(self, sample_id: np.ndarray) -> np.ndarray:
        """−1 for samples that nobody has grouped."""
        found, at = _among(sample_id, self.sample_id)
        group = np.full(len(sample_id), -1)
        group[found] = self.group[at[found]]
        return group


def _among(values: np.ndarray, ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each value is in `ascending`, and where."""
    at = np.searchsorted(ascending, values)
    found = at < len(ascending)
    found[found] = ascending[at[found]] == values[found]
    return found, at


def carried(parts: Sequence[Grouped], sample_id: np.ndarray) -> Carried:
    """The groups that `parts` knew, for these samples. A sample that has a group in several of them joins those groups."""
    parts = [part for part in parts if part.left is not None or (part.group >= 0).any()]
    known = np.sort(sample_id) if parts else np.empty(0, np.int64)
    known = known[np.diff(known, prepend=-1) != 0]  # np.unique hashes, which takes ten times as long here
    ids, labels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, part in enumerate(parts):
        mine = np.flatnonzero(part.group >= 0)
        mine = mine[_among(part.sample_id[mine], known)[0]]
        ids.append(part.sample_id[mine])
        labels.append(np.unique(part.group[mine], return_inverse=True)[1] * len(parts) + number)
    found, row = np.unique(np.concatenate(ids), return_inverse=True)
    group = named(row[chained(np.concatenate(labels))], found) if len(found) else found
    left = [part.left + len(known) - int(_among(np.sort(part.sample_id), known)[0].sum())  # in order it is much faster
            for part in parts if part.left is not None]
    told = {"groups": len(np.unique(group[group >= 0])), "rows": int((group >= 0).sum()),
            "largest": int(np.unique(group[group >= 0], return_counts=True)[1].max(initial=0)),
            "uncompared": min(len(known), *left)} if left else {}
    return Carried(found, group, told)
