"""What only a GPU can show of the trainer: its rate, what it waits for, and that precision and restarts change nothing else."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.console import InputError
from pipeline.recipe import Recipe, make_executor
from pipeline.schema import Batch
from tools.gpu_stream import photographs
from tools.profiles import Ceilings, table, traced
from tools.side_by_side import Resident, apart, random_batch, side_by_side, sizes_of
from trainer import checkpoint
from trainer.config import Config
from trainer.config_file import load_config
from trainer.flops import peak_flops
from trainer.log import METRICS
from trainer.objectives import Objective
from trainer.step import clipped, global_loss, update
from trainer.train import train
from trainer.training import Training, restored, start

FILES = 4096  # photographs that a run reads


def _config(preset: str, folder: Path, photos: Path, device: str, batch: int, steps: int, more: dict[str, Any]) -> Config:
    """A run of so many steps that saves at its ends."""
    values = {"data.index": photos, "run.folder": folder, "run.device": device, "run.precision": "bf16", "run.log_every": 10,
              "optim.batch_size": batch, "optim.samples": steps * batch, "optim.warmup_samples": 0,
              "run.save_every_samples": 10**9, **more}
    return load_config(preset, [f"{key}={str(value).lower() if isinstance(value, bool) else value}"
                                for key, value in values.items()])


def _logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]


def _run(config: Config, resident: bool) -> list[dict]:
    """Train, from random batches on the device or from the photographs → what is logged. The folder is removed."""
    t = start(config)
    if resident:
        t.data = Resident()  # type: ignore[assignment]
    train(config, t)
    lines = _logged(config.run.folder)
    shutil.rmtree(config.run.folder)
    return lines


def rates(preset: str, folder: Path, photos: Path, device: str, batch: int, steps: int, more: dict, resident: bool
          ) -> dict[str, float]:
    """Medians of what a run logs in its second half: compilation and the filling of queues are over by then."""
    late = [line for line in _run(_config(preset, folder, photos, device, batch, steps, more), resident)
            if line["step"] > steps // 2]
    return {name: median(line[name] for line in late)
            for name in ("samples_per_second", "views_per_second", "data_wait", "tflops", "memory_gib")}


def step(folder: Path, device: str, preset: str, batch: int, steps: int = 40, turns: int = 2, files: int = FILES,
         more: dict | None = None) -> dict:
    """MFU of the whole loop, three views, batches on the device: eager and compiled in turn, the better one counts.

    Of the data sheet's peak, where it is known; else of the product measured here.
    """
    photos, ceilings = photographs(folder, files), Ceilings.measure(device)
    ways: dict[str, list[dict]] = {"eager": [], "compiled": []}
    for number in range(turns):
        for way, runs in ways.items():
            runs.append(apart(rates, preset, folder / f"{preset}-{way}-{number}", photos, device, batch, steps,
                              {"run.compile": way == "compiled", **(more or {})}, True))
    middle = {way: {name: median(run[name] for run in runs) for name in runs[0]} for way, runs in ways.items()}
    best = max(middle, key=lambda way: middle[way]["tflops"])
    achieved = middle[best]["tflops"] * 1e12
    return {"mfu": achieved / (peak_flops(device) or ceilings.flops), "of_product": achieved / ceilings.flops, "best": best,
            "samples_per_second": middle[best]["samples_per_second"], "memory_gib": middle[best]["memory_gib"],
            "ratio": middle["compiled"]["tflops"] / middle["eager"]["tflops"], "batch": batch, "ways": middle}


def waiting(folder: Path, device: str, preset: str, batch: int, steps: int = 40, files: int = FILES, compiled: bool = True,
            more: dict | None = None) -> dict[str, float]:
    """Share of its time that the loop waits for views that DALI makes beside it, three of each sample."""
    changed = {"run.compile": compiled, "data.executor": "dali", **(more or {})}
    return apart(rates, preset, folder / f"{preset}-waiting", photographs(folder, files), device, batch, steps, changed, False)


def open_clip(folder: Path, device: str, model: str, batch: int, resident: bool = True, compiled: bool = False,
              steps: int = 40, turns: int = 2, files: int = FILES, workers: int = 0, sizes: dict | None = None) -> dict:
    """Images/s of our trainer and of open_clip's, CLIP's objective, one view, the same towers, in turn."""
    name = f"{model}{'-resident' * resident}{'-compiled' * compiled}"
    settings = {"shards": str(photographs(folder, files)), "batch": batch, "steps": steps, "device": device,
                "workers": workers or os.cpu_count() or 1, "precision": "bf16", "compile": compiled, "resident": resident}
    both = side_by_side(sizes or sizes_of(model, 224), settings, turns, folder / name)
    return {"ratio": both["ratios"]["images_per_second"], "images_per_second": both["medians"]["ours"]["images_per_second"],
            "open_clip": both["medians"]["open_clip"]["images_per_second"]} | both


def agreement(folder: Path, device: str, preset: str = "vit-b32", batch: int = 32, steps: int = 4, files: int = FILES,
              more: dict | None = None) -> dict:
    """Losses of a few equal steps, fp32 and eager on the device: how far others are from them, relative."""
    photos = photographs(folder, files)
    ways = {"eager": (device, "fp32", False), "cpu": ("cpu", "fp32", False), "compiled": (device, "fp32", True),
            "bf16": (device, "bf16", False), "bf16_compiled": (device, "bf16", True)}
    losses = {}
    for name, (where, precision, compiled) in ways.items():
        changed = {"run.precision": precision, "run.compile": compiled, "run.log_every": 1, "optim.lr": 1e-5, **(more or {})}
        config = _config(preset, folder / f"agreement-{name}", photos, where, batch, steps, changed)
        losses[name] = [line["loss"] for line in apart(_run, config, True)]
    exact = losses.pop("eager")
    return {name: max(abs(x - y) / abs(y) for x, y in zip(own, exact, strict=True)) for name, own in losses.items()} | {
        "losses": exact}


def resumed(folder: Path, device: str, preset: str = "photos-tiny", batch: int = 64, steps: int = 8, files: int = FILES,
            more: dict | None = None) -> dict:
    """A run stopped halfway and resumed, against one never stopped: losses, gradient norms and weights to the bit.

    With torch's deterministic algorithms: attention's backward pass adds in any order otherwise.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    values = {"run.log_every": 1, "run.save_every_samples": steps // 2 * batch, "run.keep": 9,
              "data.executor": _executor(device), **(more or {})}
    config = _config(preset, folder / "whole", photographs(folder, files), device, batch, steps, values)
    train(config, start(config))
    whole, halved = config.run.folder, folder / "halved"
    shutil.copytree(whole, halved)
    half, last = sorted(path for path in (halved / "checkpoints").iterdir() if path.is_dir())[1:]
    shutil.rmtree(last)
    checkpoint.point_at(half)
    train(*restored(halved, device))
    traces = [[(line["loss"], line["grad_norm"]) for line in _logged(run)] for run in (whole, halved)]
    hashes = [checkpoint.read_state(checkpoint.find(run)).hashes[checkpoint.WEIGHTS] for run in (whole, halved)]
    return {"traces_equal": traces[0] == traces[1] and len(traces[0]) == steps, "weights_equal": hashes[0] == hashes[1],
            "executor": config.data.executor}


