"""Takedown: what is named never comes back, its bytes leave the tars, and no index of those tars reads a wrong image."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, command, encoded, picture
from shards import drawing, write_set
from test_download import HERE, url_table
from webserver import serving

from evaluation.datasets import from_index
from pipeline import indexing, merging
from pipeline.card import write_card
from pipeline.console import InputError, WorkFailed
from pipeline.download import Options, download
from pipeline.duplicates import duplicates
from pipeline.files import alone
from pipeline.index import Index
from pipeline.indexing import build
from pipeline.merging import Input, merge, places, rows_between
from pipeline.peek import image_bytes, peek
from pipeline.picture import draw_replay
from pipeline.retry import retry
from pipeline.samples import BLANK, groups
from pipeline.schema import FORGOTTEN, IDENTITY, SKIPS, sample_id_of
from pipeline.selection import condition, select
from pipeline.skips import Forgotten, present, read_skips
from pipeline.stats import statistics
from pipeline.stream import Stream
from pipeline.survival import Report
from pipeline.takedown import forget, parse, words_of
from pipeline.tars import blank, scan

PICTURES = [encoded(picture(seed), quality=90) for seed in range(8)]
SPEED = {"distributor": "inline", "threads": 4, "timeout": 2, "retries": 0}
OPTIONS = Options(shard_size=5, allow_address=HERE, **SPEED)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def ids_of(folder: Path) -> set[int]:
    index = Index.open(folder)
    return set(index.columns(present(index))["sample_id"].tolist())


def groups_of(folder: Path) -> dict[int, int]:
    index = Index.open(folder)
    columns = index.columns(present(index))
    return dict(zip(columns["sample_id"].tolist(), columns["group"].tolist(), strict=True))


def images_of(folder: Path) -> dict[int, bytes]:
    index = Index.open(folder)
    ids = index.columns(np.arange(len(index)))["sample_id"]
    return {int(ids[row]): image_bytes(index, row) for row in present(index)}


def healed(folder: Path) -> Report:
    done = retry(folder, SPEED)
    assert done is not None
    return done[1]


def told(path: str, caption: str = "c", **more) -> dict:
    return {"url": f"http://h/{path}", "caption": caption, "source": "s", **more}


def id_of(path: str) -> int:
    return sample_id_of(f"http://h/{path}")


@pytest.fixture
def downloaded(tmp_path):
    """(site, folder of a finished download whose last URL failed with 503)."""
    with serving() as site:
        site.pages.update({f"/{number}.jpg": data for number, data in enumerate(PICTURES)})
        site.pages["/503"] = 503, {}, b""
        download(url_table(tmp_path / "urls.parquet", [site.url(path) for path in site.pages]), tmp_path / "out", OPTIONS)
        yield site, tmp_path / "out"


@pytest.fixture
def two(tmp_path):
    """Folders a and b of tars, and m, where they are merged. http://h/0 in a and http://h/twin in b are equal bytes."""
    write_set(tmp_path / "a", [(PICTURES[n], told(str(n))) for n in range(4)], per_tar=2)
    write_set(tmp_path / "b", [(PICTURES[0], told("twin")), (PICTURES[4], told("4"))])
    merge(tmp_path / "m", [Input(tmp_path / "a"), Input(tmp_path / "b")], "the merge")
    return tmp_path


