"""What a download's workers run: img2dataset's downloader under our rules. Only they import it: it takes seconds."""

import hashlib
import io
import json
import os
import tempfile
import threading
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from pipeline.console import WorkFailed
from pipeline.download import COLUMNS, Options, Task
from pipeline.fetch import Failure, fetch
from pipeline.files import sha256_of
from pipeline.images import Undecodable, inspect, plain_bytes
from pipeline.robots import Robots
from pipeline.seals import write_sealed_json
from pipeline.stores import Store
from pipeline.survival import DIGITS, FORGOTTEN, SUFFIXES, SUMS, shard_files, shard_name, so_far
from pipeline.tars import why_undecodable

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # albumentations phones home when img2dataset imports it

import img2dataset.downloader  # noqa: E402
from img2dataset.resizer import Resizer  # noqa: E402
from img2dataset.writer import WebDatasetSampleWriter  # noqa: E402

_QUALITY = 95
_LARGE_AT_ONCE = 4  # bodies of more than fetch.LARGE bytes that a process may hold


def _is_one_of(data: bytes, sums: frozenset[str]) -> bool:
    return bool(sums) and hashlib.sha256(data).hexdigest() in sums


def _shorter_side(data: bytes) -> int:
    """In pixels, from the header alone; 0 where there is none to read."""
    try:
        return min(Image.open(io.BytesIO(data)).size)
    except Exception:  # whatever is wrong with it, the full decode that follows names it
        return 0


class UprightResizer(Resizer):
    """img2dataset's resizer on upright RGB on white; a plain JPEG that needs no resizing is stored byte for byte.

    What has a sha256 in `forgotten` is not stored.
    """

    def __init__(self, *args, forgotten: frozenset[str] = frozenset(), **settings):
        super().__init__(*args, **settings)
        self.forgotten = forgotten

    def __call__(self, img_stream, blurring_bbox_list=None):
        image, *told = self._resized(img_stream, blurring_bbox_list)
        return (None, *told[:-1], FORGOTTEN) if image and _is_one_of(image, self.forgotten) else (image, *told)

    def _resized(self, img_stream, blurring_bbox_list):
        data = img_stream.getvalue()
        try:
            if self.encode_format == "jpg" and _shorter_side(data) <= self.image_size:
                facts = inspect(data)
                if facts.plain:
                    return data, facts.width, facts.height, facts.width, facts.height, None
            upright = io.BytesIO(plain_bytes(data))  # decoded once: OpenCV only copies a PPM
        except Undecodable as error:
            return None, None, None, None, None, f"{why_undecodable(error)}: {error}"
        *result, message = super().__call__(upright, blurring_bbox_list)
        return *result, message and f"broken image: {message}"


class _Seat:
    """One of the few places for large bodies, taken when a body turns out to be large."""

    def __init__(self, seats: threading.BoundedSemaphore):
        self._seats, self._taken = seats, False

    def take(self) -> None:
        if not self._taken:
            self._seats.acquire()
            self._taken = True

    def leave(self) -> None:
        if self._taken:
            self._taken = False
            self._seats.release()


class _Body(io.BytesIO):
    """A fetched body, which leaves its seat when img2dataset is done with it."""

    def __init__(self, data: bytes, seat: _Seat):
        super().__init__(data)
        self._seat = seat

    def close(self) -> None:
        self._seat.leave()
        super().close()


class PolicedDownloader(img2dataset.downloader.Downloader):
    """img2dataset's downloader with our fetch."""

    def __init__(self, options: Options, task: Task, **settings):
        super().__init__(**settings)
        self.policy, self.task = options.policy(), task
        self.judge = Robots(self.policy).judge if options.robots else None
        self.seats = threading.BoundedSemaphore(_LARGE_AT_ONCE)

    def _fetch(self, row, **_):
        key, url = row
        if url in self.task.forgotten:
            return key, None, FORGOTTEN
        seat = _Seat(self.seats)
        try:
            data = fetch(url, self.policy, self.retries, self.judge, seat.take)
            if not _is_one_of(data, self.task.hashes):
                return key, _Body(data, seat), None
            message = FORGOTTEN
        except Failure as failure:
            message = str(failure).encode(errors="replace").decode()
        except Exception as error:  # one odd URL must not cost its row
            message = f"other: {type(error).__name__}: {error}"
        seat.leave()
        return key, None, message

    def download_shard(self, row) -> None:
        # super() looks this name up in its own module; ours judges each hop and does not repeat the hopeless.
        img2dataset.downloader.download_image_with_retry = self._fetch
        super().download_shard(row)


def download_shard(options: Options, out: Store, scratch: str | None, task: Task) -> int:
    """Fetch the rows of one task into tar, parquet and stats under `scratch`, then move them to `out`.

    scratch: a folder on the same disk as a local `out`. Returns the shard's number. Raises WorkFailed when rows are lost
    in writing.
    """
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        rows = Path(folder, f"{task.shard}.arrow")
        rows.write_bytes(task.rows)
        resizer = UprightResizer(options.image_size, "keep_ratio", resize_only_if_bigger=True, encode_quality=_QUALITY,
                                 encode_format=options.format, forgotten=task.hashes)
        PolicedDownloader(
            options, task, sample_writer_class=WebDatasetSampleWriter, resizer=resizer,
            thread_count=options.threads, save_caption=True, extract_exif=False, output_folder=folder,
            column_list=list(COLUMNS), timeout=options.timeout, number_sample_per_shard=options.shard_size,
            oom_shard_count=DIGITS, compute_hash="sha256", verify_hash_type=None, encode_format=options.format,
            retries=options.retries, user_agent_token=None, disallowed_header_directives=None,
        ).download_shard((task.shard, str(rows)))
        files = [Path(folder, name) for name in shard_files(task.shard)]
        expected, _ = so_far(Store(folder), [task.shard])
        written = pq.read_metadata(files[1]).num_rows
        if written != expected:  # img2dataset prints and drops a sample that it cannot write
            raise WorkFailed(f"shard {shard_name(task.shard)}: {expected - written} of {expected} rows could not be "
                             f"written, perhaps the disk of {out} is full: run the same command again to go on")
        stats = json.loads(files[2].read_bytes())
        sums = {suffix: sha256_of(path) for suffix, path in zip(SUFFIXES[:2], files[:2], strict=True)}
        write_sealed_json(files[2], {**stats, SUMS: sums})
        for path in files:
            out.take(path)
    return task.shard
