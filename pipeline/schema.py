"""The contracts: augmentation vector, URL table, index columns, Batch.

Every format here carries `SCHEMA_VERSION`; a reader refuses a version it does not know.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1

# CLIP's normalisation, on RGB in 0…1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Field:
    """One number of the augmentation vector."""

    name: str
    unit: str
    identity: float


VECTOR = (
    Field("crop_x", "fraction of width, 0 = left", 0.0),
    Field("crop_y", "fraction of height, 0 = top", 0.0),
    Field("crop_w", "fraction of width", 1.0),
    Field("crop_h", "fraction of height", 1.0),
    Field("brightness", "factor − 1", 0.0),
    Field("contrast", "factor − 1", 0.0),
    Field("saturation", "factor − 1", 0.0),
    Field("hue", "fraction of a full turn", 0.0),
    Field("blur_sigma", "output pixels", 0.0),
    Field("flipped", "0 or 1, mirrored left-right", 0.0),
    Field("grayscaled", "0 or 1", 0.0),
)
VECTOR_SIZE = len(VECTOR)
IDENTITY = np.array([field.identity for field in VECTOR], dtype=np.float32)
IDENTITY.setflags(write=False)

URLS = pa.schema(
    [("url", pa.string()), ("captions", pa.list_(pa.string())), ("source", pa.string()),
     ("source_row", pa.int64()), ("sample_id", pa.int64())],
    metadata={"uniclip.schema": f"urls/{SCHEMA_VERSION}"},
)

INDEX = pa.schema(
    [("shard", pa.dictionary(pa.int32(), pa.string())),   # path of the tar, relative to the index's folder
     ("key", pa.string()),                                # WebDataset key: member name up to its first dot
     ("offset", pa.int64()), ("size", pa.int64()),        # of the image's bytes inside the tar
     ("width", pa.int32()), ("height", pa.int32()),       # upright (EXIF orientation applied)
     ("plain", pa.bool_()),                               # an upright 8-bit RGB or grey JPEG, fit for any executor as it is
     ("captions", pa.list_(pa.string())),
     ("sample_id", pa.int64()),
     ("group", pa.int64()),                               # duplicate group, −1 = alone
     ("source", pa.dictionary(pa.int16(), pa.string())),
     ("image_sum", pa.int64())],                          # first 63 bits of sha256 of the image's bytes; 0 = not known
    metadata={"uniclip.schema": f"index/{SCHEMA_VERSION}"},
)
INDEX_BATCH_ROWS = 65_536

# A skip list: one Parquet file; its samples leave the order, wherever they are. `reason` is for people.
SKIPS = pa.schema([("sample_id", pa.int64()), ("reason", pa.string())],
                  metadata={"uniclip.schema": f"skips/{SCHEMA_VERSION}"})

# What takedowns have taken out for good, also a skip list. sha256: of an original or a stored image, null where only the
# sample is named; beside it stands the id that such bytes have where no URL is known.
FORGOTTEN = pa.schema([*SKIPS, ("sha256", pa.string())], metadata={"uniclip.schema": f"forgotten/{SCHEMA_VERSION}"})


def resource(url: str) -> str:
    """The URL without its fragment, which no server ever sees (RFC 3986, 3.5): a.jpg#x and a.jpg are one picture."""
    return url.partition("#")[0]


def sample_id_of(url_or_bytes: str | bytes) -> int:
    """The first 63 bits of sha256 of the URL without its fragment, or of the image bytes where no URL is known."""
    data = resource(url_or_bytes).encode() if isinstance(url_or_bytes, str) else url_or_bytes
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Batch:
    """What training consumes: B groups of V views and T texts.

    views: V tensors (B, 3, S, S) float32, normalised; vectors (B, V, 11) float32; tokens (B, T, L) int64;
    sample_id (B,) int64; group_id (B,) int64, equal for groups that are neither positives nor negatives of
    each other; valid (B,) bool, False where the image could not be decoded.
    """

    views: "list[torch.Tensor]"
    vectors: "torch.Tensor"
    tokens: "torch.Tensor"
    sample_id: "torch.Tensor"
    group_id: "torch.Tensor"
    valid: "torch.Tensor"

    def to(self, device: "torch.device | str") -> "Batch":
        """The same batch on `device`."""
        return Batch([v.to(device, non_blocking=True) for v in self.views],
                     *(t.to(device, non_blocking=True) for t in
                       (self.vectors, self.tokens, self.sample_id, self.group_id, self.valid)))