def test_what_is_forgotten_is_never_fetched_indexed_or_merged(downloaded):
    site, folder = downloaded
    build(folder, 1)
    original = sha256(PICTURES[3])
    done = forget(folder, parse([site.url("/503"), site.url("/1.jpg"), str(sample_id_of(site.url("/2.jpg"))), original]))
    gone = {sample_id_of(site.url(path)) for path in ("/503", "/1.jpg", "/2.jpg", "/3.jpg")}
    assert (done.named, done.indexed, done.removed, done.unknown) == (4, 3, 0, 0)
    listed = pq.read_table(folder / "forgotten.parquet")
    assert listed.schema.equals(FORGOTTEN, check_metadata=True)
    named = listed.filter(listed["sha256"].is_null()).to_pylist()
    assert {row["sample_id"] for row in named} == gone
    assert {row["reason"] for row in named} == {"takedown"}
    assert original in listed["sha256"].to_pylist()
    told = statistics(Index.open(folder))
    assert (told["samples"], told["excluded"]) == (5, {"forgotten": 3})
    assert build(folder, 1)["counts"] == {"samples": 5, "merged": 0, "excluded": {"forgotten": 3}}
    site.hits.clear()
    retry(folder, SPEED)
    assert not site.hits
    for name in ("00000_stats.json", "download.json"):  # as if the first shard had to be downloaded again
        (folder / name).unlink()
    report = download(folder.parent / "urls.parquet", folder, OPTIONS)
    assert report.failed["forgotten"] == 3
    assert not {"/1.jpg", "/2.jpg", "/3.jpg"} & set(site.hits)
    build(folder, 1)
    write_set(folder.parent / "other", [(PICTURES[6], {"url": site.url("/3.jpg"), "caption": "other bytes"}),
                                        (PICTURES[4], {"url": site.url("/4.jpg"), "caption": "elsewhere"})])
    both = merge(folder.parent / "both", [Input(folder), Input(folder.parent / "other")])
    assert not ids_of(folder.parent / "both") & gone
    assert both["counts"]["excluded"] == {"forgotten": 1}


def test_equal_bytes_under_another_url_stay_out(downloaded):
    site, folder = downloaded
    build(folder, 1)
    large = encoded(picture(99, 500, 400), quality=90)
    site.pages["/large.jpg"], site.pages["/copy"], site.pages["/7.jpg"] = large, large, (503, {}, b"")
    urls = url_table(folder.parent / "more.parquet", [site.url(path) for path in ("/large.jpg", "/7.jpg", "/0.jpg")])
    other = folder.parent / "other"
    download(urls, other, OPTIONS)
    build(other, 1)
    stored = images_of(other)[sample_id_of(site.url("/large.jpg"))]
    assert stored != large  # resized
    done = forget(other, parse([sha256(large), sha256(PICTURES[3])]))
    assert (done.named, done.indexed, done.unknown) == (2, 1, 1)
    assert Forgotten.read(other / "forgotten.parquet").hashes.keys() == {sha256(large), sha256(stored), sha256(PICTURES[3])}
    site.pages["/7.jpg"] = large
    assert healed(other).failed == {"forgotten": 1}
    shutil.rmtree(other / "retry1")
    Forgotten({}, {sha256(stored): ""}).write(other / "forgotten.parquet")  # whoever only knows the stored bytes
    assert healed(other).failed == {"forgotten": 1}
    write_set(other, [(stored, told("mirror")), (PICTURES[5], told("by original", sha256=sha256(stored))),
                      (PICTURES[6], told("6"))], index=False)
    (other / "00000.tar").rename(other / "mirror.tar")
    assert build(other, 1)["counts"]["excluded"] == {"forgotten": 2}
    assert ids_of(other) == {id_of("6")}
    write_set(folder.parent / "late", [(stored, told("late")), (PICTURES[7], told("7"))])
    merge(folder.parent / "both", [Input(folder.parent / "late"), Input(other)])
    assert ids_of(folder.parent / "both") == {id_of("6"), id_of("7")}


def test_a_rewrite_blanks_the_bytes_and_moves_nothing(downloaded):
    site, folder = downloaded
    build(folder, 1)
    before, gone = images_of(folder), sample_id_of(site.url("/5.jpg"))
    shutil.copytree(folder / ".scans", folder.parent / "parent" / ".scans")
    (folder.parent / "parent" / "out").symlink_to(folder)
    for name in ("index.arrow", "manifest.json"):
        shutil.copy(folder / name, folder.parent / f"old-{name}")
    assert forget(folder, parse([site.url("/5.jpg")]), rewrite=True).removed == 1
    for path in folder.glob("*.tar"):
        assert PICTURES[5] not in path.read_bytes()
        assert b"/5.jpg" not in path.read_bytes()
    with tarfile.open(folder / "00001.tar") as tar:
        assert [member.name for member in tar].count(BLANK) == 3
    report = download(folder.parent / "urls.parquet", folder, OPTIONS)
    assert (report.rows, report.stored, report.failed["forgotten"]) == (9, 7, 1)
    assert images_of(folder) == {one: data for one, data in before.items() if one != gone}
    assert build(folder, 1)["counts"] == {"samples": 7, "merged": 0, "excluded": {}}
    for name in ("index.arrow", "manifest.json"):  # an index that nobody told reads zeros, and its neighbours as before
        shutil.copy(folder.parent / f"old-{name}", folder / name)
    (folder / "forgotten.parquet").unlink()
    stale = images_of(folder)
    assert not stale.pop(gone).strip(b"\0")
    assert stale == {one: data for one, data in before.items() if one != gone}


