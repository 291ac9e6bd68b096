"""Tars without an index give the samples, captions, vectors and bytes that the index gives, and refuse what it refuses."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, encoded, picture
from fsspec.implementations.memory import MemoryFileSystem
from webserver import serving

from pipeline.console import InputError, WorkFailed
from pipeline.execution import Guarded
from pipeline.index import Index
from pipeline.indexing import build
from pipeline.ledger import Ledger
from pipeline.loader import Indexed
from pipeline.reader import Place
from pipeline.recipe import Cursor, Recipe
from pipeline.sampling import STRONG, WEAK
from pipeline.stream import Stream, shard_urls
from pipeline.tars import scan

RECIPE = Recipe((WEAK, STRONG), 16, "pillow", 1)
NONE = np.empty(0, np.int64)


def tokens(captions: list[str]) -> np.ndarray:
    """Four numbers that stand for a caption."""
    return np.array([np.frombuffer(hashlib.sha256(c.encode()).digest(), np.int64) for c in captions])


def start(data, batch: int, seen: int = 0, **options):
    cursor = Cursor(5, seen, data.fingerprint, RECIPE.fingerprint(**data.chosen))
    return data.loader(tokens, RECIPE, cursor, batch, **options)


def epoch(data, samples: int, monkeypatch, batch: int = 24, **options) -> set[tuple]:
    """(id, caption, vectors, bytes handed to the executor) of the first `samples` samples."""
    handed, real = [], Guarded.__call__

    def spy(executor, encoded, vectors, ids):
        handed.extend(encoded)
        return real(executor, encoded, vectors, ids)

    monkeypatch.setattr(Guarded, "__call__", spy)
    iterator = iter(start(data, batch, **options))
    batches = [b for b, _ in islice(iterator, samples // batch)]
    iterator.close()
    ids, words, vectors = (torch.cat([getattr(b, name) for b in batches]) for name in ("sample_id", "tokens", "vectors"))
    assert all(b.valid.all() for b in batches)
    return {(int(i), tuple(w.ravel().tolist()), v.numpy().tobytes(), data)
            for i, w, v, data in zip(ids, words, vectors, handed, strict=False)}


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory) -> Path:
    """The demonstration set as two tars of 60, indexed."""
    made = tmp_path_factory.mktemp("two")
    with tarfile.open(next((scenes / "train").glob("*.tar"))) as tar:
        members = tar.getmembers()
        for number in range(2):
            with tarfile.open(made / f"{number:03d}.tar", "w") as part:
                for member in members[number * len(members) // 2 : (number + 1) * len(members) // 2]:
                    part.addfile(member, tar.extractfile(member))
    build(made, 1)
    return made


@pytest.fixture
def pattern(folder) -> str:
    return f"{folder}/{{000..001}}.tar"


def test_stream_and_index_give_equal_sets(folder, pattern, monkeypatch):
    indexed = epoch(Indexed.open(folder, {}, NONE, Place()), 120, monkeypatch)
    streamed = epoch(Stream.open(pattern, NONE), 120, monkeypatch)
    assert len(indexed) == 120
    assert streamed == indexed


def test_two_ranks_share_the_tars(folder, pattern, monkeypatch):
    data = Stream.open(pattern, NONE)
    ranks = [epoch(data, 60, monkeypatch, batch=10, rank=rank, world=2) for rank in range(2)]
    assert ranks[0].isdisjoint(ranks[1])
    with pytest.raises(InputError, match="2 tars for 3 processes"):
        start(data, 12, rank=0, world=3)


def test_a_remote_stream_is_the_local_one(folder, pattern, monkeypatch):
    remote = MemoryFileSystem()
    for path in folder.glob("*.tar"):
        remote.pipe_file(f"/mirror/{path.name}", path.read_bytes())
    local = epoch(Stream.open(pattern, NONE), 120, monkeypatch)
    there = Stream.open(pattern.replace(str(folder), "memory://mirror"), NONE)
    assert epoch(there, 120, monkeypatch) == local


def test_skipped_ids_do_not_come(folder, pattern, monkeypatch):
    index = Index.open(folder)
    gone = np.sort(index.columns(np.arange(24))["sample_id"])
    seen = {sample[0] for sample in epoch(Stream.open(pattern, gone), 96, monkeypatch)}
    assert len(seen) == 96
    assert not seen & set(gone.tolist())


def test_what_was_taken_down_does_not_come(folder, tmp_path, monkeypatch):
    """By id, and by the sha256 of the stored image."""
    shutil.copytree(folder, tmp_path / "set")
    index = Index.open(folder)
    columns, ids = index.columns(np.arange(2)), []
    with (folder / index.shards[0]).open("rb") as file:
        file.seek(int(columns["offset"][1]))
        ids = [str(columns["sample_id"][0]), hashlib.sha256(file.read(int(columns["size"][1]))).hexdigest()]
    assert command("uniclip-data", "forget", tmp_path / "set", *ids).returncode == 0
    seen = {sample[0] for sample in epoch(Stream.open(f"{tmp_path}/set/{{000..001}}.tar", NONE), 118, monkeypatch, batch=59)}
    assert len(seen) == 118
    assert not seen & set(columns["sample_id"].tolist())


@pytest.mark.parametrize("pattern, message", [
    ("pipe:curl http://x/{0..9}.tar", "would run a shell command"),
    ("nowhere/{000..009}.tar", "nowhere/000.tar does not exist"),
    ("http://host/{0..9}.tar.gz", "0.tar.gz is compressed: unpack it"),
    (" ", "names no tar"),
    ("nosuch://bucket/0.tar", "nosuch://bucket/0.tar: Protocol not known"),
])
def test_what_is_no_tar_is_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        shard_urls(pattern)


def damaged(whole: Path, folder: Path) -> tuple[str, int]:
    """A copy of the set with six images overwritten and the second tar cut in half; how many samples are left."""
    shutil.copytree(whole, folder)
    index = Index.open(folder)
    columns = index.columns(np.arange(len(index)))
    first = int(index.shard_starts[1])
    for row in range(0, 60, 10):
        with (folder / index.shards[0]).open("r+b") as file:
            file.seek(int(columns["offset"][row]))
            file.write(b"\0" * int(columns["size"][row]))
    second = folder / index.shards[1]
    half = second.stat().st_size // 2
    second.write_bytes(second.read_bytes()[:half])
    left = int((columns["offset"][first:] + columns["size"][first:] + 2048 < half).sum())
    return f"{folder}/{{000..001}}.tar", first - 6 + left


def test_faults_are_lines_in_the_ledger_and_the_rest_trains(folder, tmp_path):
    pattern, left = damaged(folder, tmp_path / "set")
    ledger = Ledger(tmp_path / "bad.jsonl", 1.0)
    iterator = iter(start(Stream.open(pattern, NONE), 10, ledger=ledger))
    seen = torch.cat([b.sample_id for b, _ in islice(iterator, 2 * left // 10)])
    iterator.close()
    assert len(set(seen.tolist())) == left
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines if line["reason"] == "not an image"}) == 6
    assert any(line["reason"] == "truncated tar" for line in lines)


def test_a_vanished_tar_is_a_line_and_the_budget_holds(folder, tmp_path):
    pattern, _ = damaged(folder, tmp_path / "set")
    data = Stream.open(pattern, NONE)
    Path(data.urls[1]).unlink()
    iterator = iter(start(data, 50, ledger=Ledger(tmp_path / "bad.jsonl", 0.05)))
    with pytest.raises(WorkFailed, match=r"more than the budget of 5\.00%"):
        list(islice(iterator, 20))
    assert "cannot be opened" in (tmp_path / "bad.jsonl").read_text()
    for url in data.urls[:1]:
        Path(url).write_bytes(b"")
    with pytest.raises(InputError, match="no usable sample in 2 tars"):
        next(iter(start(data, 8, ledger=Ledger(None, 1.0))))


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def seen_by_both(path: Path) -> tuple[list[tuple], list[tuple]]:
    """What a stream and an index make of a tar: usable (key, caption, id) and unusable (key, reason)."""
    streaming, faults = start(Stream.open(str(path), NONE), 1), []
    streamed = [(row["key"], *row["captions"], row["sample_id"]) for row in streaming._pass(0, faults.append)]
    streaming.close()
    assert {line["shard"] for line in faults} <= {str(path)}
    shard = scan(path)
    indexed = [(row["key"], *row["captions"], row["sample_id"]) for row in shard.rows.to_pylist()]
    return ([*sorted(streamed), *sorted((line["key"], line["reason"]) for line in faults)],
            [*sorted(indexed), *sorted(shard.unusable)])


def test_members_of_no_sample_are_lines_outside_the_budget(tmp_path):
    """As macOS packs a folder: before each file a hidden one."""
    names = [(f"{n}.{suffix}", data) for n in range(120) for suffix, data in (("jpg", PICTURES[n % 3]), ("txt", b"a %d" % n))]
    tar = write(tmp_path / "mac.tar", [one for name, data in names for one in ((f"._{name}", b"\0\5\x16\7"), (name, data))])
    ledger = Ledger(tmp_path / "bad.jsonl", 0.01)
    list(islice(start(Stream.open(str(tar), NONE), 30, ledger=ledger), 5))
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert len({line["key"] for line in lines if line["reason"].startswith("no sample's file")}) >= 120
    assert (ledger.seen, ledger.bad, Ledger.resumed(ledger.path, 0.01, 10**6).bad) == (150, 0, 0)


PICTURES = [encoded(picture(n, 24, 18)) for n in range(3)]


def test_a_tar_cut_anywhere_gives_what_its_index_gives(tmp_path):
    names = [("0.jpg", PICTURES[0]), ("0.txt", b"a"), ("1.txt", b"b"), ("1.jpg", PICTURES[1]), ("1.json", b"{}")]
    data, half = write(tmp_path / "whole.tar", names).read_bytes(), tmp_path / "half.tar"
    verdicts = set()
    for cut in range(0, 8192, 256):
        half.write_bytes(data[:cut])
        streamed, indexed = seen_by_both(half)
        assert streamed == indexed, f"cut at {cut}"
        verdicts.add(tuple(found[-1].partition(":")[0] if len(found) == 2 else "sample" for found in indexed))
    half.write_bytes(data[:2048] + b"no header" + data[2057:])
    streamed, indexed = seen_by_both(half)
    assert streamed == indexed
    assert verdicts >= {("not a tar",), ("truncated tar",), ("sample", "truncated tar"), ("sample", "sample")}


@pytest.mark.parametrize("order", ["0a 0b 1a 0a 0b", "0a 1a 1b 0a 0b", "0a 0a 0b", "0a 0b 0a 0b", "0b 0A 0a", "0b 1b"])
def test_equal_keys_are_taken_as_in_the_index(order, tmp_path):
    """a: an image, b: a text; capitals are another name with the same suffix."""
    names = {"a": "jpg", "A": "JPG", "b": "txt"}
    members = [(f"{word[0]}.{names[word[1]]}", PICTURES[n % 3] if word[1] in "aA" else f"text {n}".encode())
               for n, word in enumerate(order.split())]
    streamed, indexed = seen_by_both(write(tmp_path / "0.tar", members))
    assert streamed == indexed


def with_ranges(data: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    """A server that gives ranges, and says so."""
    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        first, last = int(asked[0]), min(int(asked[1] or len(data)), len(data) - 1)
        handler.send_response(206 if "Range" in handler.headers else 200)
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        handler.send_header("Content-Length", str(last + 1 - first))
        handler.end_headers()
        handler.wfile.write(data[first : last + 1])

    return answer


def test_servers_with_and_without_ranges_give_the_same(tmp_path):
    """A tar of several of fsspec's blocks of 5 MiB; most of it is a member that nobody reads."""
    members = [("0.jpg", PICTURES[0]), ("0.txt", b"a"), ("0.npy", bytes(12 * 2**20)), ("1.jpg", PICTURES[1]), ("1.txt", b"b")]
    data = write(tmp_path / "0.tar", members).read_bytes()
    with serving() as site:
        site.pages |= {"/whole/0.tar": data, "/ranges/0.tar": with_ranges(data)}
        urls = [str(tmp_path / "0.tar"), site.url("/whole/0.tar"), site.url("/ranges/0.tar")]
        faults, found = [], []
        for url in urls:
            streaming = start(Stream.open(url, NONE), 1)
            found.append(sorted((row["key"], row["image"]) for row in streaming._pass(0, faults.append)))
            streaming.close()
        assert site.hits["/ranges/0.tar"] >= 4
    assert faults == []
    assert len(found[0]) == 2
    assert found[0] == found[1] == found[2]


