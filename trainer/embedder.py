"""A trained model as one uses it: pictures and texts in, features out. `from trainer import load` opens one.

B batch, L tokens, W width of a tower, D embedding, S image size.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.images import flatten
from pipeline.replay import center_crop, view
from trainer.export import open_model

Images = Image.Image | Sequence[Image.Image] | Tensor
Texts = str | Sequence[str] | Tensor


def transform_to(image_size: int) -> Callable[[Image.Image], Tensor]:
    """A decoded picture of any mode as evaluation sees it → (3, S, S) float32, bit-equal to `eval_view` of its file."""

    def transform(image: Image.Image) -> Tensor:
        upright = flatten(image)
        return torch.from_numpy(view(upright, center_crop(*upright.size), image_size))

    return transform


class Embedder:
    """`preprocess`, `encode_image` and `encode_text` give z, `image_features` and `text_features` h.

    Pictures are Pillow images or preprocessed pixels (B, 3, S, S), texts strings or token ids (B, L). A call is one batch.
    Images are seen through the identity vector. Features are float32 on the model's device, without a gradient.
    """

    def __init__(self, source: str | Path, device: str = "cpu"):
        self.loaded = open_model(source, device)
        self.model, self.tokenizer, self.image_size = self.loaded.model, self.loaded.tokenizer, self.loaded.image_size
        self.preprocess = transform_to(self.image_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Embedder":
        """This model, moved to `device`."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode_image(self, images: Images, normalize: bool = False) -> Tensor:
        """z: what zero-shot and retrieval compare → (B, D), of length 1 when `normalize`."""
        return _scaled(self.model.encode_image(self._pixels(images)), normalize)

    @torch.no_grad()
    def encode_text(self, texts: Texts, normalize: bool = False) -> Tensor:
        """z of captions → (B, D), of length 1 when `normalize`."""
        return _scaled(self.model.encode_text(self._tokens(texts)), normalize)

    @torch.no_grad()
    def image_features(self, images: Images, normalize: bool = False) -> Tensor:
        """h: what a linear probe is trained on → (B, W)."""
        return _scaled(self.model.image_features(self._pixels(images)), normalize)

    @torch.no_grad()
    def text_features(self, texts: Texts, normalize: bool = False) -> Tensor:
        """h of captions, before the projection → (B, W)."""
        return _scaled(self.model.text(self._tokens(texts)), normalize)

    def _pixels(self, images: Images) -> Tensor:
        if isinstance(images, Image.Image):
            images = [images]
        pixels = images if isinstance(images, Tensor) else torch.stack([self.preprocess(image) for image in images])
        return pixels.to(self.device)

    def _tokens(self, texts: Texts) -> Tensor:
        if isinstance(texts, str):
            texts = [texts]
        tokens = texts if isinstance(texts, Tensor) else torch.from_numpy(self.tokenizer(list(texts)))
        return tokens.to(self.device)


def _scaled(feature_BX: Tensor, normalize: bool) -> Tensor:
    return nn.functional.normalize(feature_BX, dim=1) if normalize else feature_BX