def test_a_blanked_tar_is_whole_for_every_reader(tmp_path):
    from webdataset import WebDataset

    path = tmp_path / "x.tar"
    members = [("a.jpg", b"1" * 700), ("b.jpg", b"2"), ("b.txt", b"3" * 512), ("deep/" + "n" * 200 + ".jpg", b"4" * 30),
               ("c.jpg", b"5"), (BLANK, b"")]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), {"comment": f"secret {name}"}
            tar.addfile(member, io.BytesIO(data))
    places = {group.key: group.members for group in groups(io.BytesIO(path.read_bytes()))}
    size = path.stat().st_size
    for keys in ({"b", "deep/" + "n" * 200}, {"b"}, {"a", "c"}):
        blank(path, keys)
        assert path.stat().st_size == size
        for key in keys:
            places.pop(key, None)
            assert f"secret {key}.".encode() not in path.read_bytes()
        assert {group.key: group.members for group in groups(io.BytesIO(path.read_bytes()))} == places
        assert [sample["__key__"] for sample in WebDataset(str(path), shardshuffle=False, empty_check=False)] == list(places)
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) == len(members)


def test_a_takedown_in_a_merged_index_reaches_its_sources(two):
    done = forget(two / "m", parse([sha256(PICTURES[0])]), rewrite=True)
    assert (done.indexed, done.removed) == (2, 2)
    for name in ("a", "b", "m"):
        assert not ids_of(two / name) & {id_of("0"), id_of("twin")}
        assert sha256(PICTURES[0]) in Forgotten.read(two / name / "forgotten.parquet").hashes
    assert all(PICTURES[0] not in path.read_bytes() for path in two.rglob("*.tar"))
    assert images_of(two / "m") == {id_of(str(n)): PICTURES[n] for n in (1, 2, 3, 4)}
    assert Index.open(two / "m").manifest["created_by"]["command"] == "the merge"
    told = statistics(Index.open(two / "m"))
    assert told["samples"] == sum(told["sources"].values()) == 4
    assert told["excluded"] == {"forgotten": 2}
    assert peek(Index.open(two / "m"), two / "peek.html", 50) == 4
    assert write_card(Index.open(two / "m"), two / "card.md")["samples"] == 4
    assert select(Index.open(two / "m"), two / "f.parquet", [condition("key!=forgotten")]) == {"key!=forgotten": 0}
    vector = json.dumps(IDENTITY.tolist())
    with pytest.raises(InputError, match="was taken down"):
        draw_replay(Index.open(two / "m"), two / "view.png", id_of("0"), vector, 8)
    again = forget(two / "m", parse([sha256(PICTURES[0])]), rewrite=True)
    assert (again.named, again.indexed, again.removed) == (1, 0, 0)
    assert merge(two / "m", [Input(two / "a"), Input(two / "b")])["counts"]["samples"] == 4
    last = forget(two / "m", parse([str(one) for one in ids_of(two / "m")]), rewrite=True)
    assert (last.removed, len(last.emptied)) == (4, 3)
    assert not list(two.rglob("index.arrow"))


