"""Our trainer beside open_clip's own, in turn: from the same tars, or from batches that lie on the device."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from pipeline.console import InputError
from pipeline.schema import VECTOR_SIZE, Batch
from trainer.config_file import load_config
from trainer.train import train
from trainer.training import start

LEAST_RATIO = 1.0  # ours / open_clip's images/s, on a CPU
DRAWN = 64  # groups of a random batch: noise takes time to draw


@dataclass
class Window:
    """Counts `steps` steps of a loop after its first, from request of a batch to request, by whatever runs it."""

    steps: int
    cuda: bool
    marks: list[tuple[float, float]] = field(default_factory=list)

    def of(self, batches: Iterable) -> Iterator:
        """The same batches."""
        for number, batch in enumerate(batches):
            yield batch
            if number in (0, self.steps):
                if self.cuda:
                    torch.cuda.synchronize()
                self.marks.append((time.perf_counter(), _cpu_of_all()))

    def figures(self, batch: int) -> dict[str, float]:
        """Images/s, and CPU seconds for each of this process and its workers."""
        (begin, cpu), (end, cpu_end) = self.marks
        images = self.steps * batch
        return {"images_per_second": images / (end - begin), "cpu_seconds_per_image": (cpu_end - cpu) / images}


def _cpu_of_all() -> float:
    """CPU seconds of this process and of the data loader's."""
    stats = [Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
             for child in multiprocessing.active_children()]
    ticks = sum(int(stat[11]) + int(stat[12]) for stat in stats)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


class Windowed:
    """Data of a run, its batches counted by a Window."""

    def __init__(self, data: Any, window: Window):
        self._data, self._window = data, window

    def loader(self, *arguments: Any) -> Iterator:
        """As the loop asks for it."""
        stream = iter(self._data.loader(*arguments))
        try:
            yield from self._window.of(stream)
        finally:
            stream.close()

    def __str__(self) -> str:
        return str(self._data)


def random_batch(seed: int, groups: int, views: int, size: int, tokenizer: Any) -> Batch:
    """Noise in a batch's shape, the first DRAWN groups again and again; texts fill the context."""
    random, drawn = torch.Generator().manual_seed(seed), torch.arange(groups) % DRAWN
    tokens = torch.randint(tokenizer.vocab_size, (DRAWN, 1, tokenizer.context), generator=random)[drawn]
    tokens[tokens == tokenizer.end_id] = tokenizer.start_id
    tokens[..., -1] = tokenizer.end_id
    number = torch.arange(groups)
    return Batch([torch.randn(DRAWN, 3, size, size, generator=random)[drawn] for _ in range(views)],
                 torch.rand(groups, views, VECTOR_SIZE, generator=random), tokens, number, number,
                 torch.ones(groups, dtype=torch.bool))


class Resident:
    """Data of a run: two random batches in turn, on the device from the start, so that only the steps count."""

    def loader(self, tokenizer: Any, recipe: Any, cursor: Any, batch_size: int, device: str = "cpu", *_: object) -> Iterator:
        """As the loop asks for it."""
        batches = [random_batch(n, batch_size, len(recipe.kinds), recipe.size, tokenizer).to(device) for n in (0, 1)]
        for number in count():
            yield batches[number % 2], replace(cursor, samples_seen=cursor.samples_seen + (number + 1) * batch_size)

    def __str__(self) -> str:
        return "random batches"


def by_us(sizes: dict, settings: dict) -> dict[str, float]:
    """Train open_clip's `sizes` with CLIP's objective by our trainer, in a process of its own.

    settings["resident"]: from random batches on the device, and not from the tars.
    """
    image, text, batch = sizes["vision_cfg"], sizes["text_cfg"], settings["batch"]
    values = {
        "data.index": settings["shards"], "data.recipe": "clip", "data.weak": "{area=[0.9,1.0]}",
        "data.threads": settings["workers"], "model.dim": sizes["embed_dim"], "model.image.arch": "vit_base_patch32_clip_224",
        "model.image.size": image["image_size"], "model.image.patch": image["patch_size"], "model.image.width": image["width"],
        "model.image.depth": image["layers"], "model.image.heads": image["width"] // image.get("head_width", 64),
        "model.text.context": text["context_length"], "model.text.width": text["width"], "model.text.depth": text["layers"],
        "model.text.heads": text["heads"], "model.text.pooling": "end", "model.head.kind": "mlp", "model.head.depth": 1,
        "model.head.augmentation": "false", "model.similarity.kind": "shared", "loss.name": "multi_positive_infonce",
        "loss.supervision": "separate", "optim.batch_size": batch, "optim.samples": (settings["steps"] + 2) * batch,
        "optim.warmup_samples": 10 * batch, "run.device": settings["device"], "run.precision": settings["precision"],
        "run.compile": str(settings["compile"]).lower(), "run.log_every": 10, "run.save_every_samples": 10**9,
        "run.folder": settings["folder"]}
    config = load_config("vit-b32", [f"{key}={value}" for key, value in values.items()])
    t, window = start(config), Window(settings["steps"], settings["device"] == "cuda")
    t.data = Windowed(Resident() if settings["resident"] else t.data, window)  # type: ignore[assignment]
    train(config, t)
    return window.figures(batch)


