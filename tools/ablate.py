"""Train and evaluate a grid of configurations over seeds: `python -m tools.ablate GRID.toml --processes 2`.

A cell is one row with one seed. It trains in a process of its own, is evaluated by retrieval, and is finished once its
done.json is there. Started again, the tool passes over finished cells and resumes the others. Rows of different tables that
are the same configuration share their cells.

    FOLDER/cells/HASH/run, train.log, eval.log, done.json     FOLDER/tables.md, tables.csv, tables.png, cells.csv
    with --weak also      weak.json                           FOLDER/weak/ with the same of images seen as weak views

done.json names the data and the evaluation set by their digests: with another set a cell is evaluated again, with other data
it is not done, and its run refuses to go on: remove its folder. Code has no part in it: remove what is to be run again.

A grid says: base (preset or file), folder, overrides (of every cell), seeds, tables (of tools.paper_rows), rows (more tables:
name → row → overrides) with full (name → the row that others are held against), evaluate (a retrieval set), metric.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Annotated

import torch
import typer

from evaluation.evaluate import RESULTS
from pipeline.console import InputError, WorkFailed, run, say, track
from pipeline.evalsets import open_evalset
from pipeline.progress import clock
from tools.ablate_vectors import recalls
from tools.grid import Cell, Grid
from tools.grid_tables import write_tables
from trainer import checkpoint
from trainer.distributed import pick_device

BIN = Path(sys.executable).parent


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

    def run(self, words: list[str | Path], log: Path, environment: dict[str, str], lock: IO) -> int:
        """Run a command into its log → exit status. It has `lock` as long as it lives, and hears no Ctrl-C."""
        with log.open("a", encoding="utf-8") as file:
            with self._lock:
                if self._stopped:
                    return 0
                process = subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | environment,
                                           pass_fds=[lock.fileno()], start_new_session=True)
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)


def work(grid: Grid, cell: Cell, environment: dict[str, str], stop: Stop) -> str:
    """Train and evaluate as far as it is not done → what went wrong, or nothing."""
    with cell.alone() as lock:
        if not lock:
            return f"{cell.folder}: another process is at work there; wait for it, or end it"
        if cell.done:  # by now
            return ""
        run, folder = cell.folder / "run", cell.folder
        begun = (run / "checkpoints" / checkpoint.LATEST).is_file()
        words = ["resume", run] if begun else ["run", grid.base, *cell.words]
        failed = stop.run([BIN / "uniclip-train", *words], folder / "train.log", environment, lock)
        if stop:  # also a process that was ended while it started
            return ""
        if failed:
            return f"{folder / 'train.log'}: {_last_line(folder / 'train.log')}"
        last = checkpoint.find(run)
        state = checkpoint.read_state(last)
        if state.cursor.samples_seen < cell.config.optim.samples:
            return f"{run} stopped at {state.cursor.samples_seen:,} samples"
        failed = stop.run([BIN / "uniclip-eval", "retrieval", run, grid.evaluate], folder / "eval.log", environment, lock)
        if stop:
            return ""
        if failed:
            return f"{folder / 'eval.log'}: {_last_line(folder / 'eval.log')}"
        rows = [json.loads(line) for line in (run / RESULTS).read_text(encoding="utf-8").splitlines()]
        cell.finish(state.seconds, {row["metric"]: row["value"] for row in rows if
                                    (row["data_sha256"], row["checkpoint"]) == (grid.evaluated, last.name)})
    return ""


def _last_line(path: Path) -> str:
    return (path.read_text(encoding="utf-8").strip().splitlines() or ["nothing was said"])[-1]


def run_all(grid: Grid, processes: int, minutes: float) -> list[str]:
    """Every cell that is not done, `processes` at a time → what went wrong. Raises InputError without an evaluation set."""
    cells = {cell.folder: cell for cell in grid.every_cell()}
    waiting = [cell for cell in cells.values() if cell.done is None]
    say(f"{len(cells)} cells, {len(cells) - len(waiting)} of them done")
    open_evalset(grid.evaluate)  # before hours of training
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
        except (InputError, OSError) as error:
            wrong = f"{cell.folder}: {error}"
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


def see_as_weak(grid: Grid) -> None:
    """Evaluate what is finished on weak views too, each with the vector that made it: a kind that most rows trained on."""
    evalset, device = open_evalset(grid.evaluate), pick_device("auto", "")
    cells = {cell.folder: cell for cell in grid.every_cell() if cell.done and not cell.found("weak")}
    for cell in track(cells.values(), "evaluating on weak views"):
        cell.finish((cell.done or {})["seconds"], recalls(cell.folder / "run", evalset, device)["weak", "true"], "weak")


def main(grid: Annotated[Path, typer.Argument(help="TOML file that says what is run; see the module.")],
         processes: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 1,
         minutes: Annotated[float, typer.Option(help="Stop, resumably, after so many; 0 for never.")] = 0.0,
         report: Annotated[bool, typer.Option("--report", help="Only write the tables of what is finished.")] = False,
         weak: Annotated[bool, typer.Option("--weak", help="Then also evaluate on weak views: tables in FOLDER/weak.")] = False
         ) -> None:
    """Run what is not done, then write the tables.

    Example: `python -m tools.ablate tools/grids/scenes.toml --processes 2`
    """
    for order in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(order) == signal.SIG_DFL:  # nohup ignores the second
            signal.signal(order, signal.default_int_handler)
    wanted = Grid.read(grid)
    wanted.folder.mkdir(parents=True, exist_ok=True)
    wrong = [] if report else run_all(wanted, processes, minutes)
    for line in wrong:
        say(f"failed: {line}")
    say(write_tables(wanted))
    if weak:
        see_as_weak(wanted)
        say(write_tables(wanted, "weak"))
    if wrong:
        raise WorkFailed(f"{len(wrong)} cells failed, see above the tables")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run(app)