def test_a_takedown_here_holds_for_what_is_merged_and_for_parents(two):
    forget(two / "a", parse(["http://h/1"]))
    assert merge(two / "m", [Input(two / "a"), Input(two / "b")])["counts"]["samples"] == 5
    assert id_of("1") not in ids_of(two / "m")
    assert build(two, 1)["counts"]["excluded"] == {"forgotten": 1}
    forget(two, parse([sha256(PICTURES[4])]))
    assert build(two / "b", 1)["counts"]["excluded"] == {"forgotten": 1}
    assert id_of("4") not in {*ids_of(two), *ids_of(two / "b")}


def test_what_was_taken_down_since_is_neither_shown_nor_copied(two):
    (two / "a").rename(two / "deeper")
    for folder in ("1/2/3", "4"):
        (two / folder).mkdir(parents=True)
    (two / "deeper").rename(two / "1" / "2" / "3" / "a")
    merge(two / "4" / "m", [Input(two / "1" / "2" / "3" / "a"), Input(two / "b")])
    forget(two, parse(["http://h/1"]), rewrite=True)
    index = Index.open(two / "4" / "m")
    assert len(index) == 6
    assert peek(index, two / "peek.html", 50) == peek(index, two / "peek.html", 50, 0, [condition("size>0")]) == 5
    assert from_index(two / "4" / "m", two / "evalset", "test") == 5
    assert build(two / "1" / "2" / "3" / "a", 1)["counts"]["samples"] == 3


def test_what_is_out_of_reach_is_refused_before_anything_changes(two):
    def state() -> dict:
        return {path: path.read_bytes() for path in two.rglob("*") if path.is_file() and ".scans" not in path.parts}

    def refuses(folder: Path, says: str) -> None:
        before = state()
        with pytest.raises(InputError, match=says):
            forget(folder, parse([sha256(PICTURES[0]), "http://h/1"]), rewrite=True)
        assert state() == before

    os.link(two / "b" / "00000.tar", two / "second name")
    refuses(two / "m", "b/00000.tar has 2 names")
    (two / "second name").unlink()
    (two / "a" / "00001.tar").rename(two / "moved")
    refuses(two / "m", "a/00001.tar is not here")
    (two / "moved").rename(two / "a" / "00001.tar")
    (two / "b").rename(two / "far away")
    refuses(two / "m", "b is not here or cannot be written")
    assert forget(two / "m", parse(["http://h/4"])).untold == (two / "m" / "../b",)
    assert id_of("4") not in ids_of(two / "m")


def test_a_mirror_of_other_names_is_rewritten_too(tmp_path):
    def tar(path: Path) -> None:
        write_set(path.parent, [(PICTURES[0], told("0")), (PICTURES[1], told("1")), (b"broken", told("2"))], index=False)
        (path.parent / "00000.tar").rename(path)

    tar(tmp_path / "real" / "store.tar")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "cc3m-train-0000.tar").symlink_to(tmp_path / "real" / "store.tar")
    (tmp_path / "mirror" / "cc3m-train-0000_stats.json").write_text(json.dumps({"successes": 3, "count": 3}))
    pq.write_table(pa.table({"key": [f"{n:09}" for n in range(3)], "status": ["success"] * 3, "url": ["u"] * 3,
                             "error_message": pa.nulls(3)}), tmp_path / "mirror" / "cc3m-train-0000.parquet")
    build(tmp_path / "mirror", 1)
    (tmp_path / "real" / ".store.tar.123.tmp").write_bytes(b"half a tar of a rewrite that was killed")
    done = forget(tmp_path / "mirror", parse(["http://h/1", "http://h/2"]), rewrite=True)
    assert (done.indexed, done.removed) == (1, 2)
    assert (tmp_path / "mirror" / "cc3m-train-0000.tar").is_symlink()
    assert b"broken" not in (tmp_path / "real" / "store.tar").read_bytes()
    assert [path.name for path in (tmp_path / "real").iterdir() if path.is_file()] == ["store.tar"]
    assert images_of(tmp_path / "mirror") == {id_of("0"): PICTURES[0]}
    assert json.loads((tmp_path / "mirror" / "cc3m-train-0000_stats.json").read_text())["successes"] == 1
    assert build(tmp_path / "mirror", 1)["counts"] == {"samples": 1, "merged": 0, "excluded": {}}


