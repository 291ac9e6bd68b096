"""`uniclip-eval data`: make and check evaluation sets."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import WorkFailed, say
from pipeline.console import app as make_app

data = make_app("Make and check evaluation sets in CLIP_benchmark's WebDataset layout.",
                "uniclip-eval data retrieval shards evalsets/flickr8k && uniclip-eval data check evalsets/flickr8k")


@data.command("retrieval")
def retrieval(
    index: Annotated[Path, typer.Argument(help="Folder of an index made by `uniclip-data index`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the set to write.")],
    split: Annotated[str, typer.Option(help="Which split to write.")] = "test",
) -> None:
    """Turn indexed shards into a retrieval set: every image with all its captions.

    Example: `uniclip-eval data retrieval flickr8k/shards evalsets/flickr8k`
    """
    from evaluation.datasets import from_index

    say(f"{out}/{split}: {from_index(index, out, split):,} images")


@data.command("list")
def list_sets() -> None:
    """The sets of the paper's tables: sizes, metric, and the files each is made from.

    Example: `uniclip-eval data list`
    """
    from evaluation.catalogue import CATALOGUE

    for name, entry in CATALOGUE.items():
        sizes = ", ".join(f"{split} {sizes[0]:,}" for split, sizes in entry.sizes.items())
        metric = "recall@1, 5, 10" if not entry.classes else "mean per class" if entry.mean else "accuracy"
        say(f"{name:10} {sizes}; {metric}; from {entry.files}")


@data.command("check")
def check(
    folders: Annotated[list[Path], typer.Argument(metavar="SET...", help="Set folders.")],
    decode: Annotated[bool, typer.Option(help="Decode every image.")] = True,
) -> None:
    """Find wrong sizes, undecodable images, images in two splits, and class orders that do not fit. Exit 1 on a fault.

    Example: `uniclip-eval data check evalsets/flowers102 evalsets/pets`
    """
    from evaluation.check import check as check_set

    faults = 0
    for folder in folders:
        found = check_set(folder, decode)
        for line in found.facts:
            say(f"{folder.name}: {line}")
        for line in found.faults:
            say(f"{folder.name}: FAULT {line}")
        faults += len(found.faults)
    if faults:
        raise WorkFailed(f"{faults} faults in {len(folders)} sets")


@data.command("convert")
def convert(
    name: Annotated[str, typer.Argument(help="A set of `uniclip-eval data list`.")],
    source: Annotated[Path, typer.Argument(help="Folder with its original archives, packed or unpacked.")],
    out: Annotated[Path, typer.Argument(help="Folder of the set to write.")],
    splits: Annotated[list[str], typer.Option("--split", help="Only this split; repeatable.")] = [],  # noqa: B006
) -> None:
    """Turn a set's original archives into the WebDataset layout, image bytes as they are wherever possible.

    Example: `uniclip-eval data convert flowers102 downloads/flowers evalsets/flowers102`
    """
    from evaluation.convert import convert as convert_set

    for split, count in convert_set(name, source, out, tuple(splits)).items():
        say(f"{out}/{split}: {count:,} images")


@data.command("torchvision")
def torchvision(
    name: Annotated[str, typer.Argument(help="A class of torchvision.datasets with labels and splits, such as CIFAR10.")],
    root: Annotated[Path, typer.Argument(help="The root it was given: nothing is downloaded.")],
    out: Annotated[Path, typer.Argument(help="Folder of the set to write.")],
) -> None:
    """Turn one of torchvision's sets already on disk into the WebDataset layout. `convert` keeps JPEG bytes where it can.

    Example: `uniclip-eval data torchvision CIFAR10 ~/datasets evalsets/cifar10`
    """
    from evaluation.torchvision_sets import from_torchvision

    for split, count in from_torchvision(name, root, out).items():
        say(f"{out}/{split}: {count:,} images")
