"""Pictures and texts → embeddings, in batches of one fixed size.

A matrix product of another height may round differently, so the last batch is filled up with zeros: an embedding
does not depend on how many others were asked for. B = batch, N items, L tokens, D embedding, W width of f_I.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.subject import Subject
from pipeline.console import WorkFailed, track
from pipeline.evalsets import EvalSet, Target
from pipeline.images import Undecodable

IMAGE_BATCH, TEXT_BATCH = 64, 256
LENGTHS = (12, 16, 24, 32, 48)  # texts are encoded at the first of these they fit in, or at full length

Example = tuple[Path, str, bytes, Target]  # shard, key, encoded image, label or captions


def placed(evalset: EvalSet) -> Iterator[Example]:
    """The examples of a set with the shard each is in, so that errors can name it."""
    for shard in evalset.shards:
        for key, image, target in evalset.read(shard):
            yield shard, key, image, target


def _pixels(subject: Subject, example: Example) -> np.ndarray:
    shard, key, image, _ = example
    try:
        return subject.view(image)
    except Undecodable as error:
        raise WorkFailed(f"{shard}, key {key}: the image cannot be decoded ({error}); repair the set or remove it") \
            from None


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


@torch.inference_mode()
def _fixed(encode: Callable[[Tensor], tuple[Tensor, ...]], items_NX: np.ndarray, size: int,
           device: torch.device) -> list[np.ndarray]:
    """Encode at most `size` items as a batch of exactly `size`."""
    padded_BX = np.zeros((size, *items_NX.shape[1:]), items_NX.dtype)
    padded_BX[:len(items_NX)] = items_NX
    return [x[:len(items_NX)].float().cpu().numpy() for x in encode(torch.from_numpy(padded_BX).to(device))]


def embed_images(subject: Subject, examples: Iterable[Example]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield h (n, W) and z (n, D) of one batch after another, not normalised, fp32.

    Raises WorkFailed naming shard and key of an image that cannot be decoded.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in track(_batches(examples, IMAGE_BATCH), "embedding images"):
            pixels_BCHW = np.stack(list(pool.map(lambda example: _pixels(subject, example), batch)))
            h_BW, z_BD = _fixed(subject.encode_image, pixels_BCHW, IMAGE_BATCH, subject.device)
            yield h_BW, z_BD


def embed_texts(subject: Subject, texts: list[str]) -> Tensor:
    """(N, D) embeddings of captions or prompts, not normalised, fp32 on the CPU.

    Short texts are encoded without the padding they do not need, in batches of equal length. The length depends on
    the text alone, so an embedding does not depend on its company.
    """
    token_NL = np.concatenate([subject.tokenize(batch) for batch in _batches(texts, 16 * TEXT_BATCH)])
    length_N = _lengths(token_NL, subject)
    found: np.ndarray | None = None
    for length in track(np.unique(length_N).tolist(), "embedding texts"):
        at_n = np.flatnonzero(length_N == length)
        for begin in range(0, len(at_n), TEXT_BATCH):
            rows = at_n[begin:begin + TEXT_BATCH]
            z_BD, = _fixed(lambda token_BL: (subject.encode_text(token_BL),), token_NL[rows, :length], TEXT_BATCH,
                           subject.device)
            found = np.empty((len(texts), z_BD.shape[1]), np.float32) if found is None else found
            found[rows] = z_BD
    return torch.from_numpy(found)


def _lengths(token_NL: np.ndarray, subject: Subject) -> np.ndarray:
    """How many columns each text is encoded with."""
    full = token_NL.shape[1]
    if not subject.trims:
        return np.full(len(token_NL), full)
    used_N = full - np.argmax(token_NL[:, ::-1] != subject.padding, axis=1)
    steps = np.array([*(length for length in LENGTHS if length < full), full])
    return steps[np.searchsorted(steps, used_N)]
