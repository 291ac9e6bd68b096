"""A grid of cells: each is run once, a stopped one goes on, one that fails is named, tables say what was found."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tomli_w
from conftest import ROOT
from short_runs import TINY

from pipeline.console import InputError
from pipeline.evalsets import open_evalset
from pipeline.index import MANIFEST_NAME
from tools.ablate import main, run_all
from tools.ablate_vectors import CENTRE, recalls
from tools.grid import Grid
from tools.grid_tables import table_of, write_tables
from trainer import checkpoint


def grid_of(scenes, folder, **more) -> Grid:
    short = {**TINY, "optim.samples": 32, "data.index": scenes / "train", "data.executor": "pillow", "run.device": "cpu"}
    path = folder / "grid.toml"
    path.write_text(tomli_w.dumps({
        "base": "scenes-tiny", "folder": str(folder / "out"), "overrides": [f"{key}={value}" for key, value in short.items()],
        "seeds": [0], "rows": {"heads": {"full": [], "linear": ["model.head.kind=mlp", "model.head.depth=1"]}},
        "full": {"heads": "full"}, "evaluate": str(scenes / "evalsets" / "retrieval"), **more}))
    return Grid.read(path)


def test_cells_are_trained_evaluated_and_then_left_alone(scenes, tmp_path, capfd):
    grid = grid_of(scenes, tmp_path)
    assert run_all(grid, 2, 0) == []
    cells = sorted((tmp_path / "out" / "cells").iterdir())
    assert len(cells) == 2
    (cells[0] / "done.json").unlink()  # killed just before it
    before = [(path / "run" / "metrics.jsonl").read_text() for path in cells]
    assert run_all(grid, 1, 0) == []
    assert [(path / "run" / "metrics.jsonl").read_text() for path in cells] == before, "it was not trained again"
    assert "2 cells, 1 of them done" in "".join(capfd.readouterr())
    assert checkpoint.read_state(checkpoint.find(cells[1] / "run")).cursor.samples_seen == 32
    main(tmp_path / "grid.toml", report=True, weak=True)
    weak = {cell: json.loads((cell / "weak.json").read_text())["metrics"] for cell in cells}
    seen = recalls(cells[0] / "run", open_evalset(grid.evaluate))
    assert weak[cells[0]] == seen["weak", "true"] != seen[CENTRE, "true"]
    assert weak[cells[0]].keys() == json.loads((cells[0] / "done.json").read_text())["metrics"].keys()
    assert "| linear | 1 |" in (tmp_path / "out" / "weak" / "tables.md").read_text()
    assert "seen as weak views" in (tmp_path / "out" / "weak" / "tables.md").read_text()
    assert "| linear | 1 |" in (tmp_path / "out" / "tables.md").read_text()


def test_a_cell_that_fails_is_named_and_the_others_finish(scenes, tmp_path):
    (scenes.parent / "empty").mkdir(exist_ok=True)
    rows = {"data": {"full": [], "none": [f"data.index={scenes.parent / 'empty'}"]}}
    (wrong,) = run_all(grid_of(scenes, tmp_path, rows=rows, full={"data": "full"}), 2, 0)
    assert "train.log: error:" in wrong
    assert str(scenes.parent / "empty") in wrong
    assert len(list((tmp_path / "out" / "cells").glob("*/done.json"))) == 1


def test_after_its_minutes_it_stops_and_can_go_on(scenes, tmp_path):
    long = [f"{key}={value}" for key, value in (TINY | {"optim.samples": 10**6, "data.index": scenes / "train"}).items()]
    grid = grid_of(scenes, tmp_path, overrides=[*long, "data.executor=pillow", "run.device=cpu"])
    began = time.monotonic()
    assert run_all(grid, 1, 0.25) == []
    assert time.monotonic() - began < 60
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    assert not (cell / "done.json").is_file()
    if (cell / "run" / "checkpoints" / "latest").is_file():  # not ended while it started
        assert checkpoint.read_state(checkpoint.find(cell / "run")).cursor.samples_seen < 10**6


def test_tables_hold_means_errors_and_differences_seed_by_seed(scenes, tmp_path):
    grid = grid_of(scenes, tmp_path, seeds=[0, 1, 2], tables=["5"])
    found = {"domain, unified": (0.50, 0.56, 0.53), "shared, unified": (0.48, 0.52, 0.50), "domain, separate": (0.4,)}
    rows, _ = grid.every_table()["5"]
    for row, values in found.items():
        for seed, value in enumerate(values):
            cell = grid.cell(rows[row], seed)
            cell.folder.mkdir(parents=True)
            cell.finish(120, {grid.metric: value})
    lines = {line["row"]: line for line in table_of(grid, "5")}
    shared, full = lines["shared, unified"], lines["domain, unified"]
    assert (full["mean"], full["standard_error"]) == pytest.approx((53, 3 / math.sqrt(3)))
    assert (shared["difference"], shared["difference_error"]) == pytest.approx((-3, 1 / math.sqrt(3)))
    assert math.isnan(full["difference"])
    assert lines["domain, separate"]["difference"] == pytest.approx(-10)
    assert math.isnan(lines["domain, separate"]["standard_error"])
    assert shared["paper"] == 25.51
    assert shared["difference_margin"] == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)  # Student's t, two degrees of freedom
    assert "| shared, unified | 3 | 50.0 ± 1.2 | **-3.0 ± 0.6** | 25.51 | 2.0 |" in write_tables(grid)
    assert (tmp_path / "out" / "tables.png").stat().st_size > 5000
    assert len(list(csv.DictReader((tmp_path / "out" / "tables.csv").open()))) == 3 + 1  # the head's full model is the same
    cells = list(csv.DictReader((tmp_path / "out" / "cells.csv").open()))
    assert [(row["row"], row["seed"], float(row["value"])) for row in cells[:3]] == [
        ("shared, unified", str(seed), value) for seed, value in enumerate(found["shared, unified"])]
    assert len(cells) == 3 + 3 + 1 + 3


def test_another_set_or_other_data_make_a_cell_undone(scenes, tmp_path):
    sets = tmp_path / "sets"
    shutil.copytree(scenes / "evalsets" / "retrieval", sets / "a")
    shutil.copytree(scenes / "evalsets" / "colour", sets / "b")
    shutil.copytree(scenes / "train", tmp_path / "train")
    more = {"overrides": [f"data.index={tmp_path / 'train'}"], "rows": {"one": {"full": []}}, "full": {"one": "full"}}
    cell = grid_of(scenes, tmp_path, evaluate=str(sets / "a"), **more).cell((), 0)
    cell.folder.mkdir(parents=True)
    cell.finish(1, {"image_to_text_recall@1": 0.5})
    assert cell.done
    other = grid_of(scenes, tmp_path, evaluate=str(sets / "b"), **more)
    assert other.cell((), 0).folder == cell.folder
    assert not other.cell((), 0).done
    with pytest.raises(InputError, match="none of the 1 finished cells"):
        write_tables(other)
    shutil.rmtree(sets)
    with pytest.raises(InputError, match="evaluation set .*a does not exist"):
        run_all(grid_of(scenes, tmp_path, evaluate=str(sets / "a"), **more), 1, 0)
    # to report what was found needs no set
    same = grid_of(scenes, tmp_path, evaluate=str(sets / "a"), **more)
    assert same.cell((), 0).done
    manifest = tmp_path / "train" / MANIFEST_NAME
    told = json.loads(manifest.read_text()) | {"fingerprint": "0" * 64}
    del told["crc32"]
    manifest.write_text(json.dumps(told))
    assert not same.cell((), 0).done


def test_a_cell_is_held_by_whatever_still_works_in_it(scenes, tmp_path):
    grid = grid_of(scenes, tmp_path)
    with grid.cell((), 0).alone() as lock:
        assert lock
        sleeper = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    (wrong,) = run_all(grid, 1, 0)  # the other cell is run
    assert "another process is at work there" in wrong
    sleeper.kill()
    sleeper.wait()
    with grid.cell((), 0).alone() as lock:
        assert lock


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT])
def test_an_order_to_end_lets_the_runs_save_what_they_have(scenes, tmp_path, order):
    long = [f"{key}={value}" for key, value in (TINY | {"optim.samples": 10**6, "data.index": scenes / "train",
                                                        "run.save_every_samples": 10**6}).items()]
    grid = grid_of(scenes, tmp_path, overrides=[*long, "data.executor=pillow", "run.device=cpu"], rows={"one": {"full": []}},
                   full={"one": "full"})
    tool = subprocess.Popen([sys.executable, "-m", "tools.ablate", tmp_path / "grid.toml"], cwd=ROOT, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored by background jobs
    run = grid.cell((), 0).folder / "run"
    try:
        while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
            assert tool.poll() is None
            time.sleep(0.1)
        os.killpg(tool.pid, order)
        assert tool.wait(120) != 0
        assert 0 < checkpoint.read_state(checkpoint.find(run)).cursor.samples_seen < 10**6
        with grid.cell((), 0).alone() as lock:
            assert lock, "its run has ended"
    finally:
        tool.kill()
        subprocess.run(["pkill", "-KILL", "-f", str(run)])


def test_equal_configurations_are_one_cell(scenes, tmp_path):
    grid = grid_of(scenes, tmp_path, tables=["4a", "4b", "5", "6", "1"], rows={}, full={}, seeds=[0])
    cells = {grid.cell(overrides, 0).folder for rows, _ in grid.every_table().values() for overrides in rows.values()}
    assert sum(len(rows) for rows, _ in grid.every_table().values()) == 27
    assert len(cells) == 22


@pytest.mark.parametrize("more, message", [
    ({"tables": ["7"]}, "no table 7; known: 4a"), ({"full": {}}, "full.heads must name one of its rows: full, linear"),
    ({"seeds": []}, "seeds"), ({"colour": 1}, "colour: Extra"),
    ({"metric": "image_to_text_recall@2"}, "metric: .*image_to_text_recall@2 is none of image_to_text_recall@1"),
])
def test_a_grid_that_cannot_be_is_refused(scenes, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        grid_of(scenes, tmp_path, **more)


def test_the_committed_grids_can_be_read():
    grids = sorted((ROOT / "tools" / "grids").glob("*.toml"))
    assert grids
    for path in grids:
        grid = Grid.read(path)
        for rows, _ in grid.every_table().values():
            for overrides in rows.values():
                grid.cell(overrides, 0)
