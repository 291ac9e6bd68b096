"""Features once: h and z of a set under a name made of everything they depend on, memory-mapped, shared by all tasks.

With several ranks each writes its batches to their places in one file, in a folder that all must see.

    CACHE/<key>/meta.json  h.f32  z.f32  targets.json      pictures of one split
    CACHE/<key>/meta.json  z.f32                           texts
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.embed import embed_images, placed, text_parts
from evaluation.subject import Subject
from pipeline.console import InputError, WorkFailed, say
from pipeline.evalsets import EvalSet, Target
from pipeline.files import sha256_of, write_json
from pipeline.seals import open_json, write_sealed_json
from trainer.batches import IMAGE_BATCH
from trainer.distributed import ALONE, Ranks

VERSION = 1
META, TARGETS, SUMS = "meta.json", "targets.json", "sha256"


@dataclass(frozen=True)
class Features:
    """An embedded split of N images: h (N, W), z (N, D), and the label or the captions of each."""

    h_NW: Tensor
    z_ND: Tensor
    targets: list[Target]

    @cached_property
    def label_N(self) -> np.ndarray:
        """Labels of a classification set."""
        return np.array(self.targets, np.int64)


class Cache:
    """A folder of features; `hits` and `misses` count what was asked for."""

    def __init__(self, folder: Path):
        self.folder, self.hits, self.misses = folder, 0, 0

    def images(self, subject: Subject, evalset: EvalSet, ranks: Ranks = ALONE) -> Features:
        """The features of a split, computed by all of `ranks` together. Raises WorkFailed for an undecodable image."""
        entry = self._entry("images", subject.weights_sha256, evalset.manifest_sha256, subject.transform,
                            subject.device.type)
        if not self._found(entry, ranks):
            with _building(entry, ranks) as folder:
                _store_images(folder, subject, evalset, ranks)
        targets = json.loads((entry / TARGETS).read_text(encoding="utf-8"))
        return Features(_mapped(entry, "h"), _mapped(entry, "z"), targets)

    def texts(self, subject: Subject, texts: list[str], ranks: Ranks = ALONE) -> Tensor:
        """(T, D) embeddings of prompts or captions, not normalised, computed by all of `ranks` together."""
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        entry = self._entry("texts", subject.weights_sha256, subject.text_sha256, digest, subject.device.type)
        if not self._found(entry, ranks):
            with _building(entry, ranks) as folder:
                parts = ((rows, (z_BD,)) for rows, z_BD in text_parts(subject, texts, ranks))
                _store_arrays(folder, ("z",), parts, lambda: len(texts), ranks)
        return _mapped(entry, "z")

    def _entry(self, *depends_on: str) -> Path:
        return self.folder / hashlib.sha256(json.dumps([VERSION, *depends_on]).encode()).hexdigest()[:32]

    def _found(self, entry: Path, ranks: Ranks) -> bool:
        """Whether the first rank finds the entry whole."""
        return ranks.any(ranks.rank == 0 and self._whole(entry))[0]

    def _whole(self, entry: Path) -> bool:
        """Whether the entry is there and its files are what was written; a damaged one is removed."""
        whole = False
        if entry.exists():
            try:
                whole = not (damage := _damage(entry, _meta(entry)))
            except (OSError, ValueError, KeyError, TypeError) as error:
                damage = f"{META}: {error}"
            if not whole:
                say(f"{entry}, {damage}: damaged, it is computed again")
                shutil.rmtree(entry)
        self.hits, self.misses = self.hits + whole, self.misses + (not whole)
        return whole


def _meta(entry: Path) -> dict[str, Any]:
    """`shapes`, and `sha256` unless an older version wrote it: that told the shapes alone."""
    meta = open_json((entry / META).read_bytes())
    return meta if "shapes" in meta else {"shapes": meta}


def _damage(entry: Path, meta: dict[str, Any]) -> str:
    """The first file that is not what was written, empty where all are."""
    if SUMS not in meta:
        return next((f"{name}.f32" for name, (n, width) in meta["shapes"].items()
                     if not n or (entry / f"{name}.f32").stat().st_size != 4 * n * width), "")
    files = [*(f"{name}.f32" for name in meta["shapes"]), *meta[SUMS]]
    return next((name for name in files if sha256_of(entry / name) != meta[SUMS][name]), "")


@contextmanager
def _building(entry: Path, ranks: Ranks) -> Iterator[Path]:
    """A folder that takes the entry's name when the block ends well on all ranks; leavings of killed processes are removed."""
    first = ranks.rank == 0
    partial = entry.with_name(f".{entry.name}.{ranks.sum(first * os.getpid())[0]}.partial")
    if first:
        for left in entry.parent.glob(".*.partial"):
            if not Path(f"/proc/{left.name.split('.')[-2]}").exists():
                shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.wait()
    try:
        with ranks.agreeing():
            if not partial.exists():
                raise WorkFailed(f"rank {ranks.rank} does not see {partial.parent}, rank 0 does: give a --cache on a disk that "
                                 "all machines share")
            yield partial
        if first:
            sums = {path.name: sha256_of(path) for path in partial.iterdir() if path.name != META}
            write_sealed_json(partial / META, _meta(partial) | {SUMS: sums})
        if first and not entry.exists():  # else another process was faster; what it wrote is the same
            partial.rename(entry)
        ranks.wait()
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)


def _store_images(folder: Path, subject: Subject, evalset: EvalSet, ranks: Ranks) -> None:
    targets: list[Target] = []

    def noted():
        for example in placed(evalset):
            targets.append(example[3])
            yield example

    places = count(ranks.rank * IMAGE_BATCH, ranks.world * IMAGE_BATCH)
    parts = ((range(place, place + len(arrays[0])), arrays)
             for place, arrays in zip(places, embed_images(subject, noted(), ranks), strict=False))
    _store_arrays(folder, ("h", "z"), parts, lambda: len(targets), ranks)
    if not targets:
        raise InputError(f"{evalset.shards[0].parent} holds no image at all: fetch or write split {evalset.split!r} again")
    if ranks.rank == 0:
        write_json(folder / TARGETS, targets)


def _store_arrays(folder: Path, names: tuple[str, ...], parts: Iterable[tuple[Iterable[int], tuple[np.ndarray, ...]]],
                  total: Callable[[], int], ranks: Ranks) -> None:
    """Raw fp32 rows at their places, so that their number need not be known before; the first rank tells the shapes."""
    widths = [0] * len(names)
    for name in names:
        (folder / f"{name}.f32").touch()
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"{name}.f32").open("r+b")) for name in names]
        for places, arrays in parts:
            for file, x_NW in zip(files, arrays, strict=True):
                for place, x_W in zip(places, np.ascontiguousarray(x_NW, np.float32), strict=True):
                    file.seek(int(place) * x_W.nbytes)
                    file.write(x_W.tobytes())
            widths = [x_NW.shape[1] for x_NW in arrays]
    if ranks.rank == 0:
        write_sealed_json(folder / META, {name: [total(), width] for name, width in zip(names, widths, strict=True)})


def _mapped(entry: Path, name: str) -> Tensor:
    shape = tuple(_meta(entry)["shapes"][name])
    return torch.from_numpy(np.memmap(entry / f"{name}.f32", np.float32, "c", shape=shape))
