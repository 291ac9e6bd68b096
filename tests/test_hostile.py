"""Two thousand URLs against a server that answers in every way we know of: each accounted for, by the right class."""

import json
import subprocess
import sys
from collections import Counter

import pyarrow.parquet as pq
import pytest
from hostile import NEVER_ASKED, SLOW, STORED, answers
from test_download import samples, url_table
from webserver import serving

URLS = 2_000
PEAK = 620  # MiB a worker may take: 190 for what img2dataset imports, the rest for bodies


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """(folder, expected outcome of each URL, site, private site, peak MiB of a worker)."""
    folder = tmp_path_factory.mktemp("hostile")
    with serving() as site, serving("127.0.0.2") as private:
        kinds = answers(site, private)
        expected = dict(NEVER_ASKED)
        expected |= {f"{private.url('/secret')}?{number}": "refused address" for number in range(20)}
        for kind, (_, outcome) in kinds.items():
            expected |= {site.url(f"/{kind}/{number}"): outcome for number in range(8 if kind in SLOW else 20)}
        expected |= {site.url(f"/jpeg/{number}"): STORED for number in range(20, 20 + URLS - len(expected))}
        for url in expected:
            path = url.removeprefix(site.url(""))
            if path.startswith("/"):
                site.pages[path] = kinds[path.split("/")[1]][0]
        site.pages["/secret"] = private.pages["/secret"] = b"secret"
        table = url_table(folder / "urls.parquet", [url.replace(" ", "%20") for url in expected])
        code = ("import resource, subprocess, sys\n"
                "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
                "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
        words = [sys.executable, "-m", "pipeline.cli", "download", table, folder / "out", "--shard-size", "500", "--threads",
                 "32", "--timeout", "1.5", "--processes", "2", "--allow-address", "127.0.0.1"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=400)
        code, kib = map(int, done.stdout.split())
        assert code == 0, done.stderr
        expected = {url.replace(" ", "%20"): outcome for url, outcome in expected.items()}
        yield folder / "out", expected, site, private, kib / 1024


def test_every_url_has_its_outcome(hostile, capsys):
    folder, expected, _, _, _ = hostile
    found = {}
    for path in folder.glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            found[row["url"]] = STORED if row["status"] == "success" else row["error_message"].partition(":")[0]
    assert len(expected) == URLS
    assert found == expected
    report = json.loads((folder / "download.json").read_text())
    assert report["rows"] == URLS == report["stored"] + sum(report["failed"].values())
    assert {STORED: report["stored"], **report["failed"]} == Counter(expected.values())
    with capsys.disabled():
        print(f"\n{URLS} hostile URLs, {len(answers(hostile[2], hostile[3])) + len(NEVER_ASKED)} kinds: "
              f"{len(report['failed'])} classes of failure, {report['stored']} stored")


def test_what_is_stored_is_what_should_be(hostile):
    folder, expected, _, _, _ = hostile
    assert set(samples(folder)) == {url for url, outcome in expected.items() if outcome == STORED}


def test_no_private_address_is_connected_to(hostile):
    assert hostile[3].connections == 0


def test_opted_out_images_are_asked_for_once(hostile):
    hits = {path: count for path, count in hostile[2].hits.items() if path.startswith("/opt out")}
    assert len(hits) == 200
    assert set(hits.values()) == {1}


def test_a_worker_needs_bounded_memory(hostile, capsys):
    with capsys.disabled():
        print(f"\npeak of a worker: {hostile[4]:.0f} MiB")
    assert hostile[4] < PEAK
