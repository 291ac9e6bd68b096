"""Train and evaluate a grid of configurations over seeds: `python -m tools.ablate GRID.toml --processes 2`.

A cell is one row with one seed. It trains in a process of its own, is evaluated by retrieval, and is finished once its
done.json is there. Started again, the tool passes over finished cells and resumes the others. Rows of different tables that
are the same configuration share their cells.

    FOLDER/cells/HASH/run, train.log, eval.log, done.json     FOLDER/tables.md, tables.csv

A grid says: base (preset or file), folder, overrides (of every cell), seeds, tables (of tools.paper_rows), rows (more tables:
name → row → overrides) with full (name → the row that others are held against), evaluate (a retrieval set), metric.
"""

import csv
import hashlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import Field, ValidationError

from pipeline.console import InputError, say
from pipeline.files import write_json
from pipeline.progress import clock
from tools.paper_rows import FULL, ROWS, in_the_paper
from trainer import checkpoint
from trainer.config import Config, Here, Section, load_config

BIN = Path(sys.executable).parent
COLUMNS = ("table", "row", "seeds", "mean", "standard_error", "difference", "difference_error", "paper", "train_minutes")


class Grid(Section):
    """What is run; see the module."""

    base: str
    folder: Here
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    tables: tuple[str, ...] = ()
    rows: dict[str, dict[str, tuple[str, ...]]] = {}
    full: dict[str, str] = {}
    evaluate: Here
    metric: str = "image_to_text_recall@1"

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """Raises InputError."""
        try:
            grid = cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path} is no grid: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if unknown := set(grid.tables) - set(ROWS):
            raise InputError(f"{path}: no table {min(unknown)}; known: {', '.join(ROWS)}, others are written under [rows.NAME]")
        if wrong := [name for name, rows in grid.rows.items() if grid.full.get(name) not in rows]:
            raise InputError(f"{path}: full.{wrong[0]} must name one of its rows: {', '.join(grid.rows[wrong[0]])}")
        return grid

    def every_table(self) -> dict[str, tuple[dict[str, tuple[str, ...]], str]]:
        """Name → its rows, and the one that others are held against."""
        return {name: (ROWS[name], FULL[name]) for name in self.tables} | {
            name: (rows, self.full[name]) for name, rows in self.rows.items()}

    def cell(self, overrides: tuple[str, ...], seed: int) -> "Cell":
        """Raises InputError for overrides that do not go together."""
        placed = [*self.overrides, *overrides, f"run.seed={seed}"]
        config = load_config(self.base, [*placed, f"run.folder={self.folder}"])
        name = hashlib.sha256(config.to_toml().encode()).hexdigest()[:12]
        folder = self.folder / "cells" / name
        return Cell(folder, config, [word for override in (*placed, f"run.folder={folder / 'run'}")
                                     for word in ("--set", override)])


@dataclass(frozen=True)
class Cell:
    """One configuration with one seed."""

    folder: Path
    config: Config
    words: list[str]

    @property
    def done(self) -> dict | None:
        """What its evaluation found, None before."""
        path = self.folder / "done.json"
        return json.loads(path.read_text()) if path.is_file() else None


