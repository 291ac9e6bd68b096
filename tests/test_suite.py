"""`suite`: everything under a root, one broken set not costing the others, kill -9 anywhere and again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import command, encoded, picture
from test_cache import stub
from tiny import tiny_run

from evaluation.evaluate import Bench
from evaluation.results import append_rows, read_rows
from evaluation.suite import find_sets, suite
from pipeline.console import InputError
from pipeline.evalsets import write_evalset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three sets: captions, labels in tars with a train split, labels in a table."""
    folder = tmp_path / "sets"
    pictures = [encoded(picture(i)) for i in range(24)]
    write_evalset(folder / "deep/pairs", "test", [(p, [f"thing {i}"]) for i, p in enumerate(pictures)], "retrieval")
    for split, own in (("train", pictures[:12]), ("test", pictures[12:])):
        write_evalset(folder / "tars", split, [(p, i % 3) for i, p in enumerate(own)], "classification", "abc", ["a {c}"])
    (folder / "table").mkdir()
    lines = ["image\tsplit\tlabel"]
    for i, data in enumerate(pictures):
        (folder / "table" / f"{i}.jpg").write_bytes(data)
        lines.append(f"{i}.jpg\t{'train' if i < 12 else 'test'}\t{'xy'[i % 2]}")
    (folder / "table/labels.tsv").write_text("\n".join(lines) + "\n")
    (folder / "table/zeroshot_classification_templates.txt").write_text("a {c}\n")
    return folder


EXPECTED = {("pairs", "retrieval"): 6, **{(name, task): 2 for name in ("table", "tars")
                                          for task in ("zeroshot", "probe", "knn")}}


def counted(out: Path) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for row in read_rows(out):
        key = row["dataset"], row["task"]
        found[key] = found.get(key, 0) + 1
    return found


def test_everything_is_found_and_measured_once(root: Path, tmp_path: Path) -> None:
    assert [path.name for path in find_sets(root)] == ["pairs", "table", "tars"]
    bench = Bench.of(stub(), tmp_path / "out/results.jsonl")
    rows, left = suite(bench, root)
    assert counted(bench.out) == EXPECTED and not left and len(rows) == sum(EXPECTED.values())
    again = Bench.of(stub(), bench.out)
    rows, left = suite(again, root)
    assert counted(bench.out) == EXPECTED and len(rows) == sum(EXPECTED.values()) and again.cache.misses == 0
    assert suite(Bench.of(stub("new weights"), bench.out), root)[1] == []
    assert counted(bench.out) == {key: 2 * n for key, n in EXPECTED.items()}


def test_a_broken_set_is_told_and_the_others_are_measured(root: Path, tmp_path: Path) -> None:
    (root / "tars/test/0.tar").write_bytes(b"nothing of the kind")
    bench = Bench.of(stub(), tmp_path / "results.jsonl")
    rows, left = suite(bench, root)
    assert {row["dataset"] for row in rows} == {"pairs", "table"}
    assert left and all("tars" in line and "cannot be read" in line for line in left)
    with pytest.raises(InputError, match="holds no evaluation set"):
        find_sets(root / "tars/test")


def test_a_torn_last_line_is_left_out_and_then_replaced(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    append_rows(out, [{"metric": "m", "value": 1.0}])
    with out.open("a") as file:
        file.write('{"metric": "torn by a k')
    assert [row["value"] for row in read_rows(out)] == [1.0]
    append_rows(out, [{"metric": "m", "value": 2.0}])
    assert [row["value"] for row in read_rows(out)] == [1.0, 2.0] and out.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("finished", [1, 5, 13, 19])
def test_a_kill_costs_no_finished_row_and_doubles_none(finished: int, root: Path, tmp_path: Path) -> None:
    """The child is this process without its threads, with a slow model."""
    out = tmp_path / "results.jsonl"
    model = stub()
    slow = replace(model, view=lambda data: time.sleep(0.002) or model.view(data))
    child = os.fork()
    if not child:
        suite(Bench.of(slow, out), root)
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0) and len(read_rows(out)) < finished:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    before = read_rows(out)
    suite(Bench.of(model, out), root)
    assert read_rows(out)[:len(before)] == before and counted(out) == EXPECTED
    assert not list((tmp_path / "features").glob(".*.partial"))


@pytest.mark.slow
def test_killed_anywhere_and_begun_again_it_ends_with_the_same_rows(scenes: Path, root: Path, tmp_path: Path) -> None:
    run = tiny_run(scenes, tmp_path / "run", samples=32)
    whole = tmp_path / "whole/results.jsonl"
    assert command("uniclip-eval", "suite", run, root, "--out", whole).returncode == 0
    killed = tmp_path / "killed/results.jsonl"
    words = [Path(sys.executable).parent / "uniclip-eval", "suite", run, root, "--out", killed]
    kept: list[bytes] = []
    for wanted in (1, 3):  # kill after the first, then after a later task has finished
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(counted(killed)) < wanted:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept.append(killed.read_bytes())
    assert command(*("uniclip-eval", "suite", run, root, "--out", killed)).returncode == 0
    final = killed.read_bytes()
    assert all(final.startswith(before[:before.rfind(b"\n") + 1]) for before in kept)
    assert counted(killed) == counted(whole) == EXPECTED

    def numbers(out: Path) -> dict[tuple, float]:
        return {(row["dataset"], row["task"], row["metric"]): row["value"] for row in map(json.loads, out.open())}

    assert numbers(killed) == numbers(whole)
    assert not list((tmp_path / "killed/features").glob(".*")) or command(
        "uniclip-eval", "suite", run, root, "--out", killed).returncode == 0
