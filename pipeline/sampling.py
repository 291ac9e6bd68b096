"""(seed, epoch, repeat, sample, view) → augmentation vector, as a pure function.

Counter-based: every number is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of a
counter that names what it is for. Nothing depends on batch size, rank, worker or restart point. NumPy's Philox
makes one generator object per key; here many keys are evaluated at once, so the twenty lines are our own.
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.schema import IDENTITY, VECTOR_SIZE

VIEW_STREAM, CAPTION_STREAM, SHARD_STREAM, ROW_STREAM, SUBSET_STREAM, EDA_STREAM, MASK_STREAM = range(7)
BLUR_WINDOW = 13  # output pixels
CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop, then the largest central crop of legal aspect

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

# Name → least, most and what they are of. The blur's window holds three sigma on either side of its middle.
VIEW_RANGES = {"area": (0.001, 1.0, "shares of the image"), "aspect": (0.01, 100.0, "width / height"),
               "blur_sigma": (0.01, (BLUR_WINDOW - 1) / 6, f"sigmas that a window of {BLUR_WINDOW} pixels holds")}
MAX_JITTER = (1.0, 1.0, 1.0, 0.5)  # of a factor; of a turn


@dataclass(frozen=True)
class ViewKind:
    """How one view is drawn. Ranges are closed; `jitter` holds the half-widths of brightness, contrast, saturation, hue.

    area: share of the image's area; aspect: width / height; blur_sigma in output pixels; *_p: probabilities.
    """

    area: tuple[float, float] = (0.5, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    gray_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_p: float = 0.0
    flip_p: float = 0.0


WEAK = ViewKind()
STRONG = ViewKind(area=(0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5, flip_p=0.5)
MEDIUM = replace(STRONG, area=(0.2, 1.0))  # MoCo v2's, which DeCLIP uses
KINDS = {"weak": WEAK, "medium": MEDIUM, "strong": STRONG}

# The views of one sample, by kind, as each system's public code draws them.
RECIPES = {
    "uniclip": ("weak", "strong", "strong"),
    "3weak": ("weak", "weak", "weak"),
    "3strong": ("strong", "strong", "strong"),
    "clip": ("weak",),
    "slip": ("weak", "strong", "strong"),
    "declip": ("medium", "medium"),
}


def philox(counter_4: tuple[np.ndarray, ...], key: int) -> np.ndarray:
    """Philox4x32-10 of four broadcastable uint32 counter words and a 64-bit key → (4, …) uint32."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in np.broadcast_arrays(*counter_4))
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        low, high = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (high >> _SHIFT) ^ c1 ^ np.uint64(k0), high & _LOW, (low >> _SHIFT) ^ c3 ^ np.uint64(k1), low & _LOW
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def uniforms(seed: int, epoch: np.ndarray | int, repeat: np.ndarray | int, sample_id_B: np.ndarray, stream: int,
             item: int, count: int) -> np.ndarray:
    """`count` independent numbers in (0, 1) for each sample → (count, B) float64.

    epoch and repeat may differ by sample. `item` tells apart uses within a stream (the view's index); at most 256
    items, 255 repeats and 1,024 numbers.
    """
    ids = np.asarray(sample_id_B, dtype=np.int64).view(np.uint64)
    block = np.arange(-(-count // 4), dtype=np.uint64)[:, None]
    use = (np.uint64(stream) << np.uint64(24)) | (np.asarray(repeat, np.uint64) << np.uint64(16)) | np.uint64(item << 8)
    words = philox((ids & _LOW, ids >> _SHIFT, np.asarray(epoch, np.uint64), use | block), seed)
    return (words.transpose(1, 0, 2).reshape(-1, len(ids))[:count].astype(np.float64) + 0.5) * 2.0**-32


def _crop(u: np.ndarray, kind: ViewKind, width_B: np.ndarray, height_B: np.ndarray) -> np.ndarray:
    """RandomResizedCrop's law, sub-pixel: first of CROP_ATTEMPTS boxes that fits, else the central one → (B, 4)."""
    area_KB = kind.area[0] + (kind.area[1] - kind.area[0]) * u[:CROP_ATTEMPTS]
    low, high = np.log(kind.aspect[0]), np.log(kind.aspect[1])
    aspect_KB = np.exp(low + (high - low) * u[CROP_ATTEMPTS : 2 * CROP_ATTEMPTS])
    shape_B = width_B / height_B
    w_KB, h_KB = np.sqrt(area_KB * aspect_KB / shape_B), np.sqrt(area_KB / aspect_KB * shape_B)
    fits_KB = (w_KB <= 1) & (h_KB <= 1)
    first_B = fits_KB.argmax(0)
    each_B = np.arange(len(width_B))
    central_B = np.clip(shape_B, *kind.aspect)
    fallback = ~fits_KB.any(0)
    w_B = np.where(fallback, np.minimum(1, central_B / shape_B), w_KB[first_B, each_B])
    h_B = np.where(fallback, np.minimum(1, shape_B / central_B), h_KB[first_B, each_B])
    place_x, place_y = (np.where(fallback, 0.5, u[2 * CROP_ATTEMPTS + i]) for i in (0, 1))
    return np.stack([place_x * (1 - w_B), place_y * (1 - h_B), w_B, h_B], axis=1)


def _view(seed: int, epoch: np.ndarray | int, repeat: np.ndarray | int, ids_B: np.ndarray, size_B2: np.ndarray,
          view: int, kind: ViewKind) -> np.ndarray:
    u = uniforms(seed, epoch, repeat, ids_B, VIEW_STREAM, view, 2 * CROP_ATTEMPTS + 11)
    gate_jitter, b, c, s, h, gate_gray, gate_blur, sigma, gate_flip = u[2 * CROP_ATTEMPTS + 2 :]
    vector = np.tile(IDENTITY.astype(np.float64), (len(ids_B), 1))
    vector[:, 0:4] = _crop(u, kind, size_B2[:, 0], size_B2[:, 1])
    jitter = np.stack([b, c, s, h], 1) * 2 - 1
    vector[:, 4:8] = np.where((gate_jitter < kind.jitter_p)[:, None], jitter * np.array(kind.jitter), 0.0)
    low, high = kind.blur_sigma
    vector[:, 8] = (low + (high - low) * sigma) * (gate_blur < kind.blur_p)
    vector[:, 9] = gate_flip < kind.flip_p
    vector[:, 10] = gate_gray < kind.gray_p
    return vector.astype(np.float32)


def sample_vectors(seed: int, epoch: np.ndarray | int, repeat: np.ndarray | int, sample_id_B: np.ndarray,
                   size_B2: np.ndarray, kinds: tuple[ViewKind, ...]) -> np.ndarray:
    """Vectors of B samples → (B, V, 11) float32 (METHOD: `schema.VECTOR` names the numbers).

    size_B2: upright width and height in pixels. Raises ValueError when there is no view kind or more than 256.
    """
    if not 0 < len(kinds) <= 256:
        raise ValueError(f"{len(kinds)} view kinds; give 1 to 256")
    views = [_view(seed, epoch, repeat, sample_id_B, size_B2, view, kind) for view, kind in enumerate(kinds)]
    return np.stack(views, axis=1) if len(sample_id_B) else np.empty((0, len(kinds), VECTOR_SIZE), np.float32)


def draw_captions(seed: int, epoch: np.ndarray | int, repeat: np.ndarray | int, sample_id_B: np.ndarray,
                  count_B: np.ndarray) -> np.ndarray:
    """Which of each sample's captions to use: uniform in 0…count−1 → (B,) int64."""
    u = uniforms(seed, epoch, repeat, sample_id_B, CAPTION_STREAM, 0, 1)[0]
    return (u * count_B).astype(np.int64)