class Stop:
    """Ends the processes that are running: they save what they have. Later ones do not start."""

    def __init__(self) -> None:
        self._stopped, self._running, self._lock = False, set[subprocess.Popen](), threading.Lock()

    def __bool__(self) -> bool:
        return self._stopped

    def __call__(self) -> None:
        """All at once."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)

    def run(self, words: list[str | Path], log: Path, environment: dict[str, str]) -> int:
        """Run a command into its log → exit status."""
        with log.open("a") as file:
            with self._lock:
                if self._stopped:
                    return 0
                process = subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | environment)
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)


def work(grid: Grid, cell: Cell, environment: dict[str, str], stop: Stop) -> str:
    """Train and evaluate as far as it is not done → what went wrong, or nothing."""
    run, folder = cell.folder / "run", cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    begun = (run / "checkpoints" / checkpoint.LATEST).is_file()
    words = ["resume", run] if begun else ["run", grid.base, *cell.words]
    failed = stop.run([BIN / "uniclip-train", *words], folder / "train.log", environment)
    if stop:  # also a process that was ended while it started
        return ""
    if failed:
        return f"{folder / 'train.log'}: {_last_line(folder / 'train.log')}"
    state = checkpoint.read_state(checkpoint.find(run))
    if state.cursor.samples_seen < cell.config.optim.samples:
        return f"{run} stopped at {state.cursor.samples_seen:,} samples"
    failed = stop.run([BIN / "uniclip-eval", "retrieval", run, grid.evaluate], folder / "eval.log", environment)
    if stop:
        return ""
    if failed:
        return f"{folder / 'eval.log'}: {_last_line(folder / 'eval.log')}"
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    write_json(folder / "done.json", {"seconds": state.seconds, "overrides": cell.words[1::2],
                                      "metrics": {row["metric"]: row["value"] for row in rows}})
    return ""


def _last_line(path: Path) -> str:
    return (path.read_text().strip().splitlines() or ["nothing was said"])[-1]


def run_all(grid: Grid, processes: int, minutes: float) -> list[str]:
    """Every cell that is not done, `processes` at a time → what went wrong."""
    cells = {cell.folder: cell for rows, _ in grid.every_table().values() for seed in grid.seeds
             for cell in (grid.cell(overrides, seed) for overrides in rows.values())}
    waiting = [cell for cell in cells.values() if cell.done is None]
    say(f"{len(cells)} cells, {len(cells) - len(waiting)} of them done")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    gpus = [name for name in visible.split(",") if name]
    stop, free, began, left = Stop(), list(range(processes)), time.monotonic(), len(waiting)
    lock = threading.Lock()
    timer = threading.Timer(60 * minutes, stop) if minutes else None

    def one(cell: Cell) -> str:
        nonlocal left
        with lock:
            slot = free.pop()
        environment = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
        try:
            wrong = "" if stop else work(grid, cell, {"OMP_NUM_THREADS": "1"} | environment, stop)
        finally:
            with lock:
                free.append(slot)
        with lock:
            if done := cell.done:
                left -= 1
                ahead = (time.monotonic() - began) / (len(waiting) - left) * left
                say(f"{cell.folder.name} {grid.metric} {done['metrics'][grid.metric]:.1%}  {left} left, about {clock(ahead)}")
        return wrong

    if timer:
        timer.start()
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(one, cell) for cell in waiting]
        try:
            return [wrong for future in futures if (wrong := future.result())]
        except BaseException:
            stop()  # before the pool waits for what is running
            raise
        finally:
            if timer:
                timer.cancel()


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error over seeds: NaN for a single one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def table_of(grid: Grid, name: str) -> list[dict]:
    """One line for each row that has a finished cell: percentages, differences to the full model seed by seed."""
    rows, full = grid.every_table()[name]
    found = {row: {seed: done for seed in grid.seeds if (done := grid.cell(overrides, seed).done)}
             for row, overrides in rows.items()}
    lines = []
    for row, by_seed in found.items():
        value = {seed: 100 * done["metrics"][grid.metric] for seed, done in by_seed.items()}
        base = {seed: 100 * done["metrics"][grid.metric] for seed, done in found[full].items()}
        if not value:
            continue
        both = [value[seed] - base[seed] for seed in value if seed in base and row != full]
        difference = mean_and_error(both) if both else (math.nan, math.nan)
        minutes = statistics.fmean(done["seconds"] for done in by_seed.values()) / 60
        paper = in_the_paper(name, row)
        lines.append(dict(zip(COLUMNS, (name, row, len(value), *mean_and_error(list(value.values())), *difference,
                                        math.nan if paper is None else paper, minutes), strict=True)))
    return lines


def write_tables(grid: Grid) -> str:
    """tables.csv and tables.md of what is finished → the latter's text."""
    tables = {name: table_of(grid, name) for name in grid.every_table()}
    with (grid.folder / "tables.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({key: "" if value != value else value for key, value in line.items()}
                         for lines in tables.values() for line in lines)
    text = "\n".join(_markdown(grid, name, lines) for name, lines in tables.items())
    (grid.folder / "tables.md").write_text(text)
    return text


def _markdown(grid: Grid, name: str, lines: list[dict]) -> str:
    head = [f"## Table {name}", "", f"{grid.metric} in percent, mean ± standard error over seeds; difference to "
            f"`{grid.every_table()[name][1]}` of the same seed.", "",
            "| row | seeds | value | difference | paper | minutes |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(f"| {x['row']} | {x['seeds']} | {_with_error(x['mean'], x['standard_error'])} | "
                               f"{_with_error(x['difference'], x['difference_error'], '+')} | {_number(x['paper'], '.2f')} | "
                               f"{x['train_minutes']:.1f} |" for x in lines), ""])


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _with_error(mean: float, error: float, sign: str = "") -> str:
    return _number(mean, f"{sign}.1f") + (f" ± {error:.1f}" if not math.isnan(error) else "")


def main(grid: Annotated[Path, typer.Argument(help="TOML file that says what is run; see the module.")],
         processes: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 1,
         minutes: Annotated[float, typer.Option(help="Stop, resumably, after so many; 0 for never.")] = 0.0,
         report: Annotated[bool, typer.Option("--report", help="Only write the tables of what is finished.")] = False) -> None:
    """Run what is not done, then write the tables."""
    try:
        wanted = Grid.read(grid)
        wanted.folder.mkdir(parents=True, exist_ok=True)
        wrong = [] if report else run_all(wanted, processes, minutes)
        say(write_tables(wanted))
    except InputError as error:
        sys.exit(f"error: {error}")
    for line in wrong:
        say(f"failed: {line}")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
