"""Bytes by offset from disk or afar: equal, bounded in space and time, and never the end of a run."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, encoded, picture
from fsspec.implementations.memory import MemoryFileSystem
from webserver import serving

from pipeline.cache import Cache, Copied
from pipeline.console import InputError, WorkFailed
from pipeline.index import Index
from pipeline.indexing import build
from pipeline.ledger import Ledger
from pipeline.loader import Indexed, Loader
from pipeline.reader import Place, ReadAhead, RemoteShards, ShardReader
from pipeline.recipe import Cursor, Recipe
from pipeline.sampling import STRONG, WEAK

RECIPE = Recipe((WEAK, STRONG), 16, "pillow", 1)


def write(path: Path, numbers: range) -> None:
    """A tar of captioned pictures."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for suffix, data in (("jpg", encoded(picture(number))), ("txt", f"picture {number}".encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def remote(tmp_path_factory) -> Index:
    """Two tars of 60 samples, also at memory://bucket."""
    folder = tmp_path_factory.mktemp("remote")
    for shard in range(2):
        write(folder / f"{shard}.tar", range(60 * shard, 60 * shard + 60))
        MemoryFileSystem().pipe_file(f"/bucket/{shard}.tar", (folder / f"{shard}.tar").read_bytes())
    build(folder, 1)
    return Index.open(folder)


def loader(index: Index, place: Place, ledger: Ledger | None = None, recipe: Recipe = RECIPE, batch: int = 20) -> Loader:
    cursor = Cursor(5, 0, index.fingerprint, recipe.fingerprint())
    return Loader(index, lambda c: np.zeros((len(c), 4), np.int64), recipe, cursor, batch, ledger=ledger, place=place)


def told(index: Index) -> list[Copied]:
    return [Copied(shard["name"], shard["size"], shard["sha256"]) for shard in index.manifest["shards"]]


def until(done: Callable[[], object], seconds: float = 10) -> bool:
    """Whether something came true in time."""
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(done())


def members(index: Index) -> list[tuple[int, int, int]]:
    columns = index.columns(np.arange(len(index)))
    return list(zip(*(columns[name].tolist() for name in ("shard", "offset", "size")), strict=True))


def test_remote_shards_are_the_local_ones(remote, tmp_path):
    local = ShardReader(remote.folder, remote.shards)
    afar = RemoteShards("memory://bucket", told(remote), tmp_path / "cache", 10**9)
    for member in members(remote)[::7]:
        assert afar.read(*member) == local.read(*member)
    afar.expect([0, 1])
    assert until(lambda: len(copies(tmp_path / "cache")) == 2)
    MemoryFileSystem().store.pop("/bucket/" + remote.shards[0])
    try:
        for member in members(remote)[::7]:
            assert afar.read(*member) == local.read(*member), "not from the cache"
    finally:
        MemoryFileSystem().pipe_file("/bucket/" + remote.shards[0], (remote.folder / remote.shards[0]).read_bytes())
    afar.close()


