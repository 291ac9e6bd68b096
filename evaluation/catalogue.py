"""The sets of the paper's tables: sizes, splits, metric, prompts, the order of their classes, and where to get them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pipeline.evalsets import CLASSIFICATION, RETRIEVAL

DATA = Path(__file__).parent / "data"
_NOISE = {"wds", "vtab", "webdataset", "dataset", "clip", "benchmark", "oxford", "stanford", "iiit", "fgvc", "captions",
          "2013b", "karpathy"}


@dataclass(frozen=True)
class Entry:
    """One set. sizes: split → numbers of images that are right (several where published copies differ).

    captions: of the test split. mean: the main metric is the mean over classes. files: what to put into one folder
    for `uniclip-eval data convert`.
    """

    title: str
    sizes: dict[str, tuple[int, ...]]
    files: str
    classes: int = 0
    mean: bool = False
    captions: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    kind: str = field(default=CLASSIFICATION)


CATALOGUE: dict[str, Entry] = {
    "pets": Entry("Oxford-IIIT Pets", {"train": (3680,), "test": (3669,)}, "images.tar.gz, annotations.tar.gz", 37, True,
                  aliases=("pet",)),
    "cifar10": Entry("CIFAR-10", {"train": (50000,), "test": (10000,)}, "cifar-10-python.tar.gz", 10),
    "cifar100": Entry("CIFAR-100", {"train": (50000,), "test": (10000,)}, "cifar-100-python.tar.gz", 100),
    "sun397": Entry("SUN397", {"train": (19850,), "test": (19850, 108754)}, "SUN397.tar.gz, Partitions.zip", 397),
    "food101": Entry("Food-101", {"train": (75750,), "test": (25250,)}, "food-101.tar.gz", 101, aliases=("food",)),
    "flowers102": Entry("Flowers-102", {"train": (1020,), "validation": (1020,), "test": (6149,)},
                        "102flowers.tgz, imagelabels.mat, setid.mat", 102, True, aliases=("flowers",)),
    "cars": Entry("Stanford Cars", {"train": (8144,), "test": (8041,)},
                  "cars_train.tgz, cars_test.tgz, car_devkit.tgz, cars_test_annos_withlabels.mat", 196),
    "caltech101": Entry("Caltech-101", {"train": (3060,), "test": (6084, 6085)}, "101_ObjectCategories.tar.gz (from "
                        "caltech-101.zip)", 102, True),
    "aircraft": Entry("FGVC Aircraft", {"train": (3334,), "validation": (3333,), "test": (3333,)},
                      "fgvc-aircraft-2013b.tar.gz", 100, True),
    "dtd": Entry("Describable Textures", {"train": (1880,), "validation": (1880,), "test": (1880,)},
                 "dtd-r1.0.1.tar.gz", 47),
    "imagenet1k": Entry("ImageNet-1k", {"train": (1281167,), "test": (50000,)},
                        "ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz; ILSVRC2012_img_train.tar for probe and "
                        "fine-tuning", 1000, aliases=("imagenet",)),
    "flickr30k": Entry("Flickr30k", {"train": (29000,), "validation": (1014,), "test": (1000,)},
                       "flickr30k-images.tar.gz, dataset_flickr30k.json (Karpathy's split)", captions=(5000,),
                       kind=RETRIEVAL),
    "coco": Entry("COCO", {"validation": (5000,), "test": (5000,)}, "val2014.zip, dataset_coco.json (Karpathy's split)",
                  captions=(25010,), aliases=("mscoco",), kind=RETRIEVAL),
}


def identify(name: str) -> str | None:
    """The catalogue's name of a set folder, None for one it does not know: `wds_vtab-flowers_test` is flowers102."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in {*_NOISE, "test"}]
    joined = "".join(words)
    return next((known for known, entry in CATALOGUE.items() if joined in (known, *entry.aliases)), None)


def mean_per_class_is_main(name: str) -> bool:
    """Whether every table reports the mean over classes for a set, because its classes are of unequal size."""
    known = identify(name)
    return known is not None and CATALOGUE[known].mean


@cache
def _data() -> dict:
    return json.loads((DATA / "catalogue.json").read_text(encoding="utf-8"))


def templates(name: str) -> tuple[str, ...]:
    """The prompts CLIP used for a set; for ImageNet the eighty."""
    if name == "imagenet1k":
        from evaluation.prompts import published

        return published("OPENAI_IMAGENET_TEMPLATES")
    return tuple(_data()["templates"].get(name, ()))


def classnames(name: str) -> tuple[str, ...]:
    """The names of the classes in the order of the labels, none where the set's own archive carries them."""
    if name == "imagenet1k":
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    return tuple(_data()["classnames"].get(name, ()))


def official_order(names: Sequence[str]) -> list[str] | None:
    """`names` in the published order of the set that has exactly these names, None when no set has."""
    by_key = {_key(name): name for name in names}
    for known in _data()["classnames"]:
        keys = [_key(name) for name in classnames(known)]
        if set(keys) == set(by_key) and len(keys) == len(names):
            return [by_key[key] for key in keys]
    return None


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
