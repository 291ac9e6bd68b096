"""Pictures and texts → embeddings, in batches of one fixed size.

A matrix product of another height may round differently, so the last batch is filled up with zeros: an embedding
does not depend on how many others were asked for. B = batch, N items, D embedding, W width of f_I.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.console import InputError, WorkFailed, track
from pipeline.evalsets import EvalSet, Target
from pipeline.images import Undecodable
from pipeline.replay import eval_view
from trainer.checkpoint import Loaded

IMAGE_BATCH, TEXT_BATCH = 64, 256

Example = tuple[Path, str, bytes, Target]  # shard, key, encoded image, label or captions

# z is what is compared with texts (seen through the identity vector); h is f_I's feature, for probes.
FEATURES: dict[str, Callable[[Loaded], Callable[[Tensor], Tensor]]] = {
    "z": lambda loaded: loaded.model.encode_image,
    "h": lambda loaded: loaded.model.image_features,
}


def pick_device(name: str) -> str:
    """"auto" is CUDA where there is a GPU. Raises InputError for a CUDA device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}, but torch sees no CUDA device: use --device cpu or auto")
    return name


def transform_name(image_size: int) -> str:
    """What is done to a picture, as the result rows say it."""
    return f"central square, bicubic {image_size} px, CLIP mean and std, identity vector, fp32"


def placed(evalset: EvalSet) -> Iterator[Example]:
    """The examples of a set with the shard each is in, so that errors can name it."""
    for shard in evalset.shards:
        for key, image, target in evalset.read(shard):
            yield shard, key, image, target


def _pixels(example: Example, size: int) -> np.ndarray:
    shard, key, image, _ = example
    try:
        return eval_view(image, size)
    except Undecodable as error:
        raise WorkFailed(f"{shard}, key {key}: the image cannot be decoded ({error}); repair the set or remove it") \
            from None


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


@torch.inference_mode()
def _fixed(encode: Callable[[Tensor], Tensor], items_NX: np.ndarray, size: int, device: torch.device) -> Tensor:
    """Encode at most `size` items as a batch of exactly `size`."""
    padded_BX = np.zeros((size, *items_NX.shape[1:]), items_NX.dtype)
    padded_BX[:len(items_NX)] = items_NX
    return encode(torch.from_numpy(padded_BX).to(device))[:len(items_NX)].float().cpu()


def _device(loaded: Loaded) -> torch.device:
    return next(loaded.model.parameters()).device


def embed_images(loaded: Loaded, examples: Iterable[Example], feature: str = "z") -> Tensor:
    """(N, D) "z", or (N, W) "h", not normalised, fp32 on the CPU. Raises WorkFailed naming shard and key."""
    encode, device = FEATURES[feature](loaded), _device(loaded)
    view = partial(_pixels, size=loaded.image_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        batches = (np.stack(list(pool.map(view, batch))) for batch in _batches(examples, IMAGE_BATCH))
        return torch.cat([_fixed(encode, batch, IMAGE_BATCH, device) for batch in track(batches, "embedding images")])


def embed_texts(loaded: Loaded, texts: list[str]) -> Tensor:
    """(N, D) embeddings of captions or prompts, not normalised, fp32 on the CPU."""
    device, batches = _device(loaded), list(_batches(texts, TEXT_BATCH))
    return torch.cat([_fixed(loaded.model.encode_text, loaded.tokenizer(batch), TEXT_BATCH, device)
                      for batch in track(batches, "embedding texts")])