def copies(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*.tar") if path.is_file()]


def test_the_cache_stays_within_its_bound(remote, tmp_path):
    bound = max(shard.size for shard in told(remote)) + 100
    afar = RemoteShards("memory://bucket", told(remote), tmp_path / "cache", bound)
    for wanted in ([0], [1], [0, 1], [1, 0]):
        afar.expect(wanted)
        time.sleep(0.2)
        held = copies(tmp_path / "cache")
        assert sum(path.stat().st_size for path in held) <= bound
        assert len(held) == 1
        assert afar.read(wanted[-1], 0, 512)
    opened = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert not [name for name in opened if str(tmp_path) in name and name.endswith("(deleted)")]  # they would take space
    afar.close()


def stored(folder: Path, *contents: bytes) -> list[Copied]:
    """Shards of these bytes in `folder`, as an index tells them."""
    folder.mkdir(exist_ok=True)
    for number, data in enumerate(contents):
        (folder / f"{number}.tar").write_bytes(data)
    return [Copied(f"{n}.tar", len(data), hashlib.sha256(data).hexdigest()) for n, data in enumerate(contents)]


def afar(tmp_path: Path, shards: list[Copied], bound: int = 1000) -> RemoteShards:
    """What is at file://source, with a cache."""
    return RemoteShards(f"file://{tmp_path / 'source'}", shards, tmp_path / "cache", bound)


def test_a_copy_is_of_the_content_that_the_index_knows(tmp_path):
    """A shard made again under its old name is copied again; what is not the index's is no copy."""
    for content in (b"first", b"second", b"third!"):
        shards = stored(tmp_path / "source", content)
        reader = afar(tmp_path, shards)
        reader.expect([0])
        assert until((tmp_path / "cache" / shards[0].copy).exists)
        (tmp_path / "source" / "0.tar").unlink()
        assert reader.read(0, 0, len(content)) == content
        reader.close()
    assert len(copies(tmp_path / "cache")) == 3
    shards = stored(tmp_path / "source", b"fourth")
    (tmp_path / "source" / "0.tar").write_bytes(b"foirth")
    reader = afar(tmp_path, shards)
    reader.expect([0])
    assert not until((tmp_path / "cache" / shards[0].copy).exists, 0.3)
    assert reader.read(0, 0, 6) == b"foirth"  # by range: the image, not the copy, is what is judged
    reader.close()


def test_a_copy_that_keeps_failing_is_said_once_and_given_up(tmp_path, capsys):
    """Other content than the index knows is fetched once, what does not come three times; our own error ends the run."""
    shards, asked = stored(tmp_path / "source", b"one", b"two"), []

    def fetch(name: str, target: Path) -> None:
        asked.append(name)
        if name == "0.tar":
            raise ConnectionError("reset")
        target.write_bytes(b"TWO")

    cache = Cache(tmp_path / "cache", 100, fetch, shards)
    for _ in range(20):
        cache.want([0, 1])
        time.sleep(0.01)
        cache.want([1, 0])
        time.sleep(0.01)
    assert sorted(asked) == ["0.tar"] * 3 + ["1.tar"] and cache.failed.count == 4
    assert len([line for line in capsys.readouterr().err.splitlines() if "could not be copied" in line]) == 1
    cache.close()
    ours = Cache(tmp_path / "cache", 100, fetch, [Copied("0.tar", "three bytes", "")])  # type: ignore[arg-type]
    ours.want([0])
    assert until(lambda: ours._broken)
    with pytest.raises(TypeError):
        ours.want([])
    ours.close()


def test_a_copy_cut_short_is_read_from_afar_and_copied_again(tmp_path):
    shards = stored(tmp_path / "source", b"0123456789")
    reader = afar(tmp_path, shards)
    copy = tmp_path / "cache" / shards[0].copy
    copy.write_bytes(b"0123")
    assert reader.read(0, 5, 3) == b"567"
    reader.expect([0])
    assert until(lambda: copy.stat().st_size == 10)
    reader.close()


def test_a_failing_copy_ends_nothing(tmp_path):
    """Whatever a file system raises; a file where the folder should be; a part that another process is writing, or left."""
    shards, asked = stored(tmp_path / "source", b"one", b"two", b"three"), []

    def fetch(name: str, target: Path) -> None:
        asked.append(name)
        if name == "0.tar":
            raise RuntimeError("payload is not completed")
        target.write_bytes((tmp_path / "source" / name).read_bytes())

    cache = Cache(tmp_path / "cache", 100, fetch, shards)
    mine, left = (cache.path(n).with_suffix(".part") for n in (1, 2))
    mine.touch()
    left.touch()
    os.utime(left, (0, 0))
    cache.want([0, 1, 2])
    assert until(cache.path(2).exists)
    assert (asked, mine.exists(), left.exists()) == (["0.tar", "2.tar"], True, False)
    shutil.rmtree(tmp_path / "cache")  # by another process
    cache.want([2])
    assert until(cache.path(2).exists)
    cache.close()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="data.cache = .*file cannot be made"):
        Cache(tmp_path / "file", 100, fetch, shards)


def test_a_full_disk_is_read_around(tmp_path):
    """In a process whose files may not grow beyond a thousand bytes."""
    shards = stored(tmp_path / "source", b"a" * 500, b"b" * 5000)
    code = f"""
import resource, sys
sys.path.insert(0, "tests")
from test_reader import *
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
shards = {[(s.name, s.size, s.sha256) for s in shards]}
reader = afar(Path({str(tmp_path)!r}), [Copied(*shard) for shard in shards], 10**6)
reader.expect([1, 0])
print(until((Path({str(tmp_path)!r}) / "cache" / f"{{shards[0][2]}}.tar").exists))
print(reader.read(1, 4990, 10), reader.read(0, 0, 3))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.split() == ["True", str(b"b" * 10), str(b"aaa")]
    line, = done.stderr.splitlines()
    assert "data.cache: a shard could not be copied" in line and "1.tar" in line and "File too large" in line
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [shards[0].copy]


def test_two_processes_share_a_cache(tmp_path):
    """Each wants its shards in an order of its own, with room for three of twelve: both read what is there, neither breaks."""
    shards = stored(tmp_path / "source", *(bytes([n]) * 1000 for n in range(12)))
    code = f"""
