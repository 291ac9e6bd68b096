"""What is evaluated: a checkpoint of ours, or any open_clip model with a weights file, behind one set of functions.

B batch, L tokens, W width of the image tower, D embedding.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.console import InputError, existing
from pipeline.files import sha256_of
from pipeline.images import upright_rgb
from pipeline.replay import eval_view
from trainer.checkpoint import TOKENIZER, Loaded
from trainer.distributed import pick_device
from trainer.export import open_model
from trainer.pretrained import read_by_us
from trainer.weights_file import fitting, one_line

DEVICE = "--device "
CROP_NAME = "central square, bicubic {} px, CLIP mean and std, identity vector, fp32"

Pixels = np.ndarray
ImageEncoder = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A model ready to be measured. `home` is where its results go, `text_sha256` tells its texts' embeddings apart.

    view: encoded image → (3, S, S) float32; encode_image: (B, 3, S, S) → h (B, W), z (B, D); tokenize: texts →
    (n, L) int64, and encode_text takes fewer columns where there is a `padding`: nothing right of the end token changes z.
    """

    name: str
    home: Path
    weights_sha256: str
    text_sha256: str
    transform: str
    device: torch.device
    view: Callable[[bytes], Pixels]
    encode_image: ImageEncoder
    encode_text: Callable[[Tensor], Tensor]
    tokenize: Callable[[list[str]], np.ndarray]
    padding: int | None
    model: torch.nn.Module


def checkpoint_subject(path: Path, device: str = "auto") -> Subject:
    """A run, checkpoint or export folder of ours, or hf://ORG/NAME. Raises InputError when there is none or it is damaged."""
    device = pick_device(device, DEVICE)
    loaded = open_model(path, device)
    return Subject(loaded.folder.name, loaded.run, loaded.weights_sha256, sha256_of(loaded.folder / TOKENIZER),
                   CROP_NAME.format(loaded.image_size), torch.device(device),
                   lambda data: eval_view(data, loaded.image_size), _our_images(loaded), loaded.model.encode_text,
                   loaded.tokenizer, 0, loaded.model)


def _our_images(loaded: Loaded) -> ImageEncoder:
    """h and z of one pass: h is what the head is given."""
    model, seen = loaded.model, []
    model.image.register_forward_hook(lambda module, inputs, output: seen.append(output))

    def encode(image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        seen.clear()
        z_BD = model.encode_image(image_BCHW)
        return seen.pop(), z_BD

    return encode


def open_clip_subject(arch: str, weights: Path, device: str = "auto") -> Subject:
    """Any architecture open_clip knows with a weights file. Raises InputError."""
    import open_clip

    device = pick_device(device, DEVICE)
    existing(weights, "weights file", "give a file that open_clip can load")
    if arch not in open_clip.list_models():
        raise InputError(f"open_clip {open_clip.__version__} knows no architecture {arch}: "
                         "open_clip.list_models() lists them")
    try:
        with fitting(weights, arch, "give the architecture it was trained with"), read_by_us():
            made: Any = open_clip.create_model_and_transforms(arch, pretrained=str(weights))
            (model, _, transform), tokenize = made, open_clip.get_tokenizer(arch)
    except OSError as error:
        if error.errno is not None:  # of the disk; those of the Hub's client have no number
            raise
        raise InputError(f"{arch} has its tokenizer or text tower at the Hub, and it cannot be had ({one_line(error)}): run "
                         "once where the Hub answers, or give another architecture") from None
    steps = " ".join(str(transform).split())
    return Subject(arch, weights.parent, sha256_of(weights), hashlib.sha256(arch.encode()).hexdigest(),
                   f"open_clip {steps}, fp32", torch.device(device), lambda data: transform(upright_rgb(data)).numpy(),
                   _their_images(model), model.encode_text, lambda texts: tokenize(texts).numpy(), None,
                   model.eval().to(device))


def _their_images(model: Any) -> ImageEncoder:
    """h is the feature before the projection where the tower has one as a matrix (its ViTs), z itself elsewhere.

    CoCa's tower returns the tokens for its captions beside the feature, and its z has length 1.
    """
    visual, coca = model.visual, hasattr(model, "text_decoder")
    projection = getattr(visual, "proj", None)
    if isinstance(projection, torch.nn.Parameter):
        visual.proj = None  # the tower then returns what it would have projected
    else:
        projection = None

    def encode(image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        h_BW = visual(image_BCHW)[0] if coca else visual(image_BCHW)
        z_BD = h_BW if projection is None else h_BW @ projection
        return h_BW, torch.nn.functional.normalize(z_BD, dim=-1) if coca else z_BD

    return encode
