"""What only a GPU can show, in one command: `python -m tools.gpu_check OUT.json` runs every part, each in its own process.

Without a CUDA device it says so, lists its parts and exits 0.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SAMPLES_PER_SECOND = 6_000  # required of an H200 with 16 cores
MEAN_TOLERANCE, TAIL_TOLERANCE = 0.3, 4.0  # in 1/255


def photographs(folder: Path, count: int, side: int) -> Path:
    """An indexed folder of `count` JPEGs, `side` pixels on their shorter side, cut from scikit-learn's two photographs."""
    import io

    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from pipeline.indexing import build

    originals = [Image.fromarray(image) for image in load_sample_images().images]
    random, lengths = np.random.default_rng(0), np.random.default_rng(1).geometric(0.2, count)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(count):
            image = originals[number % len(originals)]
            width, height = random.integers(image.height // 2, image.height, 2).tolist()
            left, top = int(random.integers(image.width - width)), int(random.integers(image.height - height))
            scale = side / min(width, height)
            cut = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC,
                               box=(left, top, left + width, top + height))
            file = io.BytesIO()
            cut.save(file, "JPEG", quality=90)
            caption = f"photograph {number}{' of a street' * lengths[number]}"  # a few are longer than the text tower takes
            for suffix, data in (("jpg", file.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    build(folder)
    return folder


def _loader(index, executor: str, device: str, size: int, batch: int, threads: int = 0):
    from pipeline.loader import Loader
    from pipeline.recipe import Cursor, Recipe
    from pipeline.sampling import KINDS, RECIPES
    from pipeline.text import CaptionTokenizer

    recipe = Recipe(tuple(KINDS[name] for name in RECIPES["uniclip"]), size, executor, threads)
    cursor = Cursor(0, 0, index.fingerprint, recipe.fingerprint())
    return Loader(index, CaptionTokenizer.clip(), recipe, cursor, batch, device)


def check_pixels(folder: Path, device: str = "cuda") -> dict:
    """Vectors bit-equal and views within tolerance: DALI on the device against Pillow on the CPU."""
    import numpy as np
    import torch

    from pipeline.index import Index
    from pipeline.schema import STD

    index = Index.open(photographs(folder, 256, 256))
    there, here = (_loader(index, executor, where, 224, 64) for executor, where in (("dali", device), ("pillow", "cpu")))
    differences, equal = [], True
    for position in range(0, 256, 64):
        a, b = there.batch_at(position).to("cpu"), here.batch_at(position)
        equal &= all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("vectors", "sample_id", "tokens", "group_id"))
        scale = torch.tensor(STD).view(3, 1, 1) * 255
        differences += [((x - y).abs() * scale).numpy().ravel() for x, y in zip(a.views, b.views, strict=True)]
    for loader in (there, here):
        loader.close()
    mean, tail = (float(np.mean([d.mean() for d in differences])), float(np.quantile(np.concatenate(differences), 0.999)))
    return {"vectors_bit_equal": equal, "views": 256 * 3, "mean_of_255": mean, "quantile_999_of_255": tail,
            "passed": equal and mean <= MEAN_TOLERANCE and tail <= TAIL_TOLERANCE}


def measure_loader(folder: Path, device: str = "cuda", samples: int = 40_000, batch: int = 512) -> dict:
    """Samples a second that the loader delivers on the device, three 224-px views each, from 256-px JPEGs; memory."""
    import torch

    from pipeline.index import Index

    index = Index.open(photographs(folder, 4096, 256))
    free, stream = [], iter(_loader(index, "dali", device, 224, batch))
    begun = time.perf_counter()
    next(stream)
    first = time.perf_counter() - begun
    for _ in range(3):
        next(stream)
    begun = time.perf_counter()
    for _ in range(samples // batch):
        loaded, _ = next(stream)
        if device != "cpu":
            free.append(torch.cuda.mem_get_info()[0])
    if device != "cpu":
        torch.cuda.synchronize()
    rate = samples // batch * batch / (time.perf_counter() - begun)
    stream.close()
    used = (torch.cuda.mem_get_info()[1] - min(free)) if free else 0
    return {"samples_per_second": rate, "views_per_second": rate * len(loaded.views), "first_batch_seconds": first,
            "device_bytes_in_use": used, "cores": os.cpu_count(), "passed": rate >= SAMPLES_PER_SECOND}


def _worker(work: tuple) -> None:
    import torch

    from pipeline.bench import Chosen, baseline, by_torchvision
    from pipeline.index import Index
    from pipeline.sampling import KINDS, RECIPES

    torch.set_num_threads(1)
    folder, samples = work
    kinds = tuple(KINDS[name] for name in RECIPES["slip"])
    by_torchvision(Chosen(Index.open(folder), kinds, samples), [baseline(kind, 224) for kind in kinds])


def measure_torchvision(folder: Path, samples: int = 512) -> dict:
    """Samples a second of SLIP's torchvision recipe with a process on each core, from the same files."""
    import multiprocessing

    photographs(folder, 4096, 256)
    cores = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(_worker, [(folder, 8)] * cores, chunksize=1)  # imports and codecs
        begun = time.perf_counter()
        pool.map(_worker, [(folder, samples)] * cores, chunksize=1)
        rate = cores * samples / (time.perf_counter() - begun)
    return {"samples_per_second": rate, "cores": cores, "passed": True}


def measure_loss(folder: Path) -> dict:
    """The tiled loss against the dense one and against the matmul rate of the same run."""
    from tools.bench_loss import gpu_part

    return gpu_part(folder)


def measure_train(folder: Path) -> dict:
    """MFU and data wait of ViT-B/32 and B/16 with three views, and images/s beside open_clip's trainer with one."""
    from tools.side_by_side import gpu_part

    return gpu_part(folder / "runs", photographs(folder / "photos", 4096, 256))


# A part takes an empty folder and returns figures, `passed` among them.
PARTS: dict[str, Callable[[Path], dict]] = {
    "stream.pixels": check_pixels,
    "stream.speed": measure_loader,
    "stream.torchvision": measure_torchvision,
    "loss": measure_loss,
    "train": measure_train,
}


def run_part(name: str) -> dict:
    """A part's figures, from a process of its own: what one does to CUDA or to memory is not the next one's."""
    done = subprocess.run([sys.executable, "-m", "tools.gpu_check", "--part", name], capture_output=True, text=True)
    if done.returncode:
        return {"passed": False, "error": done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Run every part and write their figures; 1 when one did not pass."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--part", choices=PARTS, help="run one part here and print its figures as a line of JSON")
    chosen = parser.parse_args()
    if chosen.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(PARTS[chosen.part](Path(folder))))
        return 0
    import torch

    if not torch.cuda.is_available():
        print(f"no CUDA device; parts: {', '.join(PARTS)}")
        return 0
    figures = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cores": os.cpu_count(), "parts": {}}
    for name in PARTS:
        figures["parts"][name] = run_part(name)
        print(f"{name}: {json.dumps(figures['parts'][name])}", flush=True)
        chosen.out.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(part["passed"] for part in figures["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