def _executor(device: str) -> str:
    """DALI where it is."""
    try:
        make_executor(Recipe((), 32, "dali"), device).close()
    except InputError:
        return "pillow"
    return "dali"


def _stepping(config: Config, t: Training, batch: Batch) -> Callable[[], None]:
    """One of the loop's steps, on the same batch each time."""
    objective = Objective(config, t.ranks, t.model.auxiliary)

    def step() -> None:
        global_loss(config.optim, t, objective, batch)
        clipped(config.optim, t)
        update(config.optim, t, objective, batch)
    return step


def profile(folder: Path, device: str, preset: str, batch: int, files: int = FILES, compiled: Sequence[bool] = (False, True),
            more: dict | None = None) -> dict:
    """A step of three views, operator by operator and kernel by kernel: eager, then compiled."""
    photos, ceilings, tables, idle = photographs(folder, files), Ceilings.measure(device), [], {}
    for on in compiled:
        config = _config(preset, folder / f"{preset}-profile", photos, device, batch, 1, {"run.compile": on, **(more or {})})
        t, way = start(config), "compiled" if on else "eager"
        drawn = random_batch(0, batch, len(t.recipe.kinds), t.recipe.size, t.tokenizer).to(device)
        found = traced(_stepping(config, t, drawn), device)
        tables.append(table(f"{preset}, batch {batch} of three views, bf16, {way}", found, ceilings))
        idle[way] = found.idle
    return {"ceilings": asdict(ceilings), "idle": idle, "markdown": "\n".join(tables)}
