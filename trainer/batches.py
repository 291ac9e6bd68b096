"""Pictures and texts in batches of one fixed size, for evaluation during and after training.

A matrix product of another height may round differently, so the last batch is filled up with zeros: an embedding
does not depend on how many others were asked for. N items, n of them in a batch, L tokens.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np
from jaxtyping import Int
from torch import Tensor

T = TypeVar("T")
IMAGE_BATCH, TEXT_BATCH = 64, 256
LENGTHS = (12, 16, 24, 32, 48)  # texts are encoded at the first of these they fit in, or at full length


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter where they do not divide."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def filled(items_nX: np.ndarray, size: int) -> np.ndarray:
    """At most `size` items as a batch of exactly `size`."""
    padded_BX = np.zeros((size, *items_nX.shape[1:]), items_nX.dtype)
    padded_BX[:len(items_nX)] = items_nX
    return padded_BX


def text_batches(token_NL: np.ndarray, padding: int | None, size: int) -> list[tuple[np.ndarray, int]]:
    """(places in `token_NL`, how many of its columns they are encoded with) of one batch after another.

    Short texts go without the `padding` they do not need, where it is given, in batches of equal length. The length
    depends on the text alone, so an embedding does not depend on its company.
    """
    length_N = _lengths(token_NL, padding)
    places = ((np.flatnonzero(length_N == length), int(length)) for length in np.unique(length_N))
    return [(at_n[begin:begin + size], length) for at_n, length in places for begin in range(0, len(at_n), size)]


def text_lengths(context: int) -> list[int]:
    """How many columns texts may be encoded with."""
    return [*(length for length in LENGTHS if length < context), context]


def without_padding(token_BTL: Int[Tensor, "B T L"], end_id: int) -> Int[Tensor, "B T X"]:
    """The first columns, as many as the longest of these texts needs.

    What follows a text's end token changes neither its embedding nor a gradient, but costs the tower as much as words.
    """
    columns = token_BTL.shape[2]
    used = int((token_BTL == end_id).cumsum(2).eq(0).sum(2).max()) + 1 if len(token_BTL) else columns
    return token_BTL[:, :, :next(length for length in text_lengths(columns) if length >= min(used, columns))]


def _lengths(token_NL: np.ndarray, padding: int | None) -> np.ndarray:
    """How many columns each text is encoded with."""
    full = token_NL.shape[1]
    if padding is None:
        return np.full(len(token_NL), full)
    used_N = full - np.argmax(token_NL[:, ::-1] != padding, axis=1)
    steps = np.array(text_lengths(full))
    return steps[np.searchsorted(steps, used_N)]