def stalling(data: bytes, sent: int, forever: threading.Event) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer that stops in mid-body."""
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)  # and no length: its client takes what comes, as it comes
        handler.end_headers()
        handler.wfile.write(data[:sent])
        handler.wfile.flush()
        forever.wait(60)

    return answer


def test_a_stalled_tar_is_a_line_and_the_others_go_on(folder, tmp_path):
    index, forever = Index.open(folder), threading.Event()
    first, second = ((folder / name).read_bytes() for name in index.shards)
    with serving() as site:
        site.pages |= {"/0.tar": first, "/1.tar": stalling(second, len(second) // 2, forever),
                       "/2.tar": stalling(second, 0, forever), "/3.tar": lambda handler: handler.connection.close()}
        data = Stream.open(site.url("/{0..3}.tar"), NONE, timeout=1)
        iterator = iter(start(data, 20, ledger=Ledger(tmp_path / "bad.jsonl", 0.2)))
        seen = torch.cat([batch.sample_id for batch, _ in islice(iterator, 10)]).tolist()
        iterator.close()
        forever.set()
    ids = index.columns(np.arange(len(index)))["sample_id"].tolist()
    assert set(ids[:60]) < set(seen) < set(ids), "not the first tar and half of the second"
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    why = {(line["shard"][-5:], line["reason"]) for line in lines}
    assert {("1.tar", "stalled: no answer in 1 s"), ("2.tar", "stalled: no answer in 1 s")} <= why
    assert any(tar == "3.tar" and reason.startswith("cannot be") for tar, reason in why)


def test_a_process_ends_while_a_read_stalls(folder):
    data, forever = (folder / "000.tar").read_bytes(), threading.Event()
    with serving() as site:
        site.pages["/0.tar"] = stalling(data, len(data) // 3, forever)
        code = f"""
