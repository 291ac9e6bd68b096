"""torchvision's classification sets, as they lie on this disk → the WebDataset layout. Nothing is downloaded."""

from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

from evaluation.catalogue import identify, templates
from evaluation.convert import png
from evaluation.layouts import spaced
from pipeline.console import InputError, existing, track
from pipeline.evalsets import CLASSIFICATION, write_evalset

# Theirs → ours; of two for one of ours the first that a set knows.
SPLITS = {"train": "train", "trainval": "train", "val": "validation", "valid": "validation", "test": "test"}


def from_torchvision(name: str, root: Path, out: Path) -> dict[str, int]:
    """Write every split of `torchvision.datasets.NAME(root)` → split: number of images. Pictures become PNG, without loss.

    Raises InputError for a name torchvision has not, a set that is not there or damaged, or one without labels.
    """
    existing(root, "folder", f"give the root that torchvision.datasets.{name} was given")
    written: dict[str, int] = {}
    for split, dataset in _opened(name, root).items():
        names = [spaced(label if isinstance(label, str) else label[0]) for label in getattr(dataset, "classes", ())]
        pairs = track(_pairs(name, dataset), f"writing {split}", len(dataset))
        written[split] = write_evalset(out, split, pairs, CLASSIFICATION, names, templates(identify(name) or ""))
    return written


def _opened(name: str, root: Path) -> dict[str, Any]:
    """Split → the data set that torchvision makes of it."""
    from torchvision import datasets

    made = getattr(datasets, name, None)
    takes = signature(made).parameters if isinstance(made, type) and issubclass(made, datasets.VisionDataset) else {}
    if "train" in takes:
        return {split: _open(made, root, train=split == "train") for split in ("train", "test")}
    if "split" not in takes:
        raise InputError(f"torchvision.datasets has no set {name} with splits: give a class such as CIFAR10, or write a "
                         "folder with labels.tsv (columns image, split, label)")
    opened: dict[str, Any] = {}
    for theirs, ours in SPLITS.items():
        if ours not in opened and (dataset := _open(made, root, split=theirs)) is not None:
            opened[ours] = dataset
    return opened


def _open(made: Any, root: Path, **of: Any) -> Any:
    """The set, None where it knows no such split."""
    try:
        return made(str(root), **of)
    except ValueError:  # what its check of the word raises
        return None
    except (RuntimeError, OSError, ImportError) as error:
        raise InputError(f"{root} holds no {made.__name__} that torchvision can read ({str(error).partition(chr(10))[0]})") \
            from None


def _pairs(name: str, dataset: Any) -> Iterator[tuple[bytes, int]]:
    for i in range(len(dataset)):
        image, label = dataset[i]
        if not isinstance(label, int):
            raise InputError(f"torchvision's {name} has no single label an image: only classification can be read this way")
        yield png(image.convert("RGB")), label