import random, sys
sys.path.insert(0, "tests")
from test_reader import *
shards = {[(s.name, s.size, s.sha256) for s in shards]}
reader = afar(Path({str(tmp_path)!r}), [Copied(*shard) for shard in shards], 3500)
order = random.Random(int(sys.argv[1]))
for _ in range(100):
    wanted = order.sample(range(12), 3)
    reader.expect(wanted)
    time.sleep(0.002)
    for shard in wanted:
        assert reader.read(shard, 500, 100) == bytes([shard]) * 100
print([t.name for t in threading.enumerate() if t.name == "shard cache"])
"""
    both = [subprocess.Popen([sys.executable, "-c", code, str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             cwd=ROOT) for n in range(2)]
    for process in both:
        out, error = process.communicate(timeout=120)
        assert (out.strip(), error) == ("['shard cache']", "")
    left = list((tmp_path / "cache").iterdir())
    assert sum(path.stat().st_size for path in left) <= 3500 + 1000  # each may overlook the copy that the other makes
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.stem for path in left if path.suffix == ".tar")


def test_training_reads_from_afar(remote, tmp_path):
    here = [b for b, _ in islice(loader(remote, Place()), 4)]
    there = [b for b, _ in islice(loader(remote, Place("memory://bucket", tmp_path / "c", 10**9)), 4)]
    for a, b in zip(here, there, strict=True):
        assert all((x == y).all() for x, y in zip(a.views, b.views, strict=True))
        assert (a.sample_id == b.sample_id).all()


def test_a_file_that_others_forget_stays_open_for_its_reader(remote, monkeypatch):
    reader, real = ShardReader(remote.folder, remote.shards), os.pread
    expected = reader.read(*members(remote)[0])

    def forgotten_first(*where) -> bytes:
        reader.close()
        return real(*where)

    monkeypatch.setattr("pipeline.reader.os.pread", forgotten_first)
    assert reader.read(*members(remote)[0]) == expected


def test_remote_shards_are_compared_with_their_index_when_opened(remote):
    with serving() as site:
        for name in remote.shards:
            site.pages[f"/set/{name}"] = (remote.folder / name).read_bytes()
        place, shards = Place(site.url("/set"), timeout=5), remote.manifest["shards"]
        place.check(remote.folder, shards)
        site.pages["/set/1.tar"] = b"short"
        with pytest.raises(InputError, match=r"/set/1\.tar is 5 bytes and was [0-9,]+: copy it there again"):
            place.check(remote.folder, shards)
        del site.pages["/set/1.tar"]
        with pytest.raises(InputError, match=r"/set/1\.tar is missing or does not answer \(.*404"):
            Indexed.open(remote.folder, {}, np.empty(0, np.int64), place)
        site.pages["/set/1.tar"] = lambda handler: time.sleep(1)
        with pytest.raises(InputError, match=r"/set/1\.tar .*no answer in 0.5 s.*data\.read_timeout"):
            Place(site.url("/set"), timeout=0.5).check(remote.folder, shards)


def test_an_unknown_kind_of_url_is_refused(remote):
    with pytest.raises(InputError, match="data.shards = 'nosuch://x'"):
        loader(remote, Place("nosuch://x"))


def test_a_stalled_read_is_a_bad_sample_and_keeps_nobody(remote, monkeypatch, tmp_path):
    stalled, release = members(remote)[5], threading.Event()
    real = ShardReader.read

    def read(self, *member):
        if member == stalled:
            release.wait(30)
        return real(self, *member)

    monkeypatch.setattr(ShardReader, "read", read)
    stream = iter(loader(remote, Place(timeout=0.3), Ledger(tmp_path / "bad.jsonl", 0.05)))
    began = time.monotonic()
    batches = [batch for batch, _ in islice(stream, 6)]
    assert time.monotonic() - began < 20
    stream.close()
    release.set()
    assert sum(int((~batch.valid).sum()) for batch in batches) == 1
    line = json.loads((tmp_path / "bad.jsonl").read_text())
    assert (line["key"], line["reason"]) == (remote.key(5), "no answer in 0.3 s")


def test_stuck_threads_are_replaced_and_end_with_their_read():
    others = {t for t in threading.enumerate() if t.name == "reader"}
    ahead, release = ReadAhead(2), threading.Event()

    def mine() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name == "reader"} - others

    late = ahead.answers(ahead.ask([lambda: bool(release.wait(30))] * 6), 0.2)
    assert all(isinstance(answer, TimeoutError) for answer in late)
    assert ahead.answers(ahead.ask([lambda: 1, lambda: 1 // 0]), 5)[0] == 1
    release.set()
    ahead.close()
    deadline = time.monotonic() + 5
    while mine() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not mine()


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory) -> Index:
    """200 samples, 5 % of them damaged after indexing in four ways."""
    folder = tmp_path_factory.mktemp("corrupt")
    write(folder / "0.tar", range(200))
    build(folder, 1)
    index = Index.open(folder)
    data = bytearray((folder / "0.tar").read_bytes())
    columns = index.columns(np.arange(200))
    for n, row in enumerate(range(7, 200, 20)):
        at, size = int(columns["offset"][row]), int(columns["size"][row])
        damage = (bytes(size), bytes(range(100)), data[at : at + size // 2] + bytes(size - size // 2), b"<html>" * 20)[n % 4]
        data[at : at + len(damage)] = damage
    (folder / "0.tar").write_bytes(data)
    return index


@pytest.mark.parametrize("executor", ["dali", "pillow"])
def test_five_percent_corrupt_images_are_counted_exactly_over_epochs(corrupt, tmp_path, executor):
    ledger = Ledger(tmp_path / "bad.jsonl", 0.06)
    recipe = Recipe((WEAK, STRONG), 16, executor, 1)
    batches = [batch for batch, _ in islice(loader(corrupt, Place(), ledger, recipe, 40), 15)]
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert (ledger.seen, ledger.bad, len(lines)) == (600, 30, 30)
    assert sum(int((~batch.valid).sum()) for batch in batches) == 30
    assert len({line["key"] for line in lines}) == 10
    assert {line["samples"] % 40 for line in lines} == {0}
    resumed = Ledger.resumed(tmp_path / "bad.jsonl", 0.06, 600)
    assert (resumed.seen, resumed.bad) == (600, 30)


def test_a_one_percent_budget_stops_with_one_clear_line(corrupt):
    with pytest.raises(WorkFailed, match=r"of \d+ samples could not be decoded, more than the budget of 1.00%"):
        list(islice(loader(corrupt, Place(), Ledger(None, 0.01), batch=40), 15))


def test_a_vanished_shard_costs_its_samples(corrupt):
    stream = loader(corrupt, Place(url="/nowhere"), Ledger(None, 1.0))
    batch = next(iter(stream))[0]
    assert not batch.valid.any()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["dali", "pillow"])
def test_memory_is_flat_over_epochs_with_bad_images(corrupt, executor):
    """In a process of its own, where nothing else comes and goes."""
    code = f"""
