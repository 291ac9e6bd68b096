"""How fast samples become views, a core each: our executors against torchvision's transforms in SLIP's recipe."""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import PIL
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from pipeline.console import InputError
from pipeline.execution import fit
from pipeline.images import upright_rgb
from pipeline.index import Index
from pipeline.order import Order
from pipeline.plan import Plan
from pipeline.reader import ShardReader
from pipeline.recipe import Recipe, make_executor
from pipeline.replay import blurred, coloured, mirrored, normalised, resized
from pipeline.sampling import KINDS, RECIPES, ViewKind, sample_vectors
from pipeline.schema import MEAN, STD

BASELINE = "torchvision"


class _Blur:
    """SLIP's Gaussian blur: Pillow's, with a random sigma."""

    def __init__(self, sigma: tuple[float, float]):
        self._sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = float(torch.empty(1).uniform_(*self._sigma))
        return image.filter(ImageFilter.GaussianBlur(radius=sigma))


def baseline(kind: ViewKind, size: int) -> transforms.Compose:
    """One view as SLIP's public code makes it: torchvision's first transforms on Pillow images, bilinear."""
    steps: list[Callable] = [transforms.RandomResizedCrop(size, scale=kind.area, ratio=kind.aspect)]
    if kind.jitter_p:
        steps.append(transforms.RandomApply([transforms.ColorJitter(*kind.jitter)], p=kind.jitter_p))
    if kind.gray_p:
        steps.append(transforms.RandomGrayscale(p=kind.gray_p))
    if kind.blur_p:
        steps.append(transforms.RandomApply([_Blur(kind.blur_sigma)], p=kind.blur_p))
    if kind.flip_p:
        steps.append(transforms.RandomHorizontalFlip(p=kind.flip_p))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


class Chosen:
    """The samples of one round, drawn as training draws them."""

    def __init__(self, index: Index, kinds: tuple[ViewKind, ...], samples: int):
        rows, epochs, repeats = Order(0, Plan.whole(index.shard_starts)).places(0, samples)
        self.columns = index.columns(rows)
        sizes = np.stack([self.columns["width"], self.columns["height"]], axis=1)
        self.ids = self.columns["sample_id"]
        self.vectors = sample_vectors(0, epochs, repeats, self.ids, sizes, kinds)
        self._reader = ShardReader(index.folder, index.shards)

    def read(self) -> list[bytes]:
        """The encoded images."""
        members = zip(*(self.columns[name].tolist() for name in ("shard", "offset", "size")), strict=True)
        return [self._reader.read(*member) for member in members]

    def fit(self) -> list[bytes]:
        """The same, as the loader hands them to an executor."""
        return [fit(data, plain) for data, plain in zip(self.read(), self.columns["plain"].tolist(), strict=True)]


def by_torchvision(chosen: Chosen, views: list[transforms.Compose]) -> list[torch.Tensor]:
    """A batch as a DataLoader worker makes it."""
    made = [[view(image) for view in views] for image in map(upright_rgb, chosen.read())]
    return [torch.stack(column) for column in zip(*made, strict=True)]


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def stages(chosen: Chosen, size: int) -> dict[str, float]:
    """CPU seconds of each stage of the Pillow executor, for all samples."""
    spent: dict[str, float] = {}

    def stage(name: str, work: Callable, *inputs):
        begun = time.thread_time()
        done = work(*inputs)
        spent[name] = spent.get(name, 0.0) + time.thread_time() - begun
        return done

    for data, vector_VA in zip(stage("read", chosen.read), chosen.vectors, strict=True):
        image = stage("decode", upright_rgb, data)
        for vector_A in vector_VA:
            view = stage("resize", resized, image, vector_A, size)
            for name, work in (("mirror", mirrored), ("colour", coloured), ("blur", blurred)):
                view = stage(name, work, view, vector_A)
            stage("normalise", normalised, view)
    return spent


def ways(chosen: Chosen, kinds: tuple[ViewKind, ...], size: int) -> dict[str, Callable[[], object]]:
    """Name → one round of work, one thread each."""
    made: dict[str, Callable[[], object]] = {
        BASELINE: partial(by_torchvision, chosen, [baseline(kind, size) for kind in kinds])}
    for name in ("pillow", "dali"):
        try:
            executor = make_executor(Recipe(kinds, size, name, 1), "cpu")
        except InputError:
            continue  # no DALI here
        made[name] = lambda executor=executor: executor(chosen.fit(), chosen.vectors, chosen.ids)
    return made


def measure(index: Index, recipe: str, size: int, samples: int, rounds: int) -> dict:
    """Figures of every way in, taking turns so that a busy machine slows all alike; medians over rounds.

    Raises InputError for an unknown recipe.
    """
    if recipe not in RECIPES:
        raise InputError(f"--recipe {recipe}: known recipes are {', '.join(RECIPES)}")
    kinds = tuple(KINDS[name] for name in RECIPES[recipe])
    samples = min(samples, len(index))
    chosen = Chosen(index, kinds, samples)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    made = ways(chosen, kinds, size)
    for work in made.values():
        work()  # first calls build pipelines and load codecs
    times = {name: [] for name in made}
    shares = []
    for _ in range(rounds):
        for name, work in made.items():
            times[name].append(_timed(work))
        shares.append(stages(chosen, size))
    cpu = {name: [c for _, c in values] for name, values in times.items()}
    figures = {name: {
        "samples_per_second": samples / statistics.median(w for w, _ in values),
        "views_per_second": len(kinds) * samples / statistics.median(w for w, _ in values),
        "cpu_seconds_per_sample": statistics.median(cpu[name]) / samples,
        "times_baseline_per_core": statistics.median(b / c for b, c in zip(cpu[BASELINE], cpu[name], strict=True)),
    } for name, values in times.items()}
    spent = {name: statistics.median(share[name] for share in shares) / samples for name in shares[0]}
    return {"pillow": PIL.__version__, "simd": "post" in PIL.__version__, "recipe": recipe, "size": size,
            "samples": samples, "rounds": rounds, "ways": figures,
            "image_pixels": [int(np.median(chosen.columns[n])) for n in ("width", "height")],
            "pillow_stage_cpu_seconds_per_sample": spent}


def bench(index: Index, recipe: str, size: int, samples: int, rounds: int, out: Path | None) -> list[str]:
    """Measure, write JSON to `out` when given, return the lines to print."""
    figures = measure(index, recipe, size, samples, rounds)
    if out:
        out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    spent = figures["pillow_stage_cpu_seconds_per_sample"]
    whole = sum(spent.values())
    width, height = figures["image_pixels"]
    kind = "Pillow-SIMD" if figures["simd"] else "Pillow"
    lines = [f"{kind} {figures['pillow']}, {figures['samples']} images of median {width} × {height}, recipe {recipe}, "
             f"{size} px, one core", "              samples/s   views/s   CPU ms/sample   × torchvision per core"]
    for name, f in figures["ways"].items():
        lines.append(f"{name:12} {f['samples_per_second']:10.1f} {f['views_per_second']:9.1f} "
                     f"{1e3 * f['cpu_seconds_per_sample']:15.2f} {f['times_baseline_per_core']:15.2f}")
    return [*lines, "pillow by stage: " + ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in spent.items())]
