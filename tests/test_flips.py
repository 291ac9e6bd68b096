"""One flipped bit: `verify` names the file, and who uses it refuses, makes it again, or gets what was written."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, command, encoded, picture
from shards import drawing, write_set
from test_cache import stub
from test_download import HERE
from tiny import tiny_run
from webserver import serving

import pipeline.verify
from evaluation.cache import Cache
from evaluation.curves import read_metrics
from evaluation.results import append_rows, read_rows
from pipeline.choice import Choice
from pipeline.console import InputError, WorkFailed
from pipeline.download import Options, download
from pipeline.duplicates import duplicates
from pipeline.evalsets import open_evalset, write_evalset
from pipeline.index import Index
from pipeline.indexing import build
from pipeline.ledger import Ledger
from pipeline.loader import Loader
from pipeline.recipe import Cursor, Recipe
from pipeline.sampling import WEAK
from pipeline.scans import scan_path
from pipeline.skips import Forgotten
from pipeline.sources import write_urls
from pipeline.stores import Store
from pipeline.survival import account
from pipeline.takedown import Takedown, forget
from pipeline.verify import verify
from trainer import checkpoint

SAMPLES, TAIL = 24, 1500  # of an Arrow or Parquet file: its footer and what says where things are


@dataclass(frozen=True)
class Kind:
    """A file, the part of it to flip bits in, the folder to verify, and what a command gets from it."""

    file: Path
    root: Path
    use: Callable[[], Any]
    part: tuple[int | None, int | None] = (None, None)


def contents(folder: Path) -> Callable[[], Any]:
    """All that training gets from an index."""
    def read():
        index = Index.open(folder)
        columns = index.columns(np.arange(len(index)))
        return ({name: column.tolist() for name, column in columns.items()}, index.shards, index.fingerprint,
                [(index.key(row), index.captions(row), index.source(row)) for row in range(len(index))])
    return read


def indexed_again(folder: Path) -> Callable[[], Any]:
    def read():
        manifest = build(folder, 1)
        return manifest["counts"], manifest["fingerprint"], manifest["shards"]
    return read


def downloaded(folder: Path) -> Path:
    """A finished download of a few pictures, and its table."""
    with serving() as site:
        site.pages.update({f"/{number}.jpg": encoded(drawing(number)) for number in range(6)})
        lines = [f"{site.url(f'/{n}.jpg')},caption {n}\n" for n in range(7)]
        (folder / "urls.csv").write_text("".join(["url,caption\n", *lines]))
        table = folder / "urls.parquet"
        write_urls(folder / "urls.csv", table, Choice("url", ("caption",)))
        download(table, folder / "out", Options(shard_size=10, allow_address=HERE, distributor="inline", threads=2, retries=0))
    return folder / "out"


def table_of(path: Path) -> Callable[[], Any]:
    from pipeline.download import _slices, _table
    return lambda: [rows.to_pylist() for rows in _slices(_table(path), 3)]


def features(folder: Path) -> Callable[[], Any]:
    def read():
        found = Cache(folder / "features").images(stub(), open_evalset(folder / "set"))
        return found.h_NW.tolist(), found.targets
    return read


@pytest.fixture(scope="module")
def kinds(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("flips")
    pictures = [(encoded(drawing(n % 20)), {"captions": [f"picture {n}", "é"], "url": f"http://a/{n}"}) for n in range(SAMPLES)]
    index = write_set(folder / "index", pictures, per_tar=12)
    forget(index, Takedown(ids=frozenset(range(40)), hashes=frozenset(f"{n:064x}" for n in range(40))))
    build(index, 1)
    duplicates(Index.open(index), 4, 1)
    out, run = downloaded(folder), tiny_run(scenes, folder / "run")
    append_rows(run / "results.jsonl", [{"metric": "accuracy", "value": n / 7, "dataset": f"set {n}"} for n in range(5)])
    labelled = [(encoded(picture(i)), i % 3) for i in range(20)]
    write_evalset(folder / "features-of/set", "test", labelled, "classification", "abc")
    cached = features(folder / "features-of")
    cached()
    entry, = (folder / "features-of/features").iterdir()
    latest = checkpoint.find(run)

    def whole() -> Any:
        return checkpoint.read_state(latest)

    return {
        "tar": Kind(index / "00000.tar", index, lambda: None),
        "index.arrow": Kind(index / "index.arrow", index, contents(index), (0, -TAIL)),
        "its footer": Kind(index / "index.arrow", index, contents(index), (-TAIL, None)),
        "manifest.json": Kind(index / "manifest.json", index, contents(index)),
        "cached scan": Kind(scan_path(index, "00001.tar"), index, indexed_again(index)),
        "urls.parquet": Kind(folder / "urls.parquet", folder, table_of(folder / "urls.parquet")),
        "forgotten.parquet": Kind(index / "forgotten.parquet", index, lambda: Forgotten.read(index / "forgotten.parquet")),
        "a shard's table": Kind(out / "00000.parquet", out, lambda: account(Store(out), 7, 10)),
        "a shard's stats": Kind(out / "00000_stats.json", out, lambda: account(Store(out), 7, 10)),
        "metrics.jsonl": Kind(run / "metrics.jsonl", run, lambda: read_metrics(run / "metrics.jsonl")),
        "results.jsonl": Kind(run / "results.jsonl", run, lambda: read_rows(run / "results.jsonl")),
        "model.safetensors": Kind(latest / "model.safetensors", run, whole),
        "optimizer.pt": Kind(latest / "optimizer.pt", run, whole),
        "state.json": Kind(latest / "state.json", run, whole),
        "features": Kind(entry / "h.f32", folder / "features-of", cached),
        "their meta.json": Kind(entry / "meta.json", folder / "features-of", cached),
    }


def flipped(data: bytes, part: tuple[int | None, int | None], rng: random.Random) -> bytes:
    places = range(len(data))[slice(*part)] or range(len(data))
    changed = bytearray(data)
    changed[rng.choice(places)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def drill(kind: Kind, times: int, seed: int) -> Counter[str]:
    """What became of each flip. An error that is not ours ends the test."""
    kept, ends, rng = kind.root.with_name(f"{kind.root.name}.kept"), Counter(), random.Random(seed)
    written, data = kind.use(), kind.file.read_bytes()
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(kind.root, kept, symlinks=True)
    for _ in range(times):
        stat = kind.file.stat()
        kind.file.write_bytes(flipped(data, kind.part, rng))
        os.utime(kind.file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk flips bits
        assert kind.file in {fault.path for fault in verify(kind.root, 1).faults}
        try:
            assert kind.use() == written
            ends["as written"] += 1
        except (InputError, WorkFailed) as error:
            assert str(kind.file.parent) in str(error) and "\n" not in str(error)
            ends["refused"] += 1
        shutil.copytree(kept, kind.root, dirs_exist_ok=True)
    assert not verify(kind.root, 1).faults
    return ends


NAMES = ("tar", "index.arrow", "its footer", "manifest.json", "cached scan", "urls.parquet", "forgotten.parquet",
         "a shard's table", "a shard's stats", "metrics.jsonl", "results.jsonl", "model.safetensors", "optimizer.pt",
         "state.json", "features", "their meta.json")
MADE_AGAIN = {"tar", "cached scan", "features", "their meta.json"}  # of a tar only `verify` can know


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_named_and_changes_no_result(kinds: dict[str, Kind], name: str) -> None:
    assert drill(kinds[name], 2, 1) == {"as written" if name in MADE_AGAIN else "refused": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_twenty_flipped_bits_are_named_and_change_no_result(kinds: dict[str, Kind], name: str) -> None:
    assert drill(kinds[name], 20, 2) == {"as written" if name in MADE_AGAIN else "refused": 20}


def test_training_takes_no_picture_that_has_changed(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes / "train", tmp_path / "set")
    index = Index.open(tmp_path / "set")
    at = {name: int(column[0]) for name, column in index.columns(np.array([70])).items()}
    data = bytearray((tar := tmp_path / "set" / index.shards[at["shard"]]).read_bytes())
    data[at["offset"] + at["size"] * 3 // 4] ^= 1  # it can be decoded all the same
    tar.write_bytes(data)
    stream = Loader(index, lambda texts: np.zeros((len(texts), 4), np.int64), Recipe((WEAK,), 32, "pillow", 1),
                    Cursor(5, 0, index.fingerprint, ""), len(index), ledger=Ledger(tmp_path / "bad.jsonl", budget=1.0))
    (batch, _), line = next(iter(stream)), (tmp_path / "bad.jsonl").read_text()
    assert batch.sample_id[~batch.valid].tolist() == [at["sample_id"]]
    assert index.key(70) in line and "its bytes are not those that were indexed" in line


def test_an_index_of_an_older_version_opens_and_verify_says_how_it_gets_checksums(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests/written_before", tmp_path / "set")
    index = Index.open(tmp_path / "set")
    assert index.fingerprint == "6b8c5db39287a2e6171976d78ea4d70e64b2a936f9536443b8b124e536d4d2f5"
    assert index.captions(5) == ["picture 5", "another"] and index.columns(np.arange(6))["group"].max() > 0
    assert Forgotten.read(tmp_path / "set/forgotten.parquet").ids == {5: "takedown"}
    done = command("uniclip-data", "verify", tmp_path / "set")
    assert done.returncode == 0 and "`uniclip-data index` gives them one" in done.stdout, done.stderr
    command("uniclip-data", "index", tmp_path / "set")
    again = Index.open(tmp_path / "set")
    assert again.file.sealed and again.fingerprint == index.fingerprint
    assert again.columns(np.arange(6))["image_sum"].all() and again.columns(np.arange(6))["group"].max() > 0
    assert "`uniclip-data index`" not in command("uniclip-data", "verify", tmp_path / "set").stdout


def test_verify_ends_with_1_and_names_file_and_cure(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [(encoded(drawing(n)), {"caption": "a"}) for n in range(4)], per_tar=2)
    assert command("uniclip-data", "verify", folder).returncode == 0
    (folder / "00000.tar").unlink()
    with (folder / "00001.tar").open("r+b") as tar:
        tar.seek(600)
        tar.write(b"!")
    done = command("uniclip-data", "verify", folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{folder}/00000.tar  is missing, manifest.json tells of it" in done.stdout
    assert "put a copy back" in done.stdout and "2  of 7 files" in done.stdout
    assert command("uniclip-data", "verify", tmp_path / "nowhere").returncode == 2


def test_verify_names_a_file_that_cannot_be_read_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(tmp_path / "set", [(encoded(drawing(n)), {"caption": "a"}) for n in range(4)], per_tar=2)
    real = pipeline.verify.sha256_of

    def broken(path: Path) -> str:
        if path.name == "00000.tar":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(pipeline.verify, "sha256_of", broken)
    found = verify(folder, 1)
    assert [(fault.path.name, fault.found) for fault in found.faults] == [("00000.tar", "cannot be read: Input/output error")]
