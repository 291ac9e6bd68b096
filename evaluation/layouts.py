"""The original archives of the catalogue's sets: which of their files say what, as pure functions of those files.

Names of classes are bound to folders, files and ids of the archive, never to bare positions in a list of another origin.
"""

import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from evaluation.catalogue import classnames
from pipeline.console import InputError
from pipeline.evalsets import Target

Metas = dict[str, bytes]  # end of a path → its bytes
Where = dict[str, tuple[str, Target]]  # end of an image's path → split, label or captions


@dataclass(frozen=True)
class Contents:
    """What the small files of an archive say about its images: where each goes, and the names of the classes."""

    images: Where
    names: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """metas: ends of the paths of the small files that are needed; read: what they say; depth: how many last parts of an
    image's path identify it; listed: `read` is also given the paths of all images."""

    metas: tuple[str, ...]
    read: Callable[[Metas, list[str]], Contents]
    depth: int = 1
    listed: bool = False


def lines(data: bytes) -> list[str]:
    """The stripped lines of a text file that are not empty and no comment."""
    return [line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip() and line[0] != "#"]


def spaced(name: str) -> str:
    """An archive's word for a class, for a prompt."""
    return " ".join(name.replace("_", " ").split())


def _mat(data: bytes) -> dict[str, Any]:
    from scipy.io import loadmat

    return loadmat(io.BytesIO(data), squeeze_me=True)


def _pets(metas: Metas, paths: list[str]) -> Contents:
    """`Abyssinian_100 1 1 1`: name, class id from 1, species, breed within the species. Breeds are numbered by id."""
    images: Where = {}
    folder_names: dict[int, str] = {}
    for split, meta in (("train", "annotations/trainval.txt"), ("test", "annotations/test.txt")):
        for line in lines(metas[meta]):
            image, number = line.split()[:2]
            images[f"{image}.jpg"] = split, int(number) - 1
            folder_names[int(number) - 1] = image.rsplit("_", 1)[0]
    return Contents(images, _bound("pets", folder_names))


def _bound(name: str, found: dict[int, str]) -> tuple[str, ...]:
    """The catalogue's names, after a look that label by label they begin like the archive's own."""
    names = classnames(name)
    for label, word in found.items():
        ours = re.sub(r"[^a-z]", "", names[label].lower()) if label < len(names) else ""
        theirs = re.sub(r"[^a-z]", "", word.lower())
        if not ours or not (ours.startswith(theirs) or theirs.startswith(ours)):
            raise InputError(f"{name}: label {label} is {word!r} in the archive, {names[label] if ours else 'nothing'!r} "
                             "in the published order: these are not the original annotations")
    return names


def _folders(metas: Metas, paths: list[str], lists: Iterable[tuple[str, str]], ending: str = "") -> Contents:
    """Lists of `class/image` a split; classes are the folders in ASCII order."""
    listed = [(split, line + ending) for split, meta in lists for line in lines(metas[meta])]
    folders = sorted({line.split("/")[-2] for _, line in listed})
    return Contents({"/".join(line.split("/")[-2:]): (split, folders.index(line.split("/")[-2])) for split, line in listed},
                    tuple(map(spaced, folders)))


def _food(metas: Metas, paths: list[str]) -> Contents:
    return _folders(metas, paths, (("train", "meta/train.txt"), ("test", "meta/test.txt")), ".jpg")


def _dtd(metas: Metas, paths: list[str]) -> Contents:
    return _folders(metas, paths, (("train", "labels/train1.txt"), ("validation", "labels/val1.txt"),
                                   ("test", "labels/test1.txt")))


def _sun(metas: Metas, paths: list[str]) -> Contents:
    """`/a/abbey/sun_x.jpg`, and classes two folders deep; ClassName.txt is the order of the labels."""
    order = [line.strip("/") for line in lines(metas["ClassName.txt"])]
    number = {name: label for label, name in enumerate(order)}
    images: Where = {}
    for split, meta in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        for line in lines(metas[meta]):
            path = line.strip("/")
            images[path] = split, number[path.rsplit("/", 1)[0]]
    return Contents(images, tuple(spaced(" ".join(reversed(name.split("/")[1:]))) for name in order))


def _flowers(metas: Metas, paths: list[str]) -> Contents:
    """Image i of 1 … 8,189 has label labels[i − 1]; the published names follow these numbers, not folder names."""
    label_N, sets = _mat(metas["imagelabels.mat"])["labels"], _mat(metas["setid.mat"])
    images: Where = {f"image_{number:05d}.jpg": (split, int(label_N[number - 1]) - 1)
                     for split, key in (("train", "trnid"), ("validation", "valid"), ("test", "tstid"))
                     for number in np.atleast_1d(sets[key]).tolist()}
    return Contents(images, classnames("flowers102"))


