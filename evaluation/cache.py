"""Features once: h and z of a set under a name made of everything they depend on, memory-mapped, shared by all tasks.

    CACHE/<key>/meta.json  h.f32  z.f32  targets.json      pictures of one split
    CACHE/<key>/meta.json  z.f32                           texts
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.embed import embed_images, embed_texts, placed
from evaluation.subject import Subject
from pipeline.evalsets import EvalSet, Target
from pipeline.files import write_json

VERSION = 1
META, TARGETS = "meta.json", "targets.json"


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

    def images(self, subject: Subject, evalset: EvalSet) -> Features:
        """The features of a split. Raises WorkFailed for an image that cannot be decoded."""
        entry = self._entry("images", subject.weights_sha256, evalset.manifest_sha256, subject.transform,
                            subject.device.type)
        if not self._found(entry):
            with _building(entry) as folder:
                _store_images(folder, subject, evalset)
        targets = json.loads((entry / TARGETS).read_text(encoding="utf-8"))
        return Features(_mapped(entry, "h"), _mapped(entry, "z"), targets)

    def texts(self, subject: Subject, texts: list[str]) -> Tensor:
        """(T, D) embeddings of prompts or captions, not normalised."""
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        entry = self._entry("texts", subject.weights_sha256, subject.text_sha256, digest, subject.device.type)
        if not self._found(entry):
            with _building(entry) as folder:
                _store_arrays(folder, ("z",), [(embed_texts(subject, texts).numpy(),)])
        return _mapped(entry, "z")

    def _entry(self, *depends_on: str) -> Path:
        return self.folder / hashlib.sha256(json.dumps([VERSION, *depends_on]).encode()).hexdigest()[:32]

    def _found(self, entry: Path) -> bool:
        """Whether the entry is there and its files are as long as it says; a damaged one is removed."""
        whole = (entry / META).exists()
        if whole:
            shapes = json.loads((entry / META).read_text())
            whole = all((entry / f"{name}.f32").stat().st_size == 4 * n * d for name, (n, d) in shapes.items())
        if entry.exists() and not whole:
            shutil.rmtree(entry)
        self.hits, self.misses = self.hits + whole, self.misses + (not whole)
        return whole


@contextmanager
def _building(entry: Path) -> Iterator[Path]:
    """A folder that takes the entry's name when the block ends well; leavings of killed processes are removed."""
    for left in entry.parent.glob(".*.partial"):
        if not Path(f"/proc/{left.name.split('.')[-2]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    partial = entry.with_name(f".{entry.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if entry.exists():  # another process was faster; what it wrote is the same
            return
        partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _store_images(folder: Path, subject: Subject, evalset: EvalSet) -> None:
    targets: list[Target] = []

    def noted():
        for example in placed(evalset):
            targets.append(example[3])
            yield example

    _store_arrays(folder, ("h", "z"), embed_images(subject, noted()))
    write_json(folder / TARGETS, targets)


def _store_arrays(folder: Path, names: tuple[str, ...], batches: Iterable[tuple[np.ndarray, ...]]) -> None:
    """Raw fp32 rows, so that they can be appended while their number is not known; the shapes go to meta.json."""
    rows, widths = 0, [0] * len(names)
    files = [(folder / f"{name}.f32").open("wb") for name in names]
    try:
        for arrays in batches:
            for file, x_NW in zip(files, arrays, strict=True):
                file.write(np.ascontiguousarray(x_NW, np.float32).tobytes())
            rows, widths = rows + len(arrays[0]), [x_NW.shape[1] for x_NW in arrays]
    finally:
        for file in files:
            file.close()
    write_json(folder / META, {name: [rows, width] for name, width in zip(names, widths, strict=True)})


def _mapped(entry: Path, name: str) -> Tensor:
    shape = tuple(json.loads((entry / META).read_text())[name])
    return torch.from_numpy(np.memmap(entry / f"{name}.f32", np.float32, "c", shape=shape))
