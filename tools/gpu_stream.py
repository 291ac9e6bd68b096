"""What only a GPU can show of the stream: DALI on the device makes Pillow's pixels, and makes them fast enough."""

import io
import multiprocessing
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.bench import Chosen, baseline, by_torchvision
from pipeline.index import Index
from pipeline.indexing import build
from pipeline.loader import Loader
from pipeline.recipe import Cursor, Recipe
from pipeline.sampling import KINDS, RECIPES
from pipeline.schema import STD
from pipeline.text import CaptionTokenizer
from tools.profiles import Ceilings, table, traced

SIDE, SIZE = 256, 224  # of a photograph's shorter side, of a view


def photographs(folder: Path, count: int) -> Path:
    """An indexed folder of `count` JPEGs, cut from scikit-learn's two photographs; made once."""
    place = folder / f"photographs-{count}"
    if (place / "manifest.json").is_file():
        return place
    originals = [Image.fromarray(image) for image in load_sample_images().images]
    random, lengths = np.random.default_rng(0), np.random.default_rng(1).geometric(0.2, count)
    place.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place / "0.tar", "w") as tar:
        for number in range(count):
            image = originals[number % len(originals)]
            width, height = random.integers(image.height // 2, image.height, 2).tolist()
            left, top = int(random.integers(image.width - width)), int(random.integers(image.height - height))
            scale = SIDE / min(width, height)
            cut = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC,
                               box=(left, top, left + width, top + height))
            file = io.BytesIO()
            cut.save(file, "JPEG", quality=90)
            caption = f"photograph {number}{' of a street' * lengths[number]}"  # a few are longer than the text tower takes
            for suffix, data in (("jpg", file.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    build(place)
    return place


def _loader(index: Index, executor: str, device: str, batch: int) -> Loader:
    recipe = Recipe(tuple(KINDS[name] for name in RECIPES["uniclip"]), SIZE, executor, 0)
    cursor = Cursor(0, 0, index.fingerprint, recipe.fingerprint())
    return Loader(index, CaptionTokenizer.clip(), recipe, cursor, batch, device)


def pixels(folder: Path, device: str, count: int = 256, batch: int = 64) -> dict:
    """DALI on the device against Pillow on the CPU: vectors to the bit, views by their difference in 1/255."""
    index = Index.open(photographs(folder, count))
    there, here = (_loader(index, executor, where, batch) for executor, where in (("dali", device), ("pillow", "cpu")))
    differences, equal = [], True
    for position in range(0, count, batch):
        a, b = there.batch_at(position).to("cpu"), here.batch_at(position)
        equal &= all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("vectors", "sample_id", "tokens", "group_id"))
        scale = torch.tensor(STD).view(3, 1, 1) * 255
        differences += [((x - y).abs() * scale).numpy().ravel() for x, y in zip(a.views, b.views, strict=True)]
    for loader in (there, here):
        loader.close()
    return {"vectors_equal": equal, "views": count * len(a.views), "mean": float(np.mean([d.mean() for d in differences])),
            "quantile_999": float(np.quantile(np.concatenate(differences), 0.999))}


def _by_torchvision(work: tuple[Path, int]) -> None:
    """What a DataLoader's worker does, on its own core."""
    torch.set_num_threads(1)
    place, samples = work
    kinds = tuple(KINDS[name] for name in RECIPES["slip"])
    by_torchvision(Chosen(Index.open(place), kinds, samples), [baseline(kind, SIZE) for kind in kinds])


def _timed(stream: Iterator, batches: int, device: str) -> float:
    """Seconds for so many; what was made ahead of the clock is thrown away first."""
    for _ in range(4):
        next(stream)
    begin = time.perf_counter()
    for _ in range(batches):
        next(stream)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def speed(folder: Path, device: str, count: int = 4096, samples: int = 20_000, batch: int = 512, each: int = 256,
          turns: int = 3) -> dict:
    """Samples/s of three views on the device, and of SLIP's torchvision recipe with a process on each core, in turn."""
    place, cores = photographs(folder, count), os.cpu_count() or 1
    begin = time.perf_counter()
    stream = iter(_loader(Index.open(place), "dali", device, batch))
    next(stream)
    first, batches, ours, theirs, used = time.perf_counter() - begin, samples // batch, [], [], 0
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(_by_torchvision, [(place, 4)] * cores, chunksize=1)  # imports and codecs
        for _ in range(turns):
            ours.append(batches * batch / _timed(stream, batches, device))
            if device != "cpu":
                free, whole = torch.cuda.mem_get_info()
                used = max(used, whole - free)
            begin = time.perf_counter()
            pool.map(_by_torchvision, [(place, each)] * cores, chunksize=1)
            theirs.append(cores * each / (time.perf_counter() - begin))
    stream.close()
    return {"samples_per_second": median(ours), "torchvision": median(theirs), "cores": cores, "turns": [ours, theirs],
            "ratio": median(a / b for a, b in zip(ours, theirs, strict=True)), "first_batch_seconds": first,
            "device_gib": used / 2**30}


def profile(folder: Path, device: str, count: int = 4096, batch: int = 512, steps: int = 12) -> dict:
    """Batches of the loader, kernel by kernel. What decodes JPEGs in hardware is no kernel: it shows as idle."""
    ceilings = Ceilings.measure(device)
    stream = iter(_loader(Index.open(photographs(folder, count)), "dali", device, batch))
    found = traced(lambda: next(stream), device, steps)
    stream.close()
    return {"ceilings": asdict(ceilings), "idle": found.idle,
            "markdown": table(f"The stream, batches of {batch}", found, ceilings)}
