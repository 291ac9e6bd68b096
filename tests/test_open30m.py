"""The documented recipe, word for word, on miniatures of the four published lists: from URL files to 50 training steps."""

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, encoded
from shards import drawing
from test_published import metadata_line
from webserver import serving

import pipeline.cli
import trainer.cli
from pipeline.index import Index
from pipeline.skips import read_skips

PER_LIST = 30
STEPS = 50
# What a miniature on loopback needs besides what is documented.
TINY = ["data.executor=pillow", f"optim.samples={8 * STEPS}", "optim.batch_size=8", "optim.warmup_samples=80",
        "model.image.depth=1", "model.text.depth=1", "model.dim=32", "run.log_every=10"]
BESIDES = {"urls": ["--expect", "0"], "retry": ["--distributor", "inline"], "index": ["--workers", "1"],
           "download": ["--allow-address", "127.0.0.1", "--distributor", "inline", "--shard-size", "20"],
           "run": [word for setting in TINY for word in ("--set", setting)]}
# bash takes the page's blocks apart; the commands themselves run in this process, which imports torch once and not 22 times.
RECORDER = """
set -e
uniclip-data() { printf '%s\\0' data "$@"; echo; }
uniclip-train() { printf '%s\\0' train "$@"; echo; }
"""


def recipe() -> str:
    """All shell blocks of the page."""
    return "\n".join(re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "open30m.md").read_text(), re.DOTALL))


def commands(folder: Path) -> list[list[str]]:
    """Program and words of each command of the page."""
    done = subprocess.run(["bash", "-c", RECORDER + recipe()], cwd=folder, capture_output=True, text=True, check=True)
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


def _run(program: str, command: str, *words: str) -> None:
    """One command of the page, in the current folder."""
    expanded = [path for word in words for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    if program == "train":
        expanded[0] = "scenes-tiny"
    app = {"data": pipeline.cli.app, "train": trainer.cli.app}[program]
    assert not app([command, *expanded, *BESIDES.get(command, [])], standalone_mode=False)


def _write_lists(folder: Path, url) -> None:
    """The four files under their published names, with their quirks; the lists share one URL each with the next."""
    def rows(first: int) -> range:
        return range(first, first + PER_LIST)

    (folder / "Train_GCC-training.tsv").write_text(
        '"an unbalanced quote\t' + url(0) + "\n" + "".join(f"actor number {n} arrives\t{url(n)}\n" for n in rows(1))
        + "a\ttab\t" + url(2) + "\n")
    lines = "".join(f"{url(n)}\t<PERSON> says \"hi {n}\n" for n in rows(PER_LIST))
    (folder / "cc12m.tsv").write_bytes(lines.encode() + url(1).encode() + b"\tbad \xff bytes\n")
    (folder / "yfcc15m_clean_open_data.json").write_text("".join(
        json.dumps({"caption": f"photo {n}\u2028of a thing", "filename": f"{n}.jpg", "url": url(n)}) + "\n"
        for n in rows(2 * PER_LIST - 1)))
    photos = rows(3 * PER_LIST)
    (folder / "yfcc100m_subset_data.tsv").write_text("".join(f"{n}\t{n}\thash{n}\n" for n in photos))
    lines = "".join(metadata_line(n, n, f"Title & <b>{n}</b>", "Ünd a description" * (n % 2)) for n in range(5 * PER_LIST))
    (folder / "yfcc100m_dataset").write_text(re.sub(r"http://h/(\d+)\.jpg", lambda found: url(int(found[1])), lines))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open30m")
    with serving() as site:
        _write_lists(folder, lambda number: site.url(f"/{number}.jpg"))
        site.pages.update({f"/{number}.jpg": encoded(drawing(number % 100).resize((50 + number,) * 2), quality=90)
                           for number in range(5 * PER_LIST) if number % 10})  # each tenth is a dead link
        tries = iter(range(100))
        site.pages["/5.jpg"] = lambda handler: None if next(tries) < 2 else _answer(handler, encoded(drawing(5)))
        shown = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(shown):
            for words in commands(folder):
                _run(*words)
        yield folder, shown.getvalue()


def _answer(handler, body: bytes) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)


def test_every_row_of_every_list_is_accounted_for(made):
    folder, shown = made
    assert shown.count("stored") >= 8
    counts = {name: json.loads((folder / "shards" / name / "download.json").read_text()) for name in (
        "cc3m", "cc12m", "yfcc15m-v1", "yfcc15m-v2")}
    assert {name: told["rows"] for name, told in counts.items()} == {
        "cc3m": PER_LIST + 1, "cc12m": PER_LIST, "yfcc15m-v1": PER_LIST, "yfcc15m-v2": PER_LIST}
    for told in counts.values():
        assert told["rows"] == told["stored"] + sum(told["failed"].values())
        assert told["failed"]["http 404"] in (3, 4)
    refused = [json.loads(line) for path in sorted(folder.glob("urls/*.refused.jsonl")) for line in path.open()]
    assert [line["reason"] for line in refused] == ["not UTF-8", "3 columns instead of 2"]


def test_the_merged_index_holds_all_four_once(made):
    folder, _ = made
    index = Index.open(folder / "open30m")
    numbers = {n for n in range(4 * PER_LIST) if n % 10 and n != 3 * PER_LIST - 1}  # that one is in no list
    assert len(index) == len(numbers), "shared URLs are one sample"
    assert index.manifest["sources"] == ["cc12m", "cc3m", "yfcc15m-v1", "yfcc15m-v2"]
    assert index.manifest["counts"]["merged"] == len({PER_LIST, 2 * PER_LIST - 1} & numbers)
    groups = index.columns(np.arange(len(index)))["group"]
    assert (groups >= 0).sum() == 2 * len([n for n in numbers if n >= 100]), "drawings 0 … 19 come twice"
    assert (folder / "shards" / "cc3m" / "retry1" / "download.json").exists()
    assert any("Ünd a description" in caption for row in range(len(index)) for caption in index.captions(row))


def test_it_trains(made):
    folder, _ = made
    metrics = [json.loads(line) for line in (folder / "runs" / "open30m" / "metrics.jsonl").open()]
    assert (folder / "runs" / "open30m" / "checkpoints" / f"{8 * STEPS:012}").is_dir()
    assert all(np.isfinite(line["loss"]) for line in metrics)
    assert read_skips(folder / "open30m" / "small.parquet")


def test_the_page_about_it_names_every_source(made):
    card = (made[0] / "open30m" / "card.md").read_text()
    for name in ("cc3m", "cc12m", "yfcc15m-v1", "yfcc15m-v2"):
        assert f"| {name} | **stored** |" in card
    assert "Creative Commons" in card
