"""What an image is known by: its bytes, its pixels, and how it looks. Kept for each tar beside the index."""

import hashlib
import io
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.console import WorkFailed
from pipeline.evalsets import EvalSet
from pipeline.files import replacing
from pipeline.images import Undecodable, upright_rgb
from pipeline.index import Index
from pipeline.processes import in_processes
from pipeline.progress import Meter
from pipeline.scans import SCANS_NAME
from pipeline.seals import with_trailer, without_trailer

CENTRES = {"centre95": 0.95, "centre90": 0.9}  # share of each side
OTHER_LOOKS = ("mirror", *CENTRES)  # of the mirrored picture and of its middle: copies mirrored, cropped or in a frame
FLAT = 4.0  # contrast below which a look is noise
PLAIN = 16.0  # below which other looks are alike by chance: something small before snow or sky
HASHES = np.dtype([("offset", np.int64), ("bytes", np.uint64), ("pixels", np.uint64), ("look", np.uint64),
                   *((name, np.uint64) for name in OTHER_LOOKS),
                   ("contrast", np.float32)])  # contrast: standard deviation of the grey levels
Hashes = tuple[float, ...]  # a row of HASHES after its offset
_SMALL = (32, 32)  # what a perceptual hash works on
_LOW = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1))  # the lowest eight rows of a cosine transform
_MIRRORED = np.where(np.arange(8) % 2, -1, 1)
_SEED = 0x756E6A  # of nothing but the cache's name: changes when the meaning of a column does


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def hashes_of(data: bytes) -> Hashes:
    """What HASHES says of one encoded image; without pixels and looks where it cannot be decoded."""
    exact = _digest(data)
    try:
        image = upright_rgb(data)
    except Undecodable:
        return exact, exact, *[0] * (1 + len(OTHER_LOOKS)), 0
    pixels, grey = _digest(b"%d %d " % image.size + image.tobytes()), image.convert("L")
    smalls = np.stack([_small(grey, share) for share in (1, *CENTRES.values())])
    return exact, pixels, *_looks(smalls), float(smalls[0].std())


def _small(grey: Image.Image, share: float) -> np.ndarray:
    """The middle of a picture, `share` of its sides."""
    left, top = (side * (1 - share) / 2 for side in grey.size)
    return np.asarray(grey.resize(_SMALL, Image.Resampling.LANCZOS, (left, top, grey.width - left, grey.height - top)))


def _looks(smalls: np.ndarray) -> list[int]:
    """The words of (whole, middles…): `look`, then OTHER_LOOKS. They are imagehash.phash's, which takes four times as long:
    it makes one at a time and all 32 × 32 frequencies, and mirroring only changes the sign of every second one."""
    whole, *middles = (_LOW @ small @ _LOW.T for small in smalls.astype(np.float64))
    every = np.stack([whole, whole * _MIRRORED, *middles])
    bits = every > np.median(every, axis=(1, 2), keepdims=True)
    return [int.from_bytes(row.tobytes(), "big") for row in np.packbits(bits.reshape(len(bits), -1), axis=1)]


@lru_cache(maxsize=1)
def _opened(folder: Path) -> Index:
    return Index.open(folder)


def _kept_at(index: Index, shard: int) -> Path:
    return index.folder / SCANS_NAME / f"{index.manifest['shards'][shard]['sha256'][:24]}.{_SEED:x}.npy"


def _rows(index: Index, shard: int) -> np.ndarray:
    return np.arange(*index.shard_starts[shard:shard + 2])


def _hash_shard(folder: Path, shard: int) -> int:
    index = _opened(folder)
    at = index.columns(_rows(index, shard))
    found = np.zeros(len(at["offset"]), HASHES)
    with (index.folder / index.shards[shard]).open("rb") as file:
        for row, (offset, size) in enumerate(zip(at["offset"], at["size"], strict=True)):
            file.seek(offset)
            found[row] = (offset, *hashes_of(file.read(size)))
    array = io.BytesIO()
    np.save(array, np.sort(found, order="offset"))
    with replacing(_kept_at(index, shard)) as temporary:
        temporary.write_bytes(with_trailer(array.getvalue()))
    return shard


def _kept(index: Index, shard: int) -> np.ndarray | None:
    """The hashes of a shard's rows in their order, if they have been computed."""
    path, offsets = _kept_at(index, shard), index.columns(_rows(index, shard))["offset"]
    try:
        known = np.load(io.BytesIO(without_trailer(path.read_bytes())))
    except (OSError, ValueError):  # what is not there or damaged is made again
        return None
    if not len(known):
        return known if not len(offsets) else None
    at = np.minimum(np.searchsorted(known["offset"], offsets), len(known) - 1)
    return known[at] if (known["offset"][at] == offsets).all() else None


def index_hashes(index: Index, workers: int | None = None) -> np.ndarray:
    """HASHES of every row. Interrupted, the next call goes on; only new shards are read. Raises WorkFailed."""
    shards = range(len(index.shards))
    fresh = [shard for shard in shards if _kept(index, shard) is None]
    with Meter("hashing tars", len(shards), len(shards) - len(fresh)) as meter:
        done = in_processes(partial(_hash_shard, index.folder), fresh, workers) if fresh else iter(())
        for count, _ in enumerate(done, len(shards) - len(fresh) + 1):
            meter.at(count)
    kept = [hashes for shard in shards if (hashes := _kept(index, shard)) is not None]
    if len(kept) < len(shards):  # the workers open what is there now
        raise WorkFailed(f"{index.folder}: the index was made anew meanwhile: run the same command again")
    return np.concatenate(kept) if kept else np.empty(0, HASHES)


def _hash_examples(evalset: EvalSet, shard: Path) -> list[tuple[str, Hashes]]:
    return [(key, hashes_of(image)) for key, image, _ in evalset.read(shard)]


def evalset_hashes(evalset: EvalSet, workers: int | None = None) -> tuple[list[str], np.ndarray]:
    """Keys and HASHES (offset unused) of an evaluation set."""
    found = [one for part in in_processes(partial(_hash_examples, evalset), evalset.shards, workers) for one in part]
    return [key for key, _ in found], np.array([(0, *hashes) for _, hashes in found], HASHES)


def bits_apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Hamming distance of 64-bit words."""
    return np.unpackbits((one ^ other).view(np.uint8).reshape(-1, 8), axis=1).sum(1)


def near_pairs(looks: np.ndarray, distance: int, others: np.ndarray | None = None
               ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places (i, j) of all pairs of distinct 64-bit words at most `distance` bits apart; some more than once.

    others: j is a place there, and the pairs are those of a word here and one there, which may be equal.
    Cut into distance + 2 pieces, two such words agree in two pieces at least: only words that do are compared.
    """
    count = len(looks)
    if others is not None:
        looks = np.concatenate([looks, others])
    cuts = np.linspace(0, 64, distance + 3).astype(int)
    masks = [((1 << int(stop - start)) - 1) << int(start) for start, stop in zip(cuts, cuts[1:], strict=False)]
    for one, other in combinations(masks, 2):
        key = looks & np.uint64(one | other)
        order = np.argsort(key, kind="stable")
        key, places = key[order], np.arange(len(order))
        for step in range(1, len(order)):
            places = places[places + step < len(order)]
            places = places[key[places] == key[places + step]]
            if not len(places):
                break
            i, j = order[places], order[places + step]
            if others is not None:
                i, j = np.minimum(i, j), np.maximum(i, j)
                across = (i < count) & (j >= count)
                i, j = i[across], j[across]
            close = bits_apart(looks[i], looks[j]) <= distance
            yield i[close], j[close] - (count if others is not None else 0)
