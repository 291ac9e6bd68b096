"""What the README shows is what happens: its commands are run here, on a tiny setting."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command, encoded, picture

README = (ROOT / "README.md").read_text()
TINY = "--set model.image.depth=1 --set model.text.depth=1 --set optim.samples=64 --set optim.batch_size=16"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def block(heading: str) -> str:
    """The first shell block below a heading of the README."""
    found = re.search(rf"^## {re.escape(heading)}$.*?^```sh\n(.*?)^```", README, re.M | re.S)
    assert found, f"README has no shell block under {heading}"
    return found[1]


def test_make_demo_goes_from_nothing_to_the_report_and_again(tmp_path):
    demo = [sys.executable, "-m", "tools.demo", tmp_path / "demo", "--scenes", "150", "--held-out", "32", "--samples", "384",
            "--port", str(free_port())]
    done = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "demo" / "run" / "report.html").read_text()
    assert "image → text R@1" in page
    results = (tmp_path / "demo" / "run" / "results.jsonl").read_text()
    again = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "demo" / "run" / "results.jsonl").read_text() == results


def test_make_demo_is_what_the_readme_says():
    assert "make demo" in block("Try it")
    assert "-m tools.demo demo" in (ROOT / "Makefile").read_text()


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of pictures and its table, as the README's second section describes it."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    rows = ["image\tsplit\tcaption\n"]
    for number in range(96):
        (folder / "images" / f"{number}.jpg").write_bytes(encoded(picture(number), quality=90))
        split = "train" if number < 64 else "dev"
        rows += [f"images/{number}.jpg\t{split}\t{word} \"picture number {number}\n" for word in ("a", "the")]
    (folder / "captions.tsv").write_text("".join(rows))
    return folder


def test_the_readmes_commands_for_ones_own_photographs_run(photos):
    script = block("Your own photographs").replace("8000", str(free_port()))
    assert "uniclip-train run photos-tiny" in script
    script = re.sub(r"(uniclip-train run photos-tiny)", rf"\1 {TINY}", script)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", f"trap 'kill $(jobs -p)' EXIT\n{script}"], cwd=photos.parent, env=environment,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64  100.0%  stored" in done.stdout
    assert "32  100.0%  stored" in done.stdout
    assert (photos.parent / "runs" / "photos" / "report.html").is_file()


@pytest.mark.parametrize("words", re.findall(r"^\| `(uniclip-[a-z]+ [a-z ]+?)`", README, re.M))
def test_every_command_of_the_readmes_table_exists(words):
    assert command(*words.split(), "--help").returncode == 0
