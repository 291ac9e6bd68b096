"""Encoded images → views on the device, whatever the bytes turn out to be: a bad image costs its sample, not the run."""

import traceback
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.faults import Recurring, reason
from pipeline.images import Undecodable, header, plain_bytes, upright_rgb
from pipeline.recipe import Executor, Views

FORGOTTEN = "forgotten"  # the reason of a sample taken down after the index was made: nobody reads it, nobody counts it
BLANK = b"P6 1 1 255\n\0\0\0"  # stands in for an image that cannot be decoded; its group is marked invalid


def fit(data: bytes, plain: bool) -> bytes:
    """An image's bytes, fit for any executor. Raises Undecodable.

    What the index called a plain JPEG must still begin and end like one: DALI 2.4 has a segmentation fault, not an
    exception, when one image of a larger batch has no readable header, and decoders differ on what they make of a file
    without its end. Damage in between is found when the executor decodes.
    """
    if not plain:
        return plain_bytes(data, checked=False)
    header(data, ("JPEG",))
    if b"\xff\xd9" not in data[-1024:]:
        upright_rgb(data)
    return data


def execute(executor: Executor, encoded: Sequence[bytes | Exception], vectors: np.ndarray, ids: np.ndarray,
            repaired: Recurring | None = None) -> tuple[Views, dict[int, str]]:
    """The views, and position → reason of every image that is not there or that the executor broke on.

    A batch on which it breaks is decoded again, picture by picture, and `repaired` is told. Raises what no image is to
    blame for, from `encoded` and from the executor.
    """
    bad = {b: reason(data, Undecodable, OSError) for b, data in enumerate(encoded) if isinstance(data, Exception)}
    given = [BLANK if isinstance(data, Exception) else data for data in encoded]
    try:
        return executor(given, vectors, ids), bad
    except Undecodable as error:
        traceback.clear_frames(error.__traceback__)  # they hold a batch of views, in cycles that only gc would find
        if repaired:
            repaired.happened(str(error))
    for b, data in enumerate(given):  # an image nobody suspected: find it, and run again without it
        try:
            given[b] = plain_bytes(data)
        except Undecodable as error:
            given[b], bad[b] = BLANK, str(error)
    return executor(given, vectors, ids), bad


class Guarded:
    """An executor that a bad image does not stop, and that says how often a batch had to be repaired."""

    def __init__(self, executor: Executor):
        self._executor = executor
        self.repaired = Recurring("a batch of images had to be decoded a second time, which takes longer")

    def __call__(self, encoded: Sequence[bytes | Exception], vectors: np.ndarray, ids: np.ndarray
                 ) -> tuple[Views, dict[int, str]]:
        """As `execute`."""
        return execute(self._executor, encoded, vectors, ids, self.repaired)

    def close(self) -> None:
        """Give back the executor's memory."""
        self._executor.close()


def valid_mask(count: int, bad: dict[int, str]) -> torch.Tensor:
    """(count,) bool, False where bad."""
    valid = torch.ones(count, dtype=torch.bool)
    valid[list(bad)] = False
    return valid