def by_open_clip(sizes: dict, settings: dict) -> dict[str, float]:
    """The same by open_clip's own main(), in a process of its own; only its data is passed through a Window."""
    import open_clip
    from open_clip_train import data as reading
    from open_clip_train import main as trainer

    multiprocessing.set_start_method("fork", force=True)  # as from a shell: its data loader cannot be pickled
    folder, batch, cuda = Path(settings["folder"]), settings["batch"], settings["device"] == "cuda"
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps(sizes), encoding="utf-8")
    open_clip.add_model_config(folder / "bench.json")
    tars = sorted(Path(settings["shards"]).glob("*.tar"))
    tars *= -(-settings["workers"] // len(tars))  # each worker wants one of its own
    window, get_data, rounds = Window(settings["steps"], cuda), trainer.get_data, settings["steps"] + 2

    def windowed(args: Any, *others: Any, **named: Any) -> dict[str, Any]:
        if settings["resident"]:
            return {"train": reading.DataInfo(_Batches(  # type: ignore[arg-type]
                window.of(_resident(args, sizes, rounds)), rounds, rounds * batch))}
        data = get_data(args, *others, **named)
        loader = data["train"].dataloader
        data["train"].dataloader = _Batches(window.of(loader), loader.num_batches, loader.num_samples)
        return data

    reading.tar_file_expander = partial(reading.tar_file_expander, eof_value=None)  # written for webdataset ≤ 0.2.86
    trainer.get_data = windowed
    samples = (settings["steps"] + 2 * settings["workers"]) * batch  # each worker makes the same number of batches
    trainer.main([
        "--model", "bench", "--train-data", "::".join(map(str, tars)), "--dataset-type", "webdataset",
        "--train-num-samples", str(samples), "--batch-size", str(batch), "--workers", str(settings["workers"]),
        "--epochs", "1", "--warmup", "10", "--grad-clip-norm", "1.0", "--wd", "0.2", "--beta2", "0.98",
        "--precision", {"fp32": "fp32", "bf16": "amp_bf16"}[settings["precision"]], "--device", settings["device"],
        "--log-every-n-steps", "10", "--logs", str(folder), "--name", "run", "--save-frequency", "0",
        *(["--torchcompile"] if settings["compile"] else [])])
    return window.figures(batch)


@dataclass
class _Batches:
    """What open_clip's loop asks of its loader."""

    batches: Iterator
    num_batches: int
    num_samples: int

    def __iter__(self) -> Iterator:
        return self.batches


def _resident(args: Any, sizes: dict, count: int) -> Iterator:
    """So many (images, tokens) on the device; a text ends at its highest id."""
    text, size = sizes["text_cfg"], sizes["vision_cfg"]["image_size"]
    ids = SimpleNamespace(vocab_size=text["vocab_size"], start_id=text["vocab_size"] - 2, end_id=text["vocab_size"] - 1,
                          context=text["context_length"])
    batches = [random_batch(n, args.batch_size, 1, size, ids).to(args.device) for n in (0, 1)]
    return ((batches[number % 2].views[0], batches[number % 2].tokens[:, 0]) for number in range(count))


TRAINERS: dict[str, Callable[[dict, dict], dict[str, float]]] = {"ours": by_us, "open_clip": by_open_clip}


def _quietly(work: Callable, arguments: tuple) -> Any:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # noqa: PTH123
        return work(*arguments)


def apart(work: Callable, *arguments: Any) -> Any:
    """work(*arguments) in a new process that may have children of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_quietly, work, arguments).result()


def side_by_side(sizes: dict, settings: dict, repeats: int, folder: Path) -> dict:
    """Each trainer `repeats` times in turn → medians, and the medians of the turns' ratios, ours / open_clip's."""
    turns: dict[str, list[dict]] = {name: [] for name in TRAINERS}
    for number in range(repeats):
        for name, work in TRAINERS.items():
            turns[name].append(apart(work, sizes, settings | {"folder": str(folder / f"{name}-{number}")}))
    middle = {name: {key: median(turn[key] for turn in of) for key in of[0]} for name, of in turns.items()}
    ratios = {key: median(a[key] / b[key] for a, b in zip(turns["ours"], turns["open_clip"], strict=True))
              for key in turns["ours"][0]}
    return {**{key: value for key, value in settings.items() if key != "shards"}, "sizes": sizes, "repeats": repeats,
            "medians": middle, "ratios": ratios}


def sizes_of(name: str, size: int) -> dict:
    """Both towers of an open_clip model, at `size` pixels."""
    from open_clip import get_model_config

    sizes = get_model_config(name)
    if sizes is None or "width" not in sizes["vision_cfg"] or not {"heads", "context_length"} <= set(sizes["text_cfg"]):
        raise InputError(f"{name} is no open_clip model of a ViT and a text transformer: ViT-S-32 is one")
    return sizes | {"vision_cfg": sizes["vision_cfg"] | {"image_size": size}}
