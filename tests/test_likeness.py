"""Which altered copies of a picture are found, and that others are not: on drawings, and on photographs where they are."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, picture
from imagehash import phash
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from shards import drawing, write_set

from pipeline.duplicates import DISTANCE, _near, duplicates, overlap
from pipeline.evalsets import open_evalset, write_evalset
from pipeline.hashes import HASHES, hashes_of
from pipeline.index import Index
from pipeline.processes import in_processes
from pipeline.schema import sample_id_of
from pipeline.skips import read_skips

COPIES = {"mirrored": ImageOps.mirror, "smaller and mirrored": lambda image: ImageOps.mirror(image.resize((70, 70))),
          "cropped to 95 %": lambda image: ImageOps.crop(image, 4), "to 90 %": lambda image: ImageOps.crop(image, 9)}


def test_altered_copies_are_near_duplicates_of_their_picture_alone(tmp_path):
    """As groups, and as an evaluation set: the copies are ours, or theirs."""
    pictures = [image for seed in range(90) if np.asarray((image := drawing(seed, 180)).convert("L")).std() > 20][:20]
    mine, copies = map(encoded, pictures), (encoded(change(image)) for change in COPIES.values() for image in pictures)
    samples = [(data, {"url": f"{n}", "caption": f"{n}"}) for n, data in enumerate([*mine, *copies])]
    number = {sample_id_of(f"{n}"): n for n in range(len(samples))}
    both = Index.open(write_set(tmp_path / "both", samples, 140))
    found = duplicates(both, workers=1)
    assert (found.groups, found.rows, found.largest, found.look) == (20, 100, 5, 100)
    columns = Index.open(both.folder).columns(np.arange(100))
    assert len({(group, number[one] % 20) for group, one in zip(*(columns[name].tolist() for name in ("group", "sample_id")),
                                                                strict=True)}) == 20
    for name, ours, theirs in (("copies", samples[20:], samples[:20]), ("pictures", samples[:20], samples[20::21])):
        write_evalset(tmp_path / "eval" / name, "test", [(data, [told["url"]]) for data, told in theirs], "retrieval")
        index = Index.open(write_set(tmp_path / name, ours, 140))
        overlap(index, [open_evalset(tmp_path / "eval" / name)], tmp_path / "skip.parquet", workers=1)
        skips = read_skips(tmp_path / "skip.parquet")
        listed = {number[one]: int(reason.split(" key s")[1][:7]) for one, reason in skips.items()}
        assert listed == ({n: n % 20 for n in range(20, 100)} if name == "copies" else {n: n for n in range(4)})


def test_looks_are_those_of_imagehash():
    for seed in range(20):
        image = picture(seed, 300, 200)
        small = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
        words = hashes_of(encoded(image, "PNG"))[2:4]
        assert [f"{word:016x}" for word in words] == [str(phash(image)), str(phash(ImageOps.mirror(small)))]


def cropped(share: float, image: Image.Image, at: np.ndarray) -> Image.Image:
    """`share` of each side; at: where, 0.5 for the middle."""
    left, top = (at * (1 - share) * image.size).tolist()
    return image.crop((round(left), round(top), round(left + share * image.width), round(top + share * image.height)))


def marked(image: Image.Image) -> Image.Image:
    """With a line of letters across its foot."""
    copy = image.copy()
    ImageDraw.Draw(copy, "RGBA").text((image.width / 10, 0.8 * image.height), "(c) PHOTO AGENCY", (255, 255, 255, 200),
                                      font_size=image.width / 10)
    return copy


MIDDLE = np.array([0.5, 0.5])
ALTERED: dict[str, tuple[int, Callable[[Image.Image, np.ndarray], bytes]]] = {  # name: at least so many of 400, how
    "PNG": (400, lambda image, at: encoded(image, "PNG")), "JPEG q40": (400, lambda image, at: encoded(image, quality=40)),
    "JPEG q10": (395, lambda image, at: encoded(image, quality=10)),
    "half": (400, lambda image, at: encoded(image.resize((image.width // 2, image.height // 2)))),
    "squashed": (400, lambda image, at: encoded(image.resize((image.width, 3 * image.height // 4)))),
    "grey": (400, lambda image, at: encoded(image.convert("L"))),
    "30 % darker": (400, lambda image, at: encoded(ImageEnhance.Brightness(image).enhance(0.7))),
    "30 % brighter": (355, lambda image, at: encoded(ImageEnhance.Brightness(image).enhance(1.3))),
    "contrast +40 %": (380, lambda image, at: encoded(ImageEnhance.Contrast(image).enhance(1.4))),
    **{f"middle {share:.0%}": (least, lambda image, at, share=share: encoded(cropped(share, image, MIDDLE)))
       for share, least in ((0.98, 370), (0.95, 380), (0.9, 350), (0.85, 0))},
    **{f"anywhere {share:.0%}": (least, lambda image, at, share=share: encoded(cropped(share, image, at)))
       for share, least in ((0.98, 300), (0.95, 90), (0.9, 10))},
    "watermark": (300, lambda image, at: encoded(marked(image))),
    "rotated 3°": (60, lambda image, at: encoded(image.rotate(3))),
    **{f"{share:.0%} frame": (least, lambda image, at, share=share: encoded(
        ImageOps.expand(image, round(share * image.width), "white"))) for share, least in ((0.02, 360), (0.05, 380), (0.1, 0))},
    "mirrored": (390, lambda image, at: encoded(ImageOps.mirror(image))),
    "mirrored, half, q40": (390, lambda image, at: encoded(
        ImageOps.mirror(image).resize((image.width // 2, image.height // 2)), quality=40))}


def every_look(path: Path) -> list[tuple]:
    """HASHES of a photograph and of its altered copies."""
    data = path.read_bytes()
    image, at = Image.open(path).convert("RGB"), np.random.default_rng(len(data)).random(2)
    return [(0, *hashes_of(one)) for one in (data, *(make(image, at) for _, make in ALTERED.values()))]


def look(path: Path) -> tuple:
    """HASHES of a photograph."""
    return 0, *hashes_of(path.read_bytes())


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> list[Path]:
    """7,000 of Flickr8k and 31,993 of COCO; none of one is in the other."""
    data, folder = Path(os.environ.get("UNICLIP_SHARED", "../shared")) / "data", tmp_path_factory.mktemp("photographs")
    if not data.is_dir():
        pytest.skip("needs flickr8k.tar and coco.tar in $UNICLIP_SHARED/data")
    for name in ("flickr8k", "coco"):
        with tarfile.open(data / f"{name}.tar") as tar:
            tar.extractall(folder, filter="data")
    return sorted(folder.rglob("*.jpg"), reverse=True)


@pytest.mark.slow
def test_altered_copies_of_photographs_are_found(photographs, capsys):
    """400 copies of each kind; the counts are those of docs/duplicates.md."""
    tables = np.array(list(in_processes(every_look, photographs[:7000:17][:400])), HASHES)
    assert len(tables) == 400
    for place, (name, (least, _)) in enumerate(ALTERED.items(), 1):
        edges = _near(np.concatenate([tables[:, 0], tables[:, place]]), DISTANCE)
        found = len(np.unique(edges[0][abs(edges[0] - edges[1]) == 400] % 400))
        with capsys.disabled():
            print(f"{name:>20} {found}")
        assert found >= least, name


@pytest.mark.slow
def test_no_two_photographs_are_taken_for_copies(photographs, capsys):
    """Looked at: the 17 pairs that are found as they are show one scene each; the other looks add none."""
    hashes = np.array(list(in_processes(look, photographs)), HASHES)
    found = {tuple(sorted(pair)) for pair in _near(hashes, DISTANCE).T.tolist()}
    with capsys.disabled():
        print(len(hashes), "photographs", len(found), "pairs")
    assert len(found) == 17
