"""What a download's workers run: img2dataset's downloader under our rules. Only they import it: it takes seconds."""

import io
import os
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from pipeline.console import WorkFailed
from pipeline.download import COLUMNS, Options
from pipeline.fetch import Failure, Policy, fetch
from pipeline.images import Undecodable, inspect, plain_bytes
from pipeline.survival import DIGITS, shard_files, shard_name, so_far
from pipeline.tars import why_undecodable

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # albumentations phones home when img2dataset imports it

import img2dataset.downloader  # noqa: E402
from img2dataset.resizer import Resizer  # noqa: E402
from img2dataset.writer import WebDatasetSampleWriter  # noqa: E402

_QUALITY = 95


def _shorter_side(data: bytes) -> int:
    """In pixels, from the header alone; 0 where there is none to read."""
    try:
        return min(Image.open(io.BytesIO(data)).size)
    except Exception:  # whatever is wrong with it, the full decode that follows names it
        return 0


class UprightResizer(Resizer):
    """img2dataset's resizer on upright RGB on white; a plain JPEG that needs no resizing is stored byte for byte."""

    def __call__(self, img_stream, blurring_bbox_list=None):
        data = img_stream.getvalue()
        try:
            if _shorter_side(data) <= self.image_size:
                facts = inspect(data)
                if facts.plain:
                    return data, facts.width, facts.height, facts.width, facts.height, None
            upright = io.BytesIO(plain_bytes(data))  # decoded once: OpenCV only copies a PPM
        except Undecodable as error:
            return None, None, None, None, None, f"{why_undecodable(error)}: {error}"
        *result, message = super().__call__(upright, blurring_bbox_list)
        return *result, message and f"broken image: {message}"


class PolicedDownloader(img2dataset.downloader.Downloader):
    """img2dataset's downloader with our fetch; a shard appears under its final name only when it is whole."""

    def __init__(self, policy: Policy, final: Path, **settings):
        super().__init__(**settings)
        self.policy, self.final = policy, final

    def _fetch(self, row, **_):
        key, url = row
        try:
            return key, io.BytesIO(fetch(url, self.policy, self.retries)), None
        except Failure as failure:
            return key, None, str(failure).encode(errors="replace").decode()
        except Exception as error:  # one odd URL must not cost its row
            return key, None, f"other: {type(error).__name__}: {error}"

    def download_shard(self, row) -> None:
        # super() looks this name up in its own module; ours judges each hop and does not repeat the hopeless.
        img2dataset.downloader.download_image_with_retry = self._fetch
        super().download_shard(row)
        scratch, shard = Path(self.output_folder), row[0]
        files = shard_files(scratch, shard)
        expected, _ = so_far(scratch, {shard})
        written = pq.read_metadata(files[1]).num_rows
        if written != expected:  # img2dataset prints and drops a sample that it cannot write
            raise WorkFailed(f"shard {shard_name(shard)}: {expected - written} of {expected} rows could not be written, "
                             f"perhaps the disk of {self.final} is full: run the same command again to go on")
        for path in files:
            path.replace(self.final / path.name)


def download_shard(options: Options, scratch: Path, final: Path, task: tuple[int, str]) -> int:
    """Fetch the rows of one Arrow file into tar, parquet and stats in `scratch`, then move them to `final`.

    task: (number of the shard, Arrow file). Returns the number. Raises WorkFailed when rows are lost in writing.
    """
    resizer = UprightResizer(options.image_size, "keep_ratio", resize_only_if_bigger=True, encode_quality=_QUALITY)
    PolicedDownloader(
        options.policy(), final, sample_writer_class=WebDatasetSampleWriter, resizer=resizer,
        thread_count=options.threads, save_caption=True, extract_exif=False, output_folder=str(scratch),
        column_list=list(COLUMNS), timeout=options.timeout, number_sample_per_shard=options.shard_size,
        oom_shard_count=DIGITS, compute_hash="sha256", verify_hash_type=None, encode_format="jpg",
        retries=options.retries, user_agent_token=None, disallowed_header_directives=None).download_shard(task)
    return task[0]
