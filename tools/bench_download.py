"""Our download against plain img2dataset, same settings, same loopback server, interleaved runs.

    python -m tools.bench_download --urls 2000 --rounds 3

Target: at least 0.95 × its rate. Ours also judges every address, parses opt-outs, decodes twice what it must not trust.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from PIL import Image

from pipeline.schema import URLS, sample_id_of
from tools.demo import serve

_PLAIN = """
import sys, json
from img2dataset import download
if __name__ == "__main__":
    download(**json.loads(sys.argv[1]))
"""


def _pictures(folder: Path, count: int, side: int) -> None:
    """Smooth random photographs, most a little larger than what is kept, as on the web."""
    random = np.random.default_rng(0)
    for number in range(count):
        small = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.jpg", quality=90)


def _table(path: Path, urls: list[str]) -> None:
    rows = [{"url": url, "captions": ["a caption"], "source": "bench", "source_row": number, "sample_id": sample_id_of(url)}
            for number, url in enumerate(urls, 1)]
    pq.write_table(pa.Table.from_pylist(rows, schema=URLS), path)
    pq.write_table(pa.table({"url": urls, "caption": ["a caption"] * len(urls)}), path.with_suffix(".plain.parquet"))


def _timed(words: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - began


def _ours(table: Path, out: Path, processes: int, threads: int, size: int) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", "download", str(table), str(out), "--processes", str(processes),
            "--threads", str(threads), "--shard-size", "500", "--image-size", str(size), "--allow-address", "127.0.0.1"]


def _theirs(table: Path, out: Path, processes: int, threads: int, size: int) -> list[str]:
    settings = {"url_list": str(table.with_suffix(".plain.parquet")), "input_format": "parquet", "url_col": "url",
                "caption_col": "caption", "output_format": "webdataset", "output_folder": str(out), "image_size": size,
                "resize_mode": "keep_ratio", "resize_only_if_bigger": True, "encode_quality": 95,
                "processes_count": processes, "thread_count": threads, "number_sample_per_shard": 500,
                "extract_exif": False, "retries": 1, "timeout": 10}
    return [sys.executable, "-c", _PLAIN, json.dumps(settings)]


def _stored(out: Path) -> int:
    return sum(json.loads(path.read_text(encoding="utf-8"))["successes"] for path in out.glob("*_stats.json"))


def main(
    urls: Annotated[int, typer.Option(help="Pictures to fetch.")] = 2_000,
    rounds: Annotated[int, typer.Option(help="Runs of each, interleaved.")] = 3,
    side: Annotated[int, typer.Option(help="Shorter side of the pictures.")] = 384,
    size: Annotated[int, typer.Option(help="Shorter side that is kept.")] = 256,
    processes: Annotated[int, typer.Option()] = 2,
    threads: Annotated[int, typer.Option()] = 32,
    port: Annotated[int, typer.Option(help="Of the file server on 127.0.0.1.")] = 8391,
) -> None:
    """Print both rates and their ratio; the medians of interleaved runs."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "pictures").mkdir()
        _pictures(folder / "pictures", min(urls, 200), side)
        server = serve(folder / "pictures", port)
        _table(folder / "u.parquet", [f"http://127.0.0.1:{port}/{number % 200}.jpg?{number}" for number in range(urls)])
        seconds: dict[str, list[float]] = {"uniclip-data": [], "img2dataset": []}
        for turn in range(rounds):
            for name, words in (("uniclip-data", _ours), ("img2dataset", _theirs)):
                out = folder / f"{name}{turn}"
                seconds[name].append(_timed(words(folder / "u.parquet", out, processes, threads, size)))
                if _stored(out) != urls:
                    sys.exit(f"{name} stored {_stored(out)} of {urls}")
                shutil.rmtree(out)
        server.shutdown()
    rates = {name: urls / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:14} {rate:8.1f} images/s, seconds of each run: {', '.join(f'{s:.1f}' for s in seconds[name])}")
    print(f"ratio          {rates['uniclip-data'] / rates['img2dataset']:8.2f}  (target 0.95)")


if __name__ == "__main__":
    typer.run(main)