def _cars(metas: Metas, paths: list[str]) -> Contents:
    names = [str(name) for name in np.atleast_1d(_mat(metas["cars_meta.mat"])["class_names"])]
    images: Where = {}
    for split, folder, meta in (("train", "cars_train", "cars_train_annos.mat"),
                                ("test", "cars_test", "cars_test_annos_withlabels.mat")):
        for row in np.atleast_1d(_mat(metas[meta])["annotations"]):
            images[f"{folder}/{row['fname']}"] = split, int(row["class"]) - 1
    return Contents(images, tuple(names))


def _aircraft(metas: Metas, paths: list[str]) -> Contents:
    order = lines(metas["data/variants.txt"])
    images: Where = {}
    for split, meta in (("train", "train"), ("validation", "val"), ("test", "test")):
        for line in lines(metas[f"data/images_variant_{meta}.txt"]):
            image, variant = line.split(" ", 1)
            images[f"{image}.jpg"] = split, order.index(variant)
    return Contents(images, tuple(order))


def _caltech(metas: Metas, paths: list[str]) -> Contents:
    """No published split: 30 images a class, drawn with a fixed seed from their sorted names, train; the rest test."""
    own: dict[str, list[str]] = {}
    for path in sorted(path for path in paths if "101_ObjectCategories/" in f"/{path}" and path.endswith(".jpg")):
        own.setdefault(path.split("/")[-2], []).append(path)
    images: Where = {}
    for label, folder in enumerate(sorted(own)):
        drawn = np.random.default_rng([0, label]).permutation(len(own[folder]))[:30].tolist()
        for i, path in enumerate(own[folder]):
            images["/".join(path.split("/")[-2:])] = "train" if i in drawn else "test", label
    official = len(own) == len(classnames("caltech101"))
    return Contents(images, classnames("caltech101") if official else tuple(map(spaced, sorted(own))))


def _imagenet(metas: Metas, paths: list[str]) -> Contents:
    """Classes are the WordNet ids in sorted order; the validation images' answers are the devkit's own numbers."""
    synsets = np.atleast_1d(_mat(metas["data/meta.mat"])["synsets"])
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    order = {wnid: label for label, wnid in enumerate(sorted(wnid_of.values()))}
    truth = lines(metas["data/ILSVRC2012_validation_ground_truth.txt"])
    images: Where = {f"ILSVRC2012_val_{i:08d}.JPEG": ("test", order[wnid_of[int(number)]])
                     for i, number in enumerate(truth, 1)}
    for path in paths:
        name = PurePosixPath(path).name
        if re.fullmatch(r"n\d{8}_\d+\.JPEG", name) and name[:9] in order:
            images[name] = "train", order[name[:9]]
    names = classnames("imagenet1k")
    return Contents(images, names if len(order) == len(names) else tuple(
        spaced(str(row["words"]).split(",")[0]) for row in sorted(synsets, key=lambda row: str(row["WNID"]))
        if int(row["num_children"]) == 0))


def _karpathy(meta: str) -> Callable[[Metas, list[str]], Contents]:
    """Karpathy's JSON: filename, split, sentences of each image; `restval` belongs to train."""
    names = {"val": "validation", "restval": "train"}

    def read(metas: Metas, paths: list[str]) -> Contents:
        images: Where = {}
        for image in json.loads(metas[meta])["images"]:
            split: str = image["split"]
            images[image["filename"]] = names.get(split, split), [sentence["raw"] for sentence in image["sentences"]]
        return Contents(images, ())

    return read


LAYOUTS: dict[str, Layout] = {
    "pets": Layout(("annotations/trainval.txt", "annotations/test.txt"), _pets),
    "food101": Layout(("meta/train.txt", "meta/test.txt"), _food, 2),
    "dtd": Layout(("labels/train1.txt", "labels/val1.txt", "labels/test1.txt"), _dtd, 2),
    "sun397": Layout(("ClassName.txt", "Training_01.txt", "Testing_01.txt"), _sun, 4),
    "flowers102": Layout(("imagelabels.mat", "setid.mat"), _flowers),
    "cars": Layout(("cars_meta.mat", "cars_train_annos.mat", "cars_test_annos_withlabels.mat"), _cars, 2),
    "aircraft": Layout(("data/variants.txt", *(f"data/images_variant_{s}.txt" for s in ("train", "val", "test"))),
                       _aircraft),
    "caltech101": Layout((), _caltech, 2, listed=True),
    "imagenet1k": Layout(("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"), _imagenet, listed=True),
    "flickr30k": Layout(("dataset_flickr30k.json",), _karpathy("dataset_flickr30k.json")),
    "coco": Layout(("dataset_coco.json",), _karpathy("dataset_coco.json")),
}
