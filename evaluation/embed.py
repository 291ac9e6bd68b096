"""Pictures and texts → embeddings, in batches of one fixed size (trainer.batches). N items, D embedding, W width of f_I."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.subject import Subject
from pipeline.console import WorkFailed, track
from pipeline.evalsets import EvalSet, Target
from pipeline.images import Undecodable
from trainer.batches import IMAGE_BATCH, TEXT_BATCH, batched, filled, text_batches
from trainer.distributed import ALONE, Ranks

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


@torch.inference_mode()
def _fixed(encode: Callable[[Tensor], tuple[Tensor, ...]], items_NX: np.ndarray, size: int,
           device: torch.device) -> list[np.ndarray]:
    """Encode at most `size` items as a batch of exactly `size`."""
    encoded = encode(torch.from_numpy(filled(items_NX, size)).to(device))
    return [x[:len(items_NX)].float().cpu().numpy() for x in encoded]


def embed_images(subject: Subject, examples: Iterable[Example], ranks: Ranks = ALONE
                 ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield h (n, W) and z (n, D) of one batch after another, not normalised, fp32. Rank r of W embeds every W-th batch.

    Raises WorkFailed naming shard and key of an image that cannot be decoded.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, batch in enumerate(track(batched(examples, IMAGE_BATCH), "embedding images")):
            if number % ranks.world != ranks.rank:
                continue
            pixels_BCHW = np.stack(list(pool.map(lambda example: _pixels(subject, example), batch)))
            h_BW, z_BD = _fixed(subject.encode_image, pixels_BCHW, IMAGE_BATCH, subject.device)
            yield h_BW, z_BD


def text_parts(subject: Subject, texts: list[str], ranks: Ranks = ALONE) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (places in `texts`, their embeddings (n, D), not normalised, fp32). Rank r of W embeds every W-th batch."""
    token_NL = np.concatenate([subject.tokenize(batch) for batch in batched(texts, 16 * TEXT_BATCH)])
    own = text_batches(token_NL, subject.padding, TEXT_BATCH)[ranks.rank::ranks.world]
    for rows, length in track(own, "embedding texts"):
        z_BD, = _fixed(lambda token_BL: (subject.encode_text(token_BL),), token_NL[rows, :length], TEXT_BATCH,
                       subject.device)
        yield rows, z_BD


def embed_texts(subject: Subject, texts: list[str]) -> Tensor:
    """(N, D) embeddings of captions or prompts, not normalised, fp32 on the CPU."""
    row_N, z_ND = map(np.concatenate, zip(*text_parts(subject, texts), strict=True))
    return torch.from_numpy(z_ND[np.argsort(row_N)])
