"""Evaluation on several ranks: features equal to one process's to the bit, computed once, stored once; failures shared."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import encoded, picture
from short_runs import PROGRAM, TORCHRUN
from tiny import tiny_run

from evaluation.results import read_rows
from pipeline.evalsets import write_evalset

COUNTED = """
import os, sys
from pathlib import Path
from evaluation import embed
from evaluation.cli import main
own = Path(sys.argv.pop(1)) / f"{os.environ.get('RANK', 0)}.log"
fixed = embed._fixed
def counting(encode, items, size, device):
    with own.open("a") as file:
        file.write(f"{len(items)}\\n")
    return fixed(encode, items, size, device)
embed._fixed = counting
main()
"""


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(scenes, tmp_path_factory.mktemp("sharded") / "run", samples=32)


def sets(root: Path) -> Path:
    pictures = [encoded(picture(i)) for i in range(150)]
    write_evalset(root / "pairs", "test", [(p, [f"thing {i}", f"number {i}"]) for i, p in enumerate(pictures)], "retrieval")
    for split, own in (("train", pictures[:70]), ("test", pictures[70:])):
        write_evalset(root / "tars", split, [(p, i % 3) for i, p in enumerate(own)], "classification", "abc", ["a {c}"])
    damaged = [*pictures[:99], pictures[99][:400]]  # in the second rank's share
    write_evalset(root / "broken", "test", [(p, 0) for p in damaged], "classification", ["x"], ["a {c}"])
    return root


def launched(world: int, counts: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """`uniclip-eval` on `world` processes that note the size of each batch they embed."""
    counts.mkdir()
    (counts / "counted.py").write_text(COUNTED)
    ranks = [PROGRAM.parent / TORCHRUN[0], *TORCHRUN[1:], str(world), "--no-python"] if world > 1 else []
    return subprocess.run([*map(str, ranks), sys.executable, counts / "counted.py", counts, *map(str, words)],
                          capture_output=True, text=True, timeout=300)


def embedded(counts: Path) -> list[list[int]]:
    return [[int(n) for n in path.read_text().split()] for path in sorted(counts.glob("*.log"))]


def entries(out: Path) -> dict[str, dict[str, bytes]]:
    return {entry.name: {file.name: file.read_bytes() for file in entry.iterdir()} for entry in (out / "features").iterdir()}


def test_two_ranks_give_the_bits_of_one_and_nothing_twice(run: Path, tmp_path: Path) -> None:
    root = sets(tmp_path / "sets")
    whole, shared = (tmp_path / f"{world}/results.jsonl" for world in ("one", "two"))
    one = launched(1, tmp_path / "counts1", "suite", run, root, "--out", whole)
    two = launched(2, tmp_path / "counts2", "suite", run, root, "--out", shared)
    assert one.returncode == two.returncode == 0, two.stderr[-2000:]
    assert entries(whole.parent) == entries(shared.parent) and len(entries(whole.parent)) == 5
    one_by_one, at_once = ([(row["dataset"], row["task"], row["metric"], row["value"], *row["interval"])
                            for row in read_rows(out)] for out in (whole, shared))
    assert one_by_one == at_once and len(set(at_once)) == len(at_once) == 12
    assert {dataset for dataset, *_ in at_once} == {"pairs", "tars"}
    assert two.stdout.count("not measured: broken, zeroshot: ") == 1 and "key s0000099: the image cannot" in two.stdout
    assert not list((shared.parent / "features").glob(".*"))
    (alone,), halves = embedded(tmp_path / "counts1"), embedded(tmp_path / "counts2")
    assert sorted(alone) == sorted(sum(halves, [])) and len(halves) == 2 and min(map(len, halves)) >= len(alone) // 3
    assert two.stdout.count("results ") == 1
    again = launched(2, tmp_path / "again", "suite", run, root, "--out", shared)
    assert again.returncode == 0 and len(read_rows(shared)) == 12 and embedded(tmp_path / "again") == [[64]]
    assert again.stdout.count("skipped") == 4
