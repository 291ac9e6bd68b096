"""What a download's workers run: img2dataset's downloader under our rules. Only they import it: it takes seconds."""

import hashlib
import io
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq

from pipeline.console import WorkFailed, what_failed
from pipeline.download import COLUMNS, Options, Task
from pipeline.fetch import Failure, fetch
from pipeline.files import sha256_of
from pipeline.images import Undecodable, header, inspect, plain_bytes
from pipeline.processes import allow_files
from pipeline.robots import Robots
from pipeline.seals import write_sealed_json
from pipeline.stores import Store
from pipeline.survival import DIGITS, FORGOTTEN, SUFFIXES, SUMS, shard_files, shard_name, so_far
from pipeline.tars import why_undecodable

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # albumentations phones home when img2dataset imports it


@contextmanager
def _without_what_is_not_used() -> Iterator[None]:
    """Within, torch, wandb and Ray are as good as not installed, unless they are loaded already.

    img2dataset imports them all, webdataset's writer by way of torch; a worker uses none, and they take 600 MB of each.
    """
    before = set(sys.modules)
    hidden = {"torch", "wandb", "ray"} - before
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: importing it raises ModuleNotFoundError
    if "wandb" in hidden:
        sys.modules["wandb"] = ModuleType("wandb")  # img2dataset does not do without the name
    try:
        yield
    finally:
        mine = {name for name in set(sys.modules) - before if name.partition(".")[0] in {"img2dataset", "webdataset"}}
        for name in hidden | mine:  # who imports them later in this process gets them whole
            sys.modules.pop(name, None)


with _without_what_is_not_used():
    import img2dataset.downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

_QUALITY = 95
_LARGE_AT_ONCE = 4  # bodies of more than fetch.LARGE bytes that a process may hold
_NO_MEMORY = re.compile(r"^$|memory|allocate", re.IGNORECASE)  # what OpenCV and Python say then
_NO_FILES = re.compile(r"\[Errno (\d+)]")  # img2dataset opens /dev/null for each picture


def _is_one_of(data: bytes, sums: frozenset[str]) -> bool:
    return bool(sums) and hashlib.sha256(data).hexdigest() in sums


def _shorter_side(data: bytes) -> int:
    """In pixels, from the header alone; 0 where there is none to read."""
    try:
        return min(header(data))
    except Undecodable:  # the full decode that follows names it
        return 0


class _Trouble:
    """The first error of this machine or of ours. img2dataset would print it and lose or blame the row."""

    first: Exception | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within, what is raised is kept."""
        try:
            yield
        except Exception as error:
            self.first = self.first or error
            raise


class _Writer(WebDatasetSampleWriter):
    def __init__(self, trouble: _Trouble, *args):
        super().__init__(*args)
        self._trouble = trouble

    def write(self, *args):
        with self._trouble.noted():
            super().write(*args)


class UprightResizer(Resizer):
    """img2dataset's resizer on upright RGB on white; a plain JPEG that needs no resizing is stored byte for byte.

    What has a sha256 in `forgotten` is not stored.
    """

    def __init__(self, *args, trouble: _Trouble, forgotten: frozenset[str] = frozenset(), **settings):
        super().__init__(*args, **settings)
        self.trouble, self.forgotten = trouble, forgotten

    def __call__(self, img_stream, blurring_bbox_list=None):
        with self.trouble.noted():
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
        if message is not None and (found := _NO_FILES.search(message)):
            raise OSError(int(found[1]), os.strerror(int(found[1])))
        if message is not None and _NO_MEMORY.search(message):
            raise MemoryError(message)
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

    def __init__(self, options: Options, task: Task, trouble: _Trouble, **settings):
        super().__init__(**settings)
        self.policy, self.task, self.trouble = options.policy(), task, trouble
        self.judge = Robots(self.policy).judge if options.robots else None
        self.seats = threading.BoundedSemaphore(_LARGE_AT_ONCE)

    def _fetch(self, row, **_):
        key, url = row
        if self.trouble.first:
            return key, None, "stopped"  # the shard is thrown away
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
        except (OSError, MemoryError) as error:  # what servers do is a Failure
            self.trouble.first = self.trouble.first or error
            message = "stopped"
        except Exception as error:  # one odd URL must not cost its shard
            message = f"other: {type(error).__name__}: {error}"
        seat.leave()
        return key, None, message

    def download_shard(self, row) -> None:
        # super() looks this name up in its own module; ours judges each hop and does not repeat the hopeless.
        img2dataset.downloader.download_image_with_retry = self._fetch
        super().download_shard(row)


def download_shard(options: Options, out: Store, scratch: str | None, task: Task) -> int:
    """Fetch the rows of one task into tar, parquet and stats under `scratch`, then move them to `out`.

    scratch: a folder on the same disk as a local `out`. Returns the shard's number. Raises WorkFailed for trouble of this
    machine: a full disk, want of memory or of open files.
    """
    allow_files(options.threads)
    trouble = _Trouble()
    try:
        return _downloaded(options, out, scratch, task, trouble)
    except (OSError, MemoryError) as error:
        raise WorkFailed(what_failed(trouble.first or error, out.url if scratch else tempfile.gettempdir(),
                                     "run the same command again to go on")) from error


def _downloaded(options: Options, out: Store, scratch: str | None, task: Task, trouble: _Trouble) -> int:
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        rows = Path(folder, f"{task.shard}.arrow")
        rows.write_bytes(task.rows)
        resizer = UprightResizer(options.image_size, "keep_ratio", resize_only_if_bigger=True, encode_quality=_QUALITY,
                                 encode_format=options.format, trouble=trouble, forgotten=task.hashes)
        PolicedDownloader(
            options, task, trouble, sample_writer_class=partial(_Writer, trouble), resizer=resizer,
            thread_count=options.threads, save_caption=True, extract_exif=False, output_folder=folder,
            column_list=list(COLUMNS), timeout=options.timeout, number_sample_per_shard=options.shard_size,
            oom_shard_count=DIGITS, compute_hash="sha256", verify_hash_type=None, encode_format=options.format,
            retries=options.retries, user_agent_token=None, disallowed_header_directives=None,
        ).download_shard((task.shard, str(rows)))
        if trouble.first:
            raise trouble.first
        files = [Path(folder, name) for name in shard_files(task.shard)]
        expected, _ = so_far(Store(folder), [task.shard])
        written = pq.read_metadata(files[1]).num_rows
        if written != expected:
            raise WorkFailed(f"shard {shard_name(task.shard)} of {out}: {expected - written} of {expected} rows were not "
                             "written: run the same command again to go on")
        stats = json.loads(files[2].read_bytes())
        sums = {suffix: sha256_of(path) for suffix, path in zip(SUFFIXES[:2], files[:2], strict=True)}
        write_sealed_json(files[2], {**stats, SUMS: sums})
        for path in files:
            out.take(path)
    return task.shard
