"""Executes augmentation vectors with Pillow: the portable executor, and the reference the other one is tested against.

A view is a pure function of (image, vector, output size); METHOD: crop box → resize → mirror → colour → blur → normalise,
with values rounded to 8 bit after resize, colour and blur.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from PIL import Image

from pipeline.images import upright_rgb
from pipeline.sampling import BLUR_WINDOW
from pipeline.schema import IDENTITY, MEAN, STD

_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)
_LEVELS = np.arange(256, dtype=np.float32)
_NORMALISED = [(_LEVELS / 255 - np.float32(mean)) / np.float32(std) for mean, std in zip(MEAN, STD, strict=True)]


def color_map(vector_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour as one affine map on RGB in 0…255: (3, 3) matrix and (3,) shift (METHOD §2; DALI's `color_twist`)."""
    brightness, contrast, saturation, hue = (float(x) for x in vector_A[4:8])
    angle = 2 * np.pi * hue
    keep = (1 + saturation) * (1 - float(vector_A[10]))
    cos, sin = keep * np.cos(angle), keep * np.sin(angle)
    turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    gain = (1 + brightness) * (1 + contrast)
    shift = (1 + brightness) * (128 - 128 * (1 + contrast))
    return gain * (_YIQ_TO_RGB @ turn @ _RGB_TO_YIQ), np.full(3, shift)


def resized(image: Image.Image, vector_A: np.ndarray, size: int) -> np.ndarray:
    """The crop box, bicubic with antialiasing → (S, S, 3) uint8."""
    x, y, w, h = (float(v) for v in vector_A[:4])
    box = (x * image.width, y * image.height, min(x + w, 1.0) * image.width, min(y + h, 1.0) * image.height)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def mirrored(pixels_HWC: np.ndarray, vector_A: np.ndarray) -> np.ndarray:
    """Left and right exchanged where the vector says so."""
    return cv2.flip(pixels_HWC, 1) if vector_A[9] else pixels_HWC


def coloured(pixels_HWC: np.ndarray, vector_A: np.ndarray) -> np.ndarray:
    """The colour map, in float, rounded once (half to even) and clipped by `add`."""
    if not vector_A[4:8].any() and not vector_A[10]:
        return pixels_HWC
    matrix, shift = color_map(vector_A)
    affine = np.concatenate([matrix, shift[:, None]], axis=1).astype(np.float32)
    return cv2.add(cv2.transform(pixels_HWC.astype(np.float32), affine), 0,  # pyright: ignore
                   dtype=cv2.CV_8U)


def blurred(pixels_HWC: np.ndarray, vector_A: np.ndarray) -> np.ndarray:
    """Gaussian blur in output pixels."""
    if vector_A[8] <= 0:
        return pixels_HWC
    window = (BLUR_WINDOW, BLUR_WINDOW)
    return cv2.GaussianBlur(pixels_HWC, window, float(vector_A[8]), borderType=cv2.BORDER_REFLECT_101)


def pixels(image: Image.Image, vector_A: np.ndarray, size: int) -> np.ndarray:
    """The view before normalisation → (S, S, 3) uint8. `image` is upright RGB."""
    return blurred(coloured(mirrored(resized(image, vector_A, size), vector_A), vector_A), vector_A)


def normalised(pixels_HWC: np.ndarray, out_CHW: np.ndarray | None = None) -> np.ndarray:
    """8-bit pixels → (3, S, S) float32 with CLIP's mean and standard deviation, by table (six times as fast)."""
    out_CHW = np.empty((3, *pixels_HWC.shape[:2]), np.float32) if out_CHW is None else out_CHW
    for channel, plane_HW in enumerate(cv2.split(pixels_HWC)):
        cv2.LUT(plane_HW, _NORMALISED[channel], dst=out_CHW[channel])
    return out_CHW


def view(image: Image.Image, vector_A: np.ndarray, size: int, out_CHW: np.ndarray | None = None) -> np.ndarray:
    """The view of an upright RGB image → (3, S, S) float32, normalised, in `out_CHW` when given."""
    return normalised(pixels(image, vector_A, size), out_CHW)


def center_crop(width: int, height: int) -> np.ndarray:
    """The vector of the largest central square of a width × height image → (11,) float32."""
    vector = IDENTITY.copy()
    w, h = min(1.0, height / width), min(1.0, width / height)
    vector[:4] = (1 - w) / 2, (1 - h) / 2, w, h
    return vector


def eval_view(data: bytes, size: int) -> np.ndarray:
    """Encoded image → its central square, as evaluation sees it, (3, S, S) float32. Raises Undecodable."""
    image = upright_rgb(data)
    return view(image, center_crop(*image.size), size)


class PillowExecutor:
    """Encoded images and their vectors → views, on threads (Pillow, OpenCV and NumPy release the GIL)."""

    def __init__(self, size: int, threads: int | None = None):
        self.size = size
        cv2.setNumThreads(1)  # a sample a thread is enough; OpenCV's own threads would only get in their way
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="replay")

    def __call__(self, encoded: list[bytes], vector_BVA: np.ndarray, sample_id_B: np.ndarray
                 ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """→ V tensors (B, 3, S, S) float32, vectors (B, V, 11), ids (B,). Raises Undecodable."""
        batch, count = vector_BVA.shape[:2]
        views = [np.empty((batch, 3, self.size, self.size), np.float32) for _ in range(count)]

        def execute(b: int) -> None:
            image = upright_rgb(encoded[b], checked=False)
            for v in range(count):
                view(image, vector_BVA[b, v], self.size, views[v][b])

        list(self._pool.map(execute, range(batch)))
        return [torch.from_numpy(v) for v in views], torch.from_numpy(vector_BVA), torch.from_numpy(sample_id_B)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