def test_takedowns_at_once_wait_for_each_other(two):
    words = [sys.executable, "-m", "pipeline.cli", "forget", "--rewrite"]
    both = [subprocess.Popen([*words, two / name, f"http://h/{number}"], stderr=subprocess.PIPE, cwd=ROOT)
            for name, number in (("m", 1), ("a", 2), ("b", 4))]
    for process in both:
        said = process.communicate()[1]
        assert process.returncode == 0, said
    assert Forgotten.read(two / "a" / "forgotten.parquet").ids.keys() == {id_of("1"), id_of("2")}
    assert ids_of(two / "a") == {id_of("0"), id_of("3")}
    assert ids_of(two / "b") == {id_of("twin")}


def test_a_takedown_while_an_index_is_made_is_not_lost(two, monkeypatch):
    forget(two / "m", parse([sha256(PICTURES[1])]))
    before, look = Index.open(two / "m"), merging.scans_below

    def meanwhile(folder, named):
        (Forgotten.read(two / "m" / "forgotten.parquet") | Forgotten({7: "late"})).write(two / "m" / "forgotten.parquet")
        yield from look(folder, named)

    monkeypatch.setattr(merging, "scans_below", meanwhile)
    merge(two / "m", [Input(two / "a"), Input(two / "b")])
    assert {7, id_of("1")} <= Forgotten.read(two / "m" / "forgotten.parquet").ids.keys()
    monkeypatch.undo()
    with pytest.raises(WorkFailed, match="made anew meanwhile"):
        duplicates(before, workers=1)
    assert len(Index.open(two / "m")) == 5
    assert rows_between(before, 0, len(before))["sample_id"].to_pylist() == before.columns(np.arange(len(before)))[
        "sample_id"].tolist(), "an open index changes under its reader"


def test_a_takedown_waits_for_an_index_that_is_being_made(two, monkeypatch):
    read, go, waiting = indexing.scanned, threading.Event(), threading.Event()

    def slowly(*words):
        found = read(*words)
        waiting.set()
        assert go.wait(60)
        return found

    monkeypatch.setattr(indexing, "scanned", slowly)
    with ThreadPoolExecutor() as pool:
        made = pool.submit(build, two / "a", 1)
        assert waiting.wait(60)
        done = pool.submit(forget, two / "m", parse(["http://h/1"]), rewrite=True)
        assert not wait([done], 0.5).done
        go.set()
        assert made.result(60)["counts"]["samples"] == 4
        assert done.result(60).removed == 1
    index = Index.open(two / "a")
    assert len(index) == 4
    assert id_of("1") not in ids_of(two / "a")
    assert ["forgotten"] in [index.captions(row) for row in range(4)]
    with ThreadPoolExecutor() as pool:
        with alone([two / "m"]):
            late = [pool.submit(merge, two / "m", [Input(two / "a"), Input(two / "b")]),
                    pool.submit(duplicates, Index.open(two / "m"), workers=1)]
            assert not wait(late, 2).done
        assert late[0].result(60)["counts"]["samples"] == 5
        wait(late, 60)


def test_lists_and_locks_are_where_linked_tars_really_are(tmp_path):
    write_set(tmp_path / "real", [(PICTURES[n], told(str(n))) for n in range(3)], index=False)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.tar").symlink_to("../real/00000.tar")
        build(tmp_path / name, 1)
    forget(tmp_path / "real", parse(["http://h/1"]))
    assert ids_of(tmp_path / "one") == {id_of("0"), id_of("2")}
    assert build(tmp_path / "one", 1)["counts"]["samples"] == 2
    assert Stream.open(str(tmp_path / "two" / "x.tar"), np.empty(0, np.int64)).gone.ids.keys() == {id_of("1")}
    with ThreadPoolExecutor() as pool:
        with alone([tmp_path / "real"]):
            both = [pool.submit(forget, tmp_path / name, parse([f"http://h/{number}"]), rewrite=True)
                    for name, number in (("one", 0), ("two", 2))]
            assert not wait(both, 0.5).done
        for one in both:
            one.result(60)
    data = (tmp_path / "real" / "00000.tar").read_bytes()
    assert PICTURES[0] not in data
    assert PICTURES[2] not in data


