"""Retry and merge: what may heal is fetched again, and nothing counts twice."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import command, encoded, picture
from shards import write_set
from test_download import HERE, samples, url_table
from webserver import Site, serving

from pipeline.console import InputError
from pipeline.download import Options, download
from pipeline.index import Index
from pipeline.indexing import build
from pipeline.merging import Input, merge, parse_input
from pipeline.retry import retry, rounds, survival, together
from pipeline.schema import sample_id_of
from pipeline.stats import statistics

PICTURES = [encoded(picture(seed), quality=90) for seed in range(12)]
SPEED = {"distributor": "inline", "threads": 4, "timeout": 2, "retries": 0}
FAILING = {"/503": 503, "/429": 429, "/404": 404, "/410": 410}


def _fill(site: Site) -> list[str]:
    site.pages.update({f"/{number}.jpg": data for number, data in enumerate(PICTURES)})
    site.pages.update({path: (status, {}, b"") for path, status in FAILING.items()})
    site.pages["/optout"] = 200, {"X-Robots-Tag": "noai"}, PICTURES[0]
    site.pages["/hang"] = lambda handler: None
    site.pages["/slow"] = lambda handler: handler.connection.recv(1)
    return [site.url(path) for path in (*site.pages, )]


@pytest.fixture
def downloaded(tmp_path):
    """(site, folder of a finished download with every kind of failure, its URLs)."""
    with serving() as site:
        urls = _fill(site)
        del site.pages["/slow"]
        urls.remove(site.url("/slow"))
        table = url_table(tmp_path / "urls.parquet", urls)
        download(table, tmp_path / "out", Options(shard_size=5, allow_address=HERE, **SPEED))
        yield site, tmp_path / "out", urls


def heal(site: Site) -> None:
    for number, path in enumerate([*FAILING, "/optout", "/hang"]):
        site.pages[path] = PICTURES[number]


def test_only_what_may_heal_is_fetched_again_with_its_id(downloaded):
    site, folder, urls = downloaded
    heal(site)
    site.hits.clear()
    where, report = retry(folder, SPEED)
    assert where == folder / "retry1"
    assert (report.rows, report.stored, report.failed) == (3, 3, {})
    assert dict(site.hits) == {"/503": 1, "/429": 1, "/hang": 1}
    stored = samples(folder / "retry1")
    assert {url: json.loads(sample["json"])["sample_id"] for url, sample in stored.items()} == {
        site.url(path): sample_id_of(site.url(path)) for path in ("/503", "/429", "/hang")}
    kept = {row["url"]: row for row in pq.read_table(folder / "retry1" / "urls.parquet").to_pylist()}
    assert kept[site.url("/503")]["source_row"] == urls.index(site.url("/503")) + 1
    total = survival(folder)["test"]
    assert (total.rows, total.stored) == (len(urls), 12 + 3)
    assert total.failed == {"http 404": 1, "http 410": 1, "opted out": 1}
    manifest = build(folder, 1)
    assert manifest["counts"] == {"samples": 15, "merged": 0, "excluded": {}}
    assert [shard["name"] for shard in manifest["shards"]][-1] == "retry1/00000.tar"
    assert retry(folder, SPEED) is None
    assert statistics(Index.open(folder))["survival"]["test"]["stored"] == 15
    assert together([folder, folder])["test"]["failed"] == {"http 404": 2, "http 410": 2, "opted out": 2}


def test_rounds_follow_each_other_and_an_empty_one_is_no_error(downloaded):
    site, folder, _ = downloaded
    assert retry(folder, SPEED)[1].stored == 0
    assert [place.name for place in rounds(folder)] == ["out", "retry1"]
    site.pages["/503"] = PICTURES[1]
    assert retry(folder, SPEED)[1].stored == 1
    assert survival(folder)["test"].failed == {"http 404": 1, "http 410": 1, "http 429": 1, "connection broken": 1,
                                               "opted out": 1}
    assert [place.name for place in rounds(folder)] == ["out", "retry1", "retry2"]


def test_an_interrupted_round_is_finished_first(downloaded):
    site, folder, _ = downloaded
    heal(site)
    retry(folder, SPEED)
    for name in ("download.json", "00000_stats.json"):
        (folder / "retry1" / name).unlink()
    where, report = retry(folder, SPEED)
    assert (where.name, report.stored) == ("retry1", 3)


def test_retry_needs_a_finished_download(tmp_path):
    with pytest.raises(InputError, match="holds no finished download"):
        retry(tmp_path, SPEED)


def test_merge_unites_ids_and_keeps_weights_and_bytes(tmp_path):
    def told(url: str, source: str, caption: str) -> dict:
        return {"url": url, "source": source, "captions": [caption]}

    write_set(tmp_path / "a", [(PICTURES[0], told("http://h/0", "one", "a0")),
                               (PICTURES[1], told("http://h/1", "one", "a1"))])
    write_set(tmp_path / "deep" / "b", [(PICTURES[2], told("http://h/1", "two", "b1")),
                                        (PICTURES[3], told("http://h/3", "two", "b3"))])
    manifest = merge(tmp_path / "all" / "merged", [Input(tmp_path / "a", 2.5), Input(tmp_path / "deep" / "b")])
    assert manifest["counts"] == {"samples": 3, "merged": 1, "excluded": {}}
    assert manifest["weights"] == {"one": 2.5, "two": 1.0}
    index = Index.open(tmp_path / "all" / "merged")
    assert index.shards == ["../../a/00000.tar", "../../deep/b/00000.tar"]
    found = []
    for row in range(len(index)):
        at = {name: values[0] for name, values in index.columns(np.array([row])).items()}
        data = (index.folder / index.shards[at["shard"]]).read_bytes()[at["offset"]:at["offset"] + at["size"]]
        found.append((index.captions(row), index.source(row), data))
    assert found == [(["a0"], "one", PICTURES[0]), (["a1", "b1"], "one", PICTURES[1]), (["b3"], "two", PICTURES[3])]
    again = merge(tmp_path / "twice", [Input(tmp_path / "all" / "merged", 2.0), Input(tmp_path / "a", 5.0)])
    assert again["counts"] == {"samples": 3, "merged": 2, "excluded": {}}
    assert again["weights"] == {"one": 5.0, "two": 2.0}
    assert Index.open(tmp_path / "twice").shards[:1] == ["../a/00000.tar"]


def test_what_cannot_be_merged_is_refused(tmp_path):
    write_set(tmp_path / "a", [(PICTURES[0], {"caption": "x", "source": "s"})])
    write_set(tmp_path / "b", [(PICTURES[1], {"caption": "x", "source": "s"})])
    unfit = [([f"a={weight}"], f"weight {weight} is no number from 0 on") for weight in ("-1", "nan", "inf")]
    for words, says in ((["a=2", "b"], "source 's' would weigh both 2.0 and 1.0"), (["a=x"], "'x' is no weight"),
                        (["nowhere"], "does not exist"), *unfit):
        with contextlib.chdir(tmp_path), pytest.raises(InputError, match=says):
            merge(Path("out"), list(map(parse_input, words)))
    done = command("uniclip-data", "merge", "out", "a", "b", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "           2  samples in out/index.arrow\n"), done.stderr
    merge(tmp_path / "more", [Input(tmp_path / "out")])
    for inputs in ([Input(tmp_path / "out"), Input(tmp_path / "a")], [Input(tmp_path / "more")]):
        with pytest.raises(InputError, match="needs .*out, which merging would replace"):
            merge(tmp_path / "out", inputs)
    assert parse_input("a/b=0.5") == Input(parse_input("a/b").folder, 0.5)


def test_an_index_reads_only_what_is_new(tmp_path):
    folder = tmp_path / "a"
    told = [(data, {"caption": f"c{number}"}) for number, data in enumerate(PICTURES)]
    write_set(folder, told[:6], per_tar=2)
    before = {path: path.stat().st_mtime_ns for path in (folder / ".scans").glob("*.arrow")}
    write_set(folder, told[8:10], per_tar=2, index=False)  # another 00000.tar
    write_set(tmp_path / "b", [(data, {"caption": "again"}) for data in PICTURES[2:4]], index=False)
    (tmp_path / "b" / "00000.tar").rename(folder / "9.tar")
    (folder / "00002.tar").unlink()
    incremental = build(folder, 1)
    after = {path: path.stat().st_mtime_ns for path in (folder / ".scans").glob("*.arrow")}
    assert len(before) == len(after) == 3
    assert len([path for path in before if after.get(path) == before[path]]) == 1  # only 00001.tar was as before
    for path in after:
        path.unlink()
    assert build(folder, 1) == incremental
    index = Index.open(folder)
    assert [index.captions(row) for row in range(len(index))] == [["c8"], ["c9"], ["c2", "again"], ["c3", "again"]]
