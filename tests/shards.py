"""Small sets for the tests of what comes after a download: tars with planted likenesses, indexed."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline.indexing import build


def drawing(seed: int, side: int = 120) -> Image.Image:
    """A picture of its own: perceptual hashes of two of them are far apart."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(random.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        box = np.sort(random.integers(0, side, (2, 2)), axis=0).T.ravel()
        draw.ellipse((box[0], box[2], box[1] + 9, box[3] + 9), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def write_set(folder: Path, samples: list[tuple[bytes, dict]], per_tar: int = 50, index: bool = True) -> Path:
    """(image bytes, json) as tars, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(samples), per_tar):
        with tarfile.open(folder / f"{start // per_tar:05}.tar", "w") as tar:
            for number, (image, told) in enumerate(samples[start:start + per_tar], start):
                for suffix, data in (("jpg", image), ("json", json.dumps(told).encode())):
                    member = tarfile.TarInfo(f"{number:09}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    if index:
        build(folder, 1)
    return folder
