"""Long drills of the acquisition side, run by `make test-slow`; each prints the figure it measured."""

import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import encoded, picture
from test_download import HERE, samples, url_table
from webserver import serving

from pipeline.download import Options, download
from pipeline.images import upright_rgb

ROWS = 2_000_000
URLS, KILLS = 5_000, 20


def _hostile_table(path, rows: int) -> dict[str, int]:
    """`rows` lines of a tsv of which some cannot be read; returns how many of each kind there are."""
    chance, kinds = random.Random(0), {"good": 0, "tab": 0, "bytes": 0, "blank": 0, "twin": 0}
    with path.open("wb") as file:
        file.write(b"url\tcaption\n")
        for row in range(rows):
            kind = chance.choices(list(kinds), (90, 2, 2, 1, 5))[0]
            kinds[kind] += 1
            quote = '"' * chance.randrange(3)
            url = f"http://host{row % 997}.example/{row}.jpg" if kind != "twin" else "http://host/the-same.jpg"
            caption = f"{quote}a photograph of thing {row}, seen by 'someone' \u2028 and \"others"
            line = {"tab": f"{url}\t{caption}\tmore\n", "blank": "\n"}.get(kind, f"{url}\t{caption}\n").encode()
            file.write(line.replace(b"photograph", b"\xff\xfe") if kind == "bytes" else line)
    return kinds


@pytest.mark.slow
def test_two_million_hostile_rows_are_all_accounted_for(tmp_path, capsys):
    kinds = _hostile_table(tmp_path / "a.tsv", ROWS)
    # VmHWM and not ru_maxrss, which exec inherits from this big process
    code = ("import re, sys; from pathlib import Path; from pipeline.sources import *\n"
            "tally = write_urls(Path(sys.argv[1]), Path(sys.argv[2]), Choice('url', ('caption',)))\n"
            "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]\n"
            "print(tally.rows, tally.urls, tally.merged, tally.refused, peak)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.tsv", tmp_path / "u.parquet"], capture_output=True,
                          text=True, check=True)
    rows, urls, merged, refused, kib = map(int, done.stdout.split())
    assert rows == ROWS == urls + merged + refused
    assert refused == kinds["tab"] + kinds["bytes"] + kinds["blank"]
    assert urls == pq.read_metadata(tmp_path / "u.parquet").num_rows == kinds["good"] + 1
    assert sum(1 for _ in (tmp_path / "u.refused.jsonl").open()) == refused
    with capsys.disabled():
        print(f"\n2,000,000 hostile rows: {urls:,} URLs, {merged:,} merged, {refused:,} refused, peak {kib / 1024:.0f} MiB")
    assert kib < 1024 * 1024


def _pixels(folder: Path) -> dict[int, str]:
    """Sample id → sha256 of the pixels."""
    return {json.loads(sample["json"])["sample_id"]: hashlib.sha256(upright_rgb(sample["jpg"]).tobytes()).hexdigest()
            for sample in samples(folder).values()}


def _serve_pictures(site, count: int, pause: float = 0.0) -> list[str]:
    bodies = [encoded(picture(number), quality=90) for number in range(40)]

    def answer(body: bytes):
        def talk(handler):
            time.sleep(pause)
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return talk

    site.pages |= {f"/{number}.jpg": answer(bodies[number % 40]) for number in range(count) if number % 50}
    return [site.url(f"/{number}.jpg") for number in range(count)]


def _run_until_killed(words: list, site, moment: float, from_start: bool) -> bool:
    """Kill -9 the download and all its workers `moment` seconds after it began or first asked; False if it ended first."""
    before = site.connections
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not from_start and site.connections == before and process.poll() is None:
        time.sleep(0.02)
    try:
        process.wait(moment)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def _kill_drill(folder: Path, count: int, kills: int, pause: float, seed: int = 0) -> tuple[int, int]:
    """(kills, requests): a download killed again and again ends with the set of one that was left alone."""
    chance, killed = random.Random(seed), 0
    with serving() as site:
        table = url_table(folder / "u.parquet", _serve_pictures(site, count, pause))
        words = [Path(sys.executable).parent / "uniclip-data", "download", table, folder / "killed", "--shard-size", "50",
                 "--threads", "8", "--processes", "2", "--allow-address", "127.0.0.1"]
        for turn in range(kills):
            killed += _run_until_killed(words, site, chance.uniform(0.0, 5.0), from_start=turn % 4 == 3)
        subprocess.run(words, check=True, capture_output=True, timeout=580)
        asked = site.hits.total()
        _serve_pictures(site, count)
        download(table, folder / "plain", Options(distributor="inline", shard_size=50, allow_address=HERE))
    ours, theirs = _pixels(folder / "killed"), _pixels(folder / "plain")  # samples() refuses a URL that is stored twice
    assert ours == theirs
    assert len(ours) == count - -(-count // 50)
    report = json.loads((folder / "killed" / "download.json").read_text())
    assert report["rows"] == count == report["stored"] + report["failed"]["http 404"]
    return killed, asked


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments(tmp_path, capsys):
    killed, asked = _kill_drill(tmp_path, URLS, KILLS, pause=0.2)
    with capsys.disabled():
        print(f"\n{killed} kills of {URLS:,} URLs: equal sets, {asked:,} requests")
    assert killed >= KILLS // 2


def test_kill_9_at_a_few_random_moments(tmp_path):
    _kill_drill(tmp_path, 200, 2, pause=0.05)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'uniclip[ray]'")
def test_five_thousand_urls_are_the_same_however_they_are_distributed(tmp_path, capsys):
    found, seconds = {}, {}
    names = ["processes", "ray"] + (["spark"] if importlib.util.find_spec("pyspark") and shutil.which("java") else [])
    with serving() as site:
        table = url_table(tmp_path / "u.parquet", _serve_pictures(site, URLS))
        for name in names:
            began = time.monotonic()
            download(table, tmp_path / name, Options(distributor=name, shard_size=250, processes=2, allow_address=HERE))
            seconds[name] = round(time.monotonic() - began, 1)
            found[name] = _pixels(tmp_path / name)
    with capsys.disabled():
        print(f"\n{URLS:,} URLs in seconds: {seconds}")
    assert all(one == found["processes"] for one in found.values())
    assert len(found["processes"]) == URLS - URLS // 50
