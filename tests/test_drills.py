"""Long drills of the acquisition side, run by `make test-slow`; each prints the figure it measured."""

import random
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

ROWS = 2_000_000


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
    code = ("import resource, sys; from pathlib import Path; from pipeline.sources import *\n"
            "tally = write_urls(Path(sys.argv[1]), Path(sys.argv[2]), Choice('url', ('caption',)))\n"
            "print(tally.rows, tally.urls, tally.merged, tally.refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
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
