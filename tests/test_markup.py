"""Names that strangers chose are shown, and never obeyed: by a terminal, Markdown, HTML or a spreadsheet."""

import csv
import shutil
from pathlib import Path

import pytest
from conftest import command
from markdown_it import MarkdownIt
from tiny import tiny_run

NAME = "=1+1 [click](http:evil) `x` <img src=x> | \x1b[2J\x1b]0;owned\x07 \u202egnp.exe ![](x)"


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(scenes, tmp_path_factory.mktemp("named") / "run")


def test_a_set_of_a_hostile_name_is_text_everywhere(run: Path, scenes: Path, tmp_path: Path) -> None:
    evalset = tmp_path / NAME
    shutil.copytree(scenes / "evalsets/colour", evalset)
    (evalset / "classnames.txt").write_text((evalset / "classnames.txt").read_text().replace("red", "red\x1b[31m"))
    told = command("uniclip-eval", "zeroshot", run, evalset)
    assert told.returncode == 0, told.stderr
    again = command("uniclip-eval", "zeroshot", run, evalset)
    wrong = command("uniclip-eval", "retrieval", run, evalset)
    assert wrong.returncode == 2
    for text in (told.stdout, told.stderr, again.stdout, wrong.stderr):
        assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert "\\x1b[2J" in told.stdout and "\\x1b[2J" in wrong.stderr

    assert command("uniclip-eval", "report", run).returncode == 0
    assert command("uniclip-train", "export", run, tmp_path / "model").returncode == 0
    for file in (run / "report.md", tmp_path / "model/README.md"):
        page = MarkdownIt("commonmark").enable("table").render(file.read_text().split("---\n", 2)[-1])
        assert "<a " not in page and "<img" not in page and "[click](http:evil)" in page and "\x1b" not in page, file
    with (run / "report.csv").open(newline="") as file:
        assert {row["dataset"] for row in csv.DictReader(file)} == {f"'{NAME}"}
    assert "<img src=x>" not in (run / "report.html").read_text()
