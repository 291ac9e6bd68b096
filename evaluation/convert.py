"""Original archives → the WebDataset layout, image bytes as they are wherever they are JPEG, PNG or WebP."""

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluation.archives import files
from evaluation.catalogue import CATALOGUE, templates
from evaluation.layouts import LAYOUTS, Contents, Layout, spaced
from pipeline.console import InputError, WorkFailed, existing, track
from pipeline.evalsets import Target, write_evalset
from pipeline.images import Undecodable, upright_rgb

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_KEPT = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")

Pairs = Iterator[tuple[bytes, Target]]
# What numpy arrays in a pickle are made of; CIFAR's batches are pickles, and a pickle may name any function to call.
_ALLOWED = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")} | {
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("numpy._core.numeric", "_frombuffer")}


def convert(name: str, source: Path, out: Path, splits: tuple[str, ...] = ()) -> dict[str, int]:
    """Write the splits of a set of the catalogue → split: number of images. Splits that are there are left alone.

    Raises InputError when a file is missing, WorkFailed when images of a split are.
    """
    if name not in CATALOGUE:
        raise InputError(f"no set {name}: known are {', '.join(CATALOGUE)}")
    existing(source, "folder of archives", f"put {CATALOGUE[name].files} there")
    names, examples_of = _cifar(name, source) if name in CIFAR else _listed(name, source)
    wanted = [split for split in CATALOGUE[name].sizes if not splits or split in splits]
    if not wanted:
        raise InputError(f"{name} has no split {splits[0]}: it has {', '.join(CATALOGUE[name].sizes)}")
    written = {}
    for split in wanted:
        if not (out / split).exists() and (pairs := examples_of(split)):
            written[split] = write_evalset(out, split, track(pairs, f"writing {split}"), CATALOGUE[name].kind, names,
                                           templates(name))
    return written


def _listed(name: str, source: Path) -> tuple[tuple[str, ...], Callable[[str], Pairs | None]]:
    """Sets whose small files say what each image is: read those first, then the images, a pass a split."""
    contents = _contents(name, LAYOUTS[name], source)

    def examples_of(split: str) -> Pairs | None:
        own = {path: target for path, (of, target) in contents.images.items() if of == split}
        return _images(name, LAYOUTS[name], source, split, own) if own and _any(name, source, own) else None

    return contents.names, examples_of


def _any(name: str, source: Path, own: dict[str, Target]) -> bool:
    """Whether the source has images of the split at all: ImageNet and COCO are often kept without their training part."""
    return any(_ends(path, LAYOUTS[name].depth) & own.keys() for path, _ in files(source))


def _contents(name: str, layout: Layout, source: Path) -> Contents:
    metas, paths = {}, []
    for path, read in files(source):
        meta = next((meta for meta in layout.metas if f"/{path}".endswith(f"/{meta}")), None)
        if meta:
            metas[meta] = read()
        elif layout.listed and path.lower().endswith(ENDINGS):
            paths.append(path)
    missing = [meta for meta in layout.metas if meta not in metas]
    if missing or not (metas or paths):
        raise InputError(f"{source} has no {missing[0] if missing else 'image'}: "
                         f"{name} is made from {CATALOGUE[name].files}")
    with _original(f"{source}, {' or '.join(metas)}"):
        return layout.read(metas, paths)


def _ends(path: str, depth: int) -> set[str]:
    parts = path.split("/")
    return {"/".join(parts[-n:]) for n in range(1, min(depth, len(parts)) + 1)}


def _images(name: str, layout: Layout, source: Path, split: str, own: dict[str, Target]) -> Pairs:
    """The images of a split in the order of the archives. Raises WorkFailed when some never came."""
    left = dict(own)
    for path, read in files(source):
        for end in _ends(path, layout.depth) & left.keys():
            yield _storable(read(), path), left.pop(end)
    if left:
        raise WorkFailed(f"{source}: {len(left):,} of {len(own):,} images of {name}, {split}, are missing, "
                         f"{next(iter(left))} for one: fetch the archives again")


def _storable(data: bytes, path: str) -> bytes:
    """The bytes as they are, or as PNG where no reader of the layout would take them (GIF, BMP)."""
    if data.startswith(_KEPT):
        return data
    try:
        return png(upright_rgb(data))
    except Undecodable as error:
        raise WorkFailed(f"{path} cannot be decoded ({error}): fetch its archive again") from None


def png(image: Image.Image) -> bytes:
    """Lossless bytes."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


class _Arrays(pickle.Unpickler):
    """Unpickles arrays, lists, dicts, numbers and strings; anything else is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise InputError(f"a CIFAR batch asks for {module_name}.{global_name}: this is not the original file")
        return super().find_class(module_name, global_name)


CIFAR = {"cifar10": ({"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}, "batches.meta",
                     b"labels", b"label_names"),
         "cifar100": ({"train": ("train",), "test": ("test",)}, "meta", b"fine_labels", b"fine_label_names")}


def _cifar(name: str, source: Path) -> tuple[tuple[str, ...], Callable[[str], Pairs | None]]:
    """Pickled arrays (n, 3·32·32) → PNG."""
    batches, meta, labels, label_names = CIFAR[name]
    wanted = {meta, *(batch for split in batches.values() for batch in split)}
    folder = f"cifar-{name[5:]}-"
    found = {path.split("/")[-1]: read() for path, read in files(source)
             if path.split("/")[-1] in wanted and (folder in path or "/" not in path)}
    if wanted - found.keys():
        raise InputError(f"{source} has no {min(wanted - found.keys())}: {name} is made from {CATALOGUE[name].files}")

    def unpickled(file: str) -> dict[bytes, Any]:
        return _Arrays(io.BytesIO(found[file]), encoding="bytes").load()

    def examples_of(split: str) -> Pairs:
        for batch in batches[split]:
            with _original(f"{source}, {batch}"):
                content = unpickled(batch)
                pictures = np.asarray(content[b"data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                examples = list(zip(pictures, map(int, content[labels]), strict=True))
            yield from ((png(Image.fromarray(np.ascontiguousarray(picture))), label) for picture, label in examples)

    with _original(f"{source}, {meta}"):
        return tuple(spaced(word.decode()) for word in unpickled(meta)[label_names]), examples_of


@contextmanager
def _original(where: str) -> Iterator[None]:
    """Whatever goes wrong while such a file is read, the file is the cause."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{where} is not the original ({type(error).__name__}: {error}): fetch it again") from None