import contextlib, sys, time
sys.path.insert(0, "tests")
from test_stream import *
from pipeline.reader import Closed
stream = iter(start(Stream.open({site.url("/0.tar")!r}, NONE, timeout=600), 10))
def wait():
    with contextlib.suppress(Closed):
        next(stream)
threading.Thread(target=wait, daemon=True).start()
time.sleep(1)
print(time.time(), flush=True)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
        ended = time.time()
        forever.set()
    assert (done.returncode, done.stderr) == (0, "")
    assert ended - float(done.stdout) < 10


def test_a_run_trains_from_a_stream_and_says_that_it_resumes_inexactly(folder, pattern, tmp_path):
    small = {"model.image.size": 24, "model.image.width": 32, "model.image.depth": 1, "model.image.heads": 2,
             "model.text.width": 32, "model.text.depth": 1, "model.text.heads": 2, "model.dim": 16, "optim.batch_size": 16,
             "optim.samples": 64, "optim.warmup_samples": 0, "run.save_every_samples": 32, "data.threads": 1,
             "data.executor": "pillow", "data.stream": pattern, "run.folder": tmp_path / "run"}
    words = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    done = command("uniclip-train", "run", "scenes-tiny", *words)
    assert done.returncode == 0, done.stderr
    assert "2 tars without an index (not exactly resumable)" in done.stdout
    again = command("uniclip-train", "resume", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert "a stream is not exactly resumable" in again.stdout
    both = command("uniclip-train", "run", "scenes-tiny", *words, "--set", "data.weights.cc=2.0")
    assert both.returncode == 2
    assert "need an index" in both.stderr