def test_what_a_killed_command_left_is_swept_away(two):
    dead = subprocess.Popen(["true"])
    dead.wait()
    halves = [two / "a" / f".index.arrow.{dead.pid}.tmp", two / "a" / ".scans" / f".x.arrow.{dead.pid}.tmp"]
    alive = two / "a" / f".manifest.json.{os.getppid()}.tmp"
    for path in (*halves, alive):
        path.touch()
    build(two / "a", 1)
    assert [path.exists() for path in (*halves, alive)] == [False, False, True]


def test_a_manifest_is_found_while_it_takes_its_place(two, monkeypatch):
    (two / "m" / "manifest.json").rename(two / "m" / ".manifest.json")
    read = Path.read_bytes

    def finishing(path: Path) -> bytes:
        if path.name == ".manifest.json":
            path.rename(path.with_name("manifest.json"))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", finishing)
    assert len(places(two / "m")) == 3


def test_samples_that_share_a_key_go_together(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key, number in (("a", 0), ("a", 1), ("b", 2)):
            for suffix, data in (("jpg", PICTURES[number]), ("json", json.dumps(told(str(number))).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    build(tmp_path, 1)
    done = forget(tmp_path, parse(["http://h/1"]), rewrite=True)
    assert (done.indexed, done.removed) == (1, 1)
    assert PICTURES[1] not in (tmp_path / "x.tar").read_bytes()
    assert images_of(tmp_path) == {id_of("2"): PICTURES[2]}


def test_killed_anywhere_the_same_takedown_goes_on(tmp_path):
    samples = [(PICTURES[n % 8], told(str(n))) for n in range(40)]
    write_set(tmp_path / "a", samples, per_tar=4)
    merge(tmp_path / "m", [Input(tmp_path / "a")])
    words = [sys.executable, "-c", """
import os, sys, pipeline.files as files, pathlib
left, replace = int(sys.argv[2]), pathlib.Path.replace
def dying(self, target):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    return replace(self, target)
pathlib.Path.replace = dying
from pipeline.takedown import forget, parse
print(forget(pathlib.Path(sys.argv[1]), parse(["http://h/1", sys.argv[3]]), rewrite=True).removed)"""]
    steps = 0
    while True:
        done = subprocess.run([*words, tmp_path / "m", str(steps), sha256(PICTURES[0])], capture_output=True, text=True)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        steps += 3
        assert steps < 99
    assert steps > 3
    assert all(PICTURES[0] not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    expected = {id_of(str(n)): PICTURES[n % 8] for n in range(40) if n % 8 and n != 1}
    assert images_of(tmp_path / "m") == images_of(tmp_path / "a") == expected


def test_groups_outlive_indexing_merging_and_takedowns(tmp_path):
    same, other = encoded(drawing(1), quality=90), encoded(drawing(2), quality=90)
    write_set(tmp_path / "a", [(same, told("a0")), (same, told("a1")), (same, told("a2")), (other, told("shared"))])
    write_set(tmp_path / "b", [(other, told("shared")), (other, told("b1")), (same, told("b2"))])
    for name in "ab":
        duplicates(Index.open(tmp_path / name), workers=1)
    grouped = groups_of(tmp_path / "a")
    write_set(tmp_path / "new", [(PICTURES[0], told("new"))], index=False)
    (tmp_path / "new" / "00000.tar").rename(tmp_path / "a" / "00001.tar")
    manifest = build(tmp_path / "a", 1)
    assert groups_of(tmp_path / "a") == {**grouped, id_of("new"): -1}
    assert manifest["duplicates"] == {"groups": 1, "rows": 3, "largest": 3, "uncompared": 1}
    said = command("uniclip-data", "merge", "m", "a", "b", cwd=tmp_path).stdout
    assert "3  not compared with all others" in said
    assert "run `uniclip-data duplicates m`" in said
    merged = groups_of(tmp_path / "m")
    assert len({merged[id_of(path)] for path in ("a0", "a1", "a2")} | {merged[id_of("shared")]}) == 2
    assert merged[id_of("shared")] == merged[id_of("b1")] >= 0
    assert merged[id_of("b2")] == merged[id_of("new")] == -1  # nobody has compared them with a's
    duplicates(Index.open(tmp_path / "m"), workers=1)
    merge(tmp_path / "m", [Input(tmp_path / "a"), Input(tmp_path / "b")])
    assert len({groups_of(tmp_path / "m")[id_of(path)] for path in ("a0", "a1", "a2", "b2")}) == 1
    assert "uncompared" not in command("uniclip-data", "index", "b", cwd=tmp_path).stdout
    forget(tmp_path / "m", parse(["http://h/shared", "http://h/a0"]))
    left = groups_of(tmp_path / "m")
    assert left[id_of("a1")] == left[id_of("a2")] == left[id_of("b2")] == min(map(id_of, ("a1", "a2", "b2")))
    assert statistics(Index.open(tmp_path / "m"))["duplicates"] == {"rows": 3, "groups": 1, "uncompared": 0}


def test_a_list_from_before_hashes_is_still_obeyed(tmp_path):
    pq.write_table(pa.table([[id_of("1")], ["asked"]], schema=SKIPS), tmp_path / "forgotten.parquet")
    write_set(tmp_path, [(PICTURES[0], told("0")), (PICTURES[1], told("1"))])
    assert ids_of(tmp_path) == {id_of("0")}
    forget(tmp_path, parse([sha256(PICTURES[7])]))
    assert read_skips(tmp_path / "forgotten.parquet") == {
        id_of("1"): "asked", sample_id_of(PICTURES[7]): "takedown"}


def test_what_cannot_be_named_is_refused(two):
    for words, says in ((["nonsense"], "neither a URL nor a sample id"), ([], "nothing is named"),
                        (["http://h/\udce9"], "neither a URL")):
        with pytest.raises(InputError, match=says):
            forget(two / "a", parse(words))
    (two / "l.txt").write_bytes(b"http://h/0\nhttp://h/\xe9.jpg\n")
    with pytest.raises(InputError, match="line 2: .* is not UTF-8"):
        words_of(two / "l.txt")
    with pytest.raises(InputError, match="--list .* is a folder"):
        words_of(two)
    assert not list(two.rglob("forgotten.parquet"))
    nothing = forget(two / "a", parse(["http://h/unheard of"]), rewrite=True)
    assert (nothing.indexed, nothing.removed) == (0, 0)
    done = command("uniclip-data", "forget", "m", "f" * 64, cwd=two)
    assert "1  sha256 that no file here has" in done.stdout, done.stderr


def test_odd_names_are_told(tmp_path):
    folder = write_set(tmp_path / "a", [(PICTURES[0], told("0"))])
    (folder / "unpacked.tar").mkdir()
    assert build(folder, 1)["counts"]["samples"] == 1
    (folder / "lost.tar").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"lost\.tar is a link to nothing"):
        build(folder, 1)
    (folder / "lost.tar").rename(folder / os.fsdecode(b"\xff.tar"))
    (folder / "00000.tar").rename(folder / os.fsdecode(b"\xfe.tar"))
    (folder / os.fsdecode(b"\xff.tar")).unlink()
    with pytest.raises(InputError, match=r"\\udcfe\.tar: the name is not UTF-8"):
        build(folder, 1)
    with tarfile.open(folder / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in (("é.jpg", PICTURES[1]), ("é.json", json.dumps(told("1")).encode()), ("a.é", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (folder / os.fsdecode(b"\xfe.tar")).rename(folder / "00000.tar")
    assert scan(folder / "x.tar").unusable[0][1] == "key is not UTF-8"
    assert build(folder, 1)["counts"]["excluded"]["key is not UTF-8"] == 1
    assert forget(folder, parse(["http://h/1"]), rewrite=True).removed == 1
    assert PICTURES[1] not in (folder / "x.tar").read_bytes()
