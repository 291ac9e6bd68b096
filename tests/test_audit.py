"""Looking at a set and taking samples out of it: each number against one known beforehand."""

import html
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import command, encoded
from shards import drawing, write_set

from pipeline.card import write_card
from pipeline.console import InputError, WorkFailed
from pipeline.doctor import Finding, _lookup, examine
from pipeline.duplicates import duplicates, overlap
from pipeline.evalsets import open_evalset, write_evalset
from pipeline.hashes import bits_apart, near_pairs
from pipeline.index import Index
from pipeline.peek import peek
from pipeline.schema import SKIPS, sample_id_of
from pipeline.selection import condition, select
from pipeline.skips import read_skips
from pipeline.stats import lines, statistics

CHROMIUM = Path("/usr/bin/chromium")
EVIL = '<script>alert("caption")</script> & | * _ <img src=x onerror=alert(1)> يا'
ALONE = 30


def _copies() -> list[bytes]:
    """One picture five times: as it is twice, with the same pixels in another file, re-encoded, and half the size."""
    image = drawing(1000)
    jpeg = encoded(image, quality=90)
    commented = encoded(image, quality=90, comment=b"the same pixels")
    return [jpeg, jpeg, commented, encoded(image, quality=60), encoded(image.resize((60, 60)), quality=90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    samples = [(encoded(drawing(seed, 40 + 4 * seed), quality=90), {"captions": [f"picture {'word ' * (seed % 5)}{seed}"],
                "url": f"http://h/{seed}", "source": "even" if seed % 2 == 0 else "odd"}) for seed in range(ALONE)]
    samples += [(data, {"captions": [EVIL, "a second caption"], "url": f"http://h/{100 + number}", "source": "copies"})
                for number, data in enumerate(_copies())]
    flat = [encoded(drawing(seed).resize((1, 1)).resize((90, 90))) for seed in (0, 1)]  # nothing in them to see
    samples += [(data, {"captions": ["плоско"], "url": f"http://h/{200 + number}"}) for number, data in enumerate(flat)]
    return write_set(tmp_path_factory.mktemp("audit") / "set <1>", samples, per_tar=16)


def test_duplicates_fill_the_groups_and_nothing_else(folder):
    before = Index.open(folder)
    ids = before.columns(np.arange(len(before)))["sample_id"]
    found = duplicates(before, workers=1)
    after = Index.open(folder)
    columns = after.columns(np.arange(len(after)))
    assert (found.bytes, found.pixels, found.groups, found.rows, found.largest) == (2, 3, 1, 5, 5)
    groups = dict(zip(columns["sample_id"].tolist(), columns["group"].tolist(), strict=True))
    copies = {sample_id_of(f"http://h/{number}") for number in range(100, 105)}
    shared = {groups[one] for one in copies}
    assert len(shared) == 1
    assert shared <= copies
    assert all(groups[one] == -1 for one in set(ids.tolist()) - copies)
    assert after.fingerprint == before.fingerprint
    for name, values in before.columns(np.arange(len(before))).items():
        assert name == "group" or (columns[name] == values).all()
    assert [after.captions(row) for row in range(len(after))] == [before.captions(row) for row in range(len(after))]
    assert after.manifest["duplicates"]["rows"] == 5
    assert duplicates(after, distance=0).groups == 1


def test_near_pairs_are_those_of_a_plain_search():
    random_words = np.random.default_rng(0).integers(0, 2**63, 60, dtype=np.uint64)
    chance = random.Random(0)
    words = [int(word) for word in random_words]
    for word in list(words):
        for bits in range(7):
            words.append(word ^ sum(1 << bit for bit in chance.sample(range(64), bits)))
    looks = np.unique(np.array(words, np.uint64))
    for distance in (1, 3, 4, 6):
        plain = {(i, j) for i in range(len(looks)) for j in range(i)
                 if int(looks[i] ^ looks[j]).bit_count() <= distance}
        ours = {(max(i, j), min(i, j)) for one, two in near_pairs(looks, distance)
                for i, j in zip(one.tolist(), two.tolist(), strict=True)}
        assert ours == plain
        across = {(i, j) for i in range(40) for j in range(len(looks)) if int(looks[i] ^ looks[j]).bit_count() <= distance}
        found = (np.stack(pair, axis=1).tolist() for pair in near_pairs(looks[:40], distance, looks))
        assert {tuple(pair) for pairs in found for pair in pairs} == across
    assert bits_apart(looks[:1], looks[1:2]).tolist() == [int(looks[0] ^ looks[1]).bit_count()]


def test_overlap_with_an_evaluation_set_becomes_a_skip_list(folder, tmp_path):
    examples = [(encoded(drawing(7, 68).resize((300, 300)), "PNG"), ["near"]),
                (encoded(drawing(9, 76), quality=90), ["exact"]), (encoded(drawing(5000)), ["unseen"])]
    write_evalset(tmp_path / "eval", "test", examples, "retrieval")
    counts = overlap(Index.open(folder), [open_evalset(tmp_path / "eval")], tmp_path / "skip.parquet", workers=1)
    assert counts == {"eval/test": {"bytes": 1, "pixels": 1, "look": 2}}
    assert read_skips(tmp_path / "skip.parquet") == {
        sample_id_of("http://h/7"): "overlap with eval/test, key s0000000, by look",
        sample_id_of("http://h/9"): "overlap with eval/test, key s0000001, by bytes"}
    assert pq.read_schema(tmp_path / "skip.parquet").equals(SKIPS)


def test_filter_lists_what_does_not_meet_the_conditions(folder, tmp_path):
    index = Index.open(folder)
    conditions = list(map(condition, ("side >= 80", "source!=odd", "words>=3")))
    counts = select(index, tmp_path / "skip.parquet", conditions)
    columns = index.columns(np.arange(len(index)))
    expected = {}
    for row in range(len(index)):
        if columns["width"][row] < 80:
            reason = "not side >= 80"
        elif index.source(row) == "odd":
            reason = "not source!=odd"
        elif max(len(caption.split()) for caption in index.captions(row)) < 3:
            reason = "not words>=3"
        else:
            continue
        expected[int(columns["sample_id"][row])] = reason
    assert read_skips(tmp_path / "skip.parquet") == expected
    assert sum(counts.values()) == len(expected)
    assert pq.read_table(tmp_path / "skip.parquet")["sample_id"].type == pa.int64()


@pytest.mark.parametrize(("text", "says"), [("side", "must read COLUMN OPERATOR VALUE"), ("sied>3", "no column 'sied'"),
                                            ("side>x", "'x' is no number"), ("source>x", "compare it with = or !=")])
def test_wrong_conditions_are_named(folder, tmp_path, text, says):
    with pytest.raises(InputError, match=says):
        select(Index.open(folder), tmp_path / "skip.parquet", [condition(text)])


def test_a_filter_that_leaves_nothing_is_work_failed(folder, tmp_path):
    with pytest.raises(WorkFailed, match="no sample of 37 meets side>=9999"):
        select(Index.open(folder), tmp_path / "skip.parquet", [condition("side>=9999")])


def test_statistics_are_those_of_the_samples(folder):
    told = statistics(Index.open(folder))
    assert (told["samples"], told["shards"], told["survival"]) == (37, 3, {})
    assert told["sources"] == {"even": 15, "odd": 15, "copies": 5, "": 2}
    assert told["spread"]["side"]["p0"] == 40
    assert told["spread"]["side"]["p100"] == 156
    assert told["spread"]["captions"] == {"mean": 1.14, "p0": 1, "p5": 1, "p25": 1, "p50": 1, "p75": 1, "p95": 2, "p100": 2}
    assert told["scripts"] == {"latin": 35, "cyrillic": 2}
    assert lines(told)[0].split()[:2] == ["37", "samples"]


class Page(HTMLParser):
    """Tags, and text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_contact_sheet_escapes_captions_and_loads_nothing(folder, tmp_path):
    assert peek(Index.open(folder), tmp_path / "peek.html", 50) == 37
    page = Page(tmp_path / "peek.html")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 37
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in images)
    assert not [tag for tag, _ in page.tags if tag in {"script", "link", "iframe"}]
    assert EVIL in page.text
    assert peek(Index.open(folder), tmp_path / "odd.html", 5, 3, [condition("source=odd")]) == 5
    assert "source=odd" in (tmp_path / "odd.html").read_text()


def test_the_card_tells_counts_and_licences_and_escapes(folder, tmp_path):
    told = write_card(Index.open(folder), tmp_path / "card.md", "A <set> | of *mine*")
    text = (tmp_path / "card.md").read_text()
    assert text.startswith("# A \\<set\\> \\| of \\*mine\\*\n")
    assert f"{told['samples']} image-text samples in 3 WebDataset shards" in text
    assert "| even | 15 | 1 | Not recorded" in text
    assert "## What became of the URLs" in text
    assert (tmp_path / "card.png").stat().st_size > 1000
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(re.fullmatch(r"\|.*\|\s*", row) for row in rows)


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium: make system")
def test_the_contact_sheet_is_quiet_in_a_browser(folder, tmp_path):
    peek(Index.open(folder), tmp_path / "peek.html", 12)
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
                           (tmp_path / "peek.html").as_uri()], capture_output=True, text=True, timeout=90)
    assert done.stdout.count("<figure>") == 12
    assert "CONSOLE" not in done.stderr
    assert html.escape("<script>", quote=False) in done.stdout or "alert(" not in done.stdout


def test_the_doctor_names_a_cure_for_each_red_line(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.doctor.disk_rate", lambda folder: 3.0)
    monkeypatch.setattr("pipeline.doctor.resize_rate", lambda: 10.0)
    monkeypatch.setattr("pipeline.doctor.resource.getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr("pipeline.doctor._torch", lambda: Finding("torch", "not asked here"))
    found = {finding.what: finding for finding in examine(tmp_path, urls=10**12)}
    bad = {what for what, finding in found.items() if finding.good is False}
    assert {"Pillow", "open files", "disk speed", "disk space"} <= bad
    assert all(found[what].cure for what in bad)
    assert found["open files"].cure == "ulimit -n 4096"
    assert "back-port" in found["dataclasses"].found and "PYTHONPATH" in found["dataclasses"].cure


def test_a_back_port_that_hides_a_module_of_pythons_is_named(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/dataclasses.py").write_text("raise AttributeError('module typing has no attribute _ClassVar')")
    done = subprocess.run([sys.executable, "-m", "pipeline.cli", "--help"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}/site-packages"})
    assert done.returncode and "dataclasses.py hides Python's own dataclasses: unset PYTHONPATH" in done.stderr


def test_the_doctor_looks_a_name_up_only_when_asked(tmp_path, monkeypatch):
    asked, silent = [], threading.Event()

    def resolver(host: str, port: int) -> list:
        asked.append(host)
        if host == "silent.test":
            silent.wait(30)
        if host == "none.test":
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr("pipeline.doctor.socket.getaddrinfo", resolver)
    monkeypatch.setattr("pipeline.doctor._PATIENCE", 0.1)
    said = {host: _lookup(host) for host in ("", "here.test", "none.test", "silent.test")}
    silent.set()
    assert asked == ["here.test", "none.test", "silent.test"]
    assert [finding.good for finding in said.values()] == [None, True, False, False]
    assert "not known" in said["none.test"].found and "no answer in" in said["silent.test"].found


def test_the_commands(folder, tmp_path):
    for words, code, says in (
            (("filter", folder, tmp_path / "s.parquet"), 2, "--keep"), (("stats", tmp_path), 2, "does not exist"),
            (("filter", folder, tmp_path / "s.parquet", "--keep", "side>=100"), 0, "of 37 samples stay")):
        done = command("uniclip-data", *words)
        assert done.returncode == code, done.stderr
        assert says in done.stdout + done.stderr
    assert json.loads(command("uniclip-data", "stats", folder, "--json").stdout)["shards"] == 3
    shutil.copytree(folder, tmp_path / "torn")
    (tmp_path / "torn" / "00001.tar").unlink()
    for name in ("card.md", "peek.html"):
        done = command("uniclip-data", name.partition(".")[0], tmp_path / "torn", tmp_path / name)
        assert (done.returncode, done.stderr) == (2, f"error: the index's shard {tmp_path}/torn/00001.tar does not exist: "
                                                     "bring it back, or index again\n")