import sys
sys.path.insert(0, "tests")
from test_reader import *
stream = iter(loader(Index.open({str(corrupt.folder)!r}), Place(), Ledger(None, 1.0),
                     Recipe((WEAK, STRONG, STRONG), 160, {executor!r}, 1), 50))
marks = []
for n, _ in enumerate(islice(stream, 72), 1):
    if n % 4 == 0:
        status = Path("/proc/self/status").read_text()
        marks.append(int(next(line for line in status.splitlines() if "RssAnon" in line).split()[1]) // 1024)
print(*marks)  # the stream is left open: the process must end well all the same
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    marks = [int(word) for word in done.stdout.split()]
    assert min(marks[12:]) <= min(marks[:6]) + 20, f"MB after each of 18 epochs: {marks}"


def test_a_copy_that_another_process_removed_is_tried_again(tmp_path):
    data, tries = b"x" * 99, []

    def fetch(name, to):
        tries.append(name)
        to.write_bytes(data)
        if len(tries) == 1:
            to.unlink()

    cache = Cache(tmp_path / "cache", 1000, fetch, [Copied("0.tar", 99, hashlib.sha256(data).hexdigest())])
    for _ in range(100):
        cache.want([0])
        cache._wake.set()
        time.sleep(0.02)
        if cache.path(0).exists():
            break
    cache.close()
    assert len(tries) == 2 and cache.path(0).read_bytes() == data
