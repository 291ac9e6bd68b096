"""An index of 30 million samples, made up without images: how fast it opens, what it costs, how long a lookup takes.

    python -m tools.bench_index --samples 30000000 --folder /tmp/big

Targets: opens in < 2 s, < 300 MB of private memory, warm random lookup ≤ 50 µs (median).
"""

import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer

from pipeline import arrows
from pipeline.index import INDEX_NAME, MANIFEST_NAME, Index
from pipeline.schema import INDEX, INDEX_BATCH_ROWS, SCHEMA_VERSION
from pipeline.seals import write_sealed_json

_PER_SHARD = 10_000
_WORDS = ["photo", "of", "a", "dog", "on", "the", "beach", "at", "sunset", "with", "red", "car"]


def make(folder: Path, samples: int) -> None:
    """Write an index.arrow and its manifest; the tars they speak of are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [f"{number:05}.tar" for number in range(-(-samples // _PER_SHARD))]
    dictionary, sources = pa.array(shards), pa.array(["cc3m", "cc12m", "yfcc15m-v2"])
    random = np.random.default_rng(0)
    arrows.write(folder / INDEX_NAME, INDEX, (
        _batch(np.arange(start, min(start + INDEX_BATCH_ROWS, samples)), dictionary, sources, random)
        for start in range(0, samples, INDEX_BATCH_ROWS)))
    counts = np.bincount(np.arange(samples) // _PER_SHARD)
    write_sealed_json(folder / MANIFEST_NAME, {
        "schema_version": SCHEMA_VERSION, "counts": {"samples": samples, "merged": 0, "excluded": {}},
        "fingerprint": "0" * 64, "sources": sources.to_pylist(), "created_by": {}, "shards": [
            {"name": name, "size": 0, "sha256": "0" * 64, "samples": int(count)}
            for name, count in zip(shards, counts, strict=True)]})


def _batch(rows: np.ndarray, shards: pa.Array, sources: pa.Array, random: np.random.Generator) -> pa.RecordBatch:
    count = len(rows)
    texts = [" ".join(_WORDS[i] for i in words) for words in random.integers(0, len(_WORDS), (count, 9))]
    columns = {
        "shard": pa.DictionaryArray.from_arrays(pa.array((rows // _PER_SHARD).astype(np.int32)), shards),
        "key": pa.array([f"{row:09}" for row in rows % _PER_SHARD]), "offset": pa.array(rows % _PER_SHARD * 32_768),
        "size": pa.array(random.integers(5_000, 60_000, count)), "width": pa.array(np.full(count, 341, np.int32)),
        "height": pa.array(np.full(count, 256, np.int32)), "plain": pa.array(np.ones(count, bool)),
        "captions": pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32)), pa.array(texts)),
        "sample_id": pa.array(random.integers(0, 2**63 - 1, count)), "group": pa.array(np.full(count, -1)),
        "source": pa.DictionaryArray.from_arrays(pa.array((rows % 3).astype(np.int16)), sources),
        "image_sum": pa.array(random.integers(1, 2**63 - 1, count))}
    return pa.record_batch([columns[name] for name in INDEX.names], schema=INDEX)


def private_mb() -> float:
    """RssAnon of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) / 1000 if found else float("nan")


def measure(folder: Path, lookups: int) -> None:
    """In a process of its own: open, look up, print."""
    before, began = private_mb(), time.perf_counter()
    index = Index.open(folder)
    opened = time.perf_counter() - began
    rows = np.random.default_rng(1).integers(0, len(index), lookups)
    for row in rows:  # warm: every batch's views made, its pages in memory
        index.columns(rows[:1])
        index.captions(int(row))
    times = []
    for row in rows:
        start = time.perf_counter()
        index.columns(np.array([row]))
        index.captions(int(row))
        times.append(time.perf_counter() - start)
    print(f"{len(index):,} samples: opened in {opened:.3f} s, {private_mb() - before:.0f} MB more of private memory "
          f"({private_mb():.0f} MB in all), warm random lookup of columns and captions "
          f"{1e6 * statistics.median(times):.0f} µs (median)")


def main(
    samples: Annotated[int, typer.Option(help="Rows of the index.")] = 30_000_000,
    folder: Annotated[Path, typer.Option(help="Where it is made; removed afterwards.")] = Path("big-index"),
    lookups: Annotated[int, typer.Option(help="Random rows looked up.")] = 20_000,
    only_measure: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Make it, measure it in a fresh process, remove it."""
    if only_measure:
        measure(folder, lookups)
        return
    began = time.perf_counter()
    make(folder, samples)
    size = (folder / INDEX_NAME).stat().st_size
    print(f"made {size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s", flush=True)
    subprocess.run([sys.executable, "-m", "tools.bench_index", "--only-measure", "--folder", str(folder), "--lookups",
                    str(lookups)], check=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    typer.run(main)
