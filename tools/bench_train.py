"""How fast the trainer is: its loop against a bare one on the same batches, and its images/s against open_clip's trainer.

    python -m tools.bench_train --shards photos/train

trains on a folder of indexed tars, `jpg` and `txt` in each, for about ten minutes on one core, and writes the numbers and a
table to benchmarks/. Both loops, and both trainers, take turns: a busy machine slows them alike.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import nn

from pipeline.schema import Batch
from tools.side_by_side import LEAST_RATIO, TRAINERS, apart, side_by_side, sizes_of
from trainer.config import Config
from trainer.config_file import load_config
from trainer.log import METRICS
from trainer.tiles import tiled_loss
from trainer.train import train
from trainer.training import Training, start

MOST_OVERHEAD = 0.03


def bare(config: Config, t: Training) -> Callable[[Batch], float]:
    """A step and nothing else → its loss."""
    def step(batch: Batch) -> float:
        t.optimizer.zero_grad(set_to_none=True)
        image_BVD, text_BTD = t.model(batch.views, batch.vectors, batch.tokens)
        temperature_3, offset_3 = t.model.similarity()
        loss = tiled_loss(config.loss.name, image_BVD, text_BTD, temperature_3, offset_3, config.loss.supervision,
                          batch.group_id, batch.valid)
        loss.backward()
        nn.utils.clip_grad_norm_(t.model.parameters(), config.optim.clip)
        t.optimizer.step()
        return loss.item()
    return step


@dataclass
class Alternating:
    """Data of a run: batches made beforehand. Before one is handed out the bare loop takes its step on it.

    Times are seconds of each step: wall, CPU of this thread, CPU of all others.
    """

    batches: list[Batch]
    step: Callable[[Batch], float]
    ours: list[list[float]] = field(default_factory=list)
    bare: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def loader(self, tokenizer: object, recipe: object, cursor: Any, batch_size: int, *_: object) -> Iterator[tuple]:
        """As the loop asks for it."""
        for number in count():
            batch = self.batches[number % len(self.batches)]
            begin = _now()
            self.losses.append(self.step(batch))
            self.bare.append(_since(begin))
            begin = _now()
            yield batch, replace(cursor, samples_seen=cursor.samples_seen + (number + 1) * batch_size)
            self.ours.append(_since(begin))


def _now() -> tuple[float, float, float]:
    own = time.thread_time()
    return time.perf_counter(), own, time.process_time() - own


def _since(begin: tuple[float, ...]) -> list[float]:
    return [now - then for now, then in zip(_now(), begin, strict=True)]


def overhead(preset: str, settings: list[str], steps: int, save_every: int, folder: str) -> dict:
    """The whole loop against the bare one, over `steps` steps after the first two, with a checkpoint every `save_every`.

    The share of time on top, and where it goes: the median of plain, logged and saving steps minus the bare step beside
    each. A checkpoint is written by another thread: its CPU time counts too, apart.
    """
    words = [*settings, "run.device=cpu", f"run.folder={folder}"]
    batch = load_config(preset, words).optim.batch_size
    config = load_config(preset, [*words, f"optim.samples={(steps + 3) * batch}", "optim.warmup_samples=0",
                                  f"run.save_every_samples={save_every * batch}"])
    t, other = start(config), start(config)
    loader = t.data.loader(t.tokenizer, t.recipe, t.cursor, batch)
    batches = [batch for batch, _ in islice(loader, 4)]
    t.data = data = Alternating(batches, bare(config, other))  # type: ignore[assignment]
    train(config, t)
    first = json.loads((config.run.folder / METRICS).read_text().splitlines()[0])["loss"]
    if first != data.losses[0]:
        raise SystemExit(f"the loops do not compute the same: {first} and {data.losses[0]}")
    pairs = list(zip(data.ours, data.bare, strict=False))[2:]
    extra: dict[str, list[float]] = {"plain": [], "logged": [], "saving": []}
    for number, (ours, alone) in enumerate(pairs, 3):
        kind = "saving" if number % save_every == 0 else "logged" if number % config.run.log_every == 0 else "plain"
        extra[kind].append(ours[1] - alone[1])
    wall, cpu = (sum(ours[n] for ours, _ in pairs) / sum(alone[n] for _, alone in pairs) - 1 for n in (0, 1))
    elsewhere = sum(ours[2] + alone[2] for ours, alone in pairs) / sum(alone[1] for _, alone in pairs)
    return {"preset": preset, "settings": settings, "batch": batch, "views": len(t.recipe.kinds), "steps": len(pairs),
            "log_every": config.run.log_every, "save_every": save_every,
            "bare_step_seconds": median(alone[1] for _, alone in pairs), "overhead_wall": wall, "overhead_cpu": cpu,
            "other_threads": elsewhere, "extra_seconds": {kind: median(values) for kind, values in extra.items() if values},
            "passed": cpu <= MOST_OVERHEAD}


def table(loops: list[dict], trainers: list[dict]) -> str:
    """Markdown."""
    lines = ["| loop | batch | bare step s | overhead, wall | overhead, CPU | other threads, CPU | plain step | logged step "
             "| saving step |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in loops:
        extra = [f"{1e3 * row['extra_seconds'][kind]:+.1f} ms" if kind in row["extra_seconds"] else ""
                 for kind in ("plain", "logged", "saving")]
        shares = [f"{row[name]:.1%}" for name in ("overhead_wall", "overhead_cpu", "other_threads")]
        lines.append(f"| {row['name']} | {row['batch']} | {row['bare_step_seconds']:.2f} | {' | '.join([*shares, *extra])} |")
    lines += ["", "| model | px | batch | ours, images/s | open_clip | ratio | ours, CPU ms an image | open_clip | ratio |",
              "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in trainers:
        cells = [cell for key, scale in (("images_per_second", 1), ("cpu_seconds_per_image", 1e3)) for cell in (
            *(f"{scale * row['medians'][name][key]:.1f}" for name in TRAINERS), f"{row['ratios'][key]:.2f}")]
        lines.append(f"| {row['name']} | {row['sizes']['vision_cfg']['image_size']} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _machine() -> dict:
    """What the numbers were measured with, and on."""
    model = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "machine": f"{len(model)} × {model[0]}", "torch": torch.__version__, "threads": 1,
            "open_clip": version("open_clip_torch"), "load": list(os.getloadavg())}


def main(
    shards: Annotated[Path, typer.Option(help="Folder of indexed tars.", exists=True, file_okay=False)],
    presets: Annotated[str, typer.Option(help="Whose loop is measured, separated by commas.")] = "photos-tiny",
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value for these.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each loop.")] = 50,
    save_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 25,
    models: Annotated[str, typer.Option(help="open_clip models trained by both, as NAME:PIXELS:BATCH.")] = "ViT-S-32:224:32",
    turns: Annotated[int, typer.Option(help="Turns of each trainer.")] = 3,
    turn_steps: Annotated[int, typer.Option(help="Steps of a turn, after a first one.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks"),
) -> None:
    """Measure on this CPU, one thread each; print the tables, write train-cpu.json and .md."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes started below
    said, loops, trainers = _machine(), [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name in filter(None, presets.split(",")):
            given = [f"data.index={shards.absolute()}", *(settings or [])]
            loops.append({"name": name} | apart(overhead, name, given, steps, save_every, f"{scratch}/{name}"))
        for name, pixels, batch in (model.split(":") for model in filter(None, models.split(","))):
            common = {"shards": str(shards.absolute()), "batch": int(batch), "steps": turn_steps, "workers": 1,
                      "device": "cpu", "precision": "fp32", "compile": False, "resident": False}
            row = side_by_side(sizes_of(name, int(pixels)), common, turns, Path(scratch) / name)
            trainers.append({"name": name} | row | {"passed": row["ratios"]["images_per_second"] >= LEAST_RATIO})
    out.mkdir(parents=True, exist_ok=True)
    figures = said | {"overhead": loops, "open_clip_side_by_side": trainers}
    (out / "train-cpu.json").write_text(json.dumps(figures, indent=1) + "\n")
    about = (f"Commit {said['commit']}, {said['machine']}, load {said['load'][0]:.1f} at the start, one thread, torch "
             f"{said['torch']}, open_clip {said['open_clip']}. Median times.\n\nThe whole loop against a bare one on the same "
             f"batches, step by step in turn, a log line every 10 steps and a checkpoint every {save_every}; the last three "
             "columns are a step's CPU time above the bare one's. Then both trainers from the same tars, one view, InfoNCE, "
             f"fp32: {turns} turns of {turn_steps} steps, one loader thread or worker, whose time is in the CPU time. Ours "
             "encodes no more columns of a batch's texts than the longest needs, open_clip all of them.\n\n")
    (out / "train-cpu.md").write_text(about + table(loops, trainers))
    print(table(loops, trainers))


if __name__ == "__main__":
    typer.run(main)
