"""Real img2dataset against a real server: every URL accounted for, upright RGB on white, resumable after kill -9."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import command, encoded, picture
from PIL import Image
from webserver import serving

from pipeline.console import InputError
from pipeline.download import Options, download
from pipeline.images import upright_rgb
from pipeline.index import Index
from pipeline.indexing import build
from pipeline.schema import URLS, sample_id_of
from pipeline.survival import Report

HERE = ("127.0.0.1",)
PLAIN = 30


def url_table(path: Path, urls: list[str]) -> Path:
    rows = [{"url": url, "captions": [f"caption of {number}", f"other – {number}"], "source": "test", "source_row": number,
             "sample_id": sample_id_of(url)} for number, url in enumerate(urls, start=1)]
    pq.write_table(pa.Table.from_pylist(rows, schema=URLS), path)
    return path


def _transparent() -> Image.Image:
    image = picture(1).convert("RGBA")
    image.putalpha(Image.fromarray(np.linspace(0, 255, 80 * 60).reshape(60, 80).astype(np.uint8)))
    return image


def _rotated(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, quality=95, exif=exif)


def pages() -> dict:
    """Everything that can be stored."""
    palette = picture(2).quantize(16)
    return {
        **{f"/plain/{i}.jpg": encoded(picture(i), quality=90) for i in range(PLAIN)},
        "/large.jpg": encoded(picture(3, 600, 400), quality=95),
        "/rotated.jpg": _rotated(picture(4), 6),
        "/rotated-large.jpg": _rotated(picture(4, 600, 400), 8),
        "/transparent.png": encoded(_transparent(), "PNG"),
        "/palette.png": encoded(palette, "PNG", transparency=0),
        "/sixteen-bit.png": encoded(Image.fromarray(np.linspace(0, 65535, 4800).reshape(60, 80).astype(np.uint16)), "PNG"),
        "/cmyk.jpg": encoded(picture(5).convert("CMYK"), quality=95),
        "/grey-large.jpg": encoded(picture(6, 400, 300).convert("L"), quality=95),
        "/animated.webp": encoded(picture(7), "WEBP", save_all=True, append_images=[picture(8)], lossless=True),
        "/ü ü.jpg": encoded(picture(9), quality=90),
    }


FAILURES = {  # path → (answer, class)
    "/missing": ((404, {}, b""), "http 404"),
    "/gone": ((410, {}, b""), "http 410"),
    "/page": ((200, {"Content-Type": "image/jpeg"}, b"<html>sorry</html>"), "not an image"),
    "/empty": (b"", "not an image"),
    "/truncated": (encoded(picture(0, 300, 300))[:3000], "broken image"),
    "/optout": ((200, {"X-Robots-Tag": "noai, max-snippet:20"}, encoded(picture(0))), "opted out"),
    "/optout2": ((200, {"X-Robots-Tag": "otherbot: all\nuniclip: none"}, encoded(picture(0))), "opted out"),
    "/huge": ((200, {"Content-Length": "99999999999"}, b""), "too large"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One download of everything; gives (folder, report, site, private site, table, pages)."""
    folder = tmp_path_factory.mktemp("download")
    with serving() as site, serving("127.0.0.2") as private, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        good = pages()
        site.pages.update(good, **{path: answer for path, (answer, _) in FAILURES.items()})
        site.pages["/hop"] = 302, {"Location": private.url("/secret")}, b""
        urls = [site.url(path) for path in [*good, *FAILURES, "/hop"]]
        urls += ["file:///etc/passwd", f"http://127.0.0.1:{closed.getsockname()[1]}/", "http://no-such-host.invalid/a.jpg"]
        table = url_table(folder / "urls.parquet", urls)
        options = Options(shard_size=16, processes=2, threads=8, timeout=5, allow_address=HERE)
        report = download(table, folder / "shards", options)
        yield folder / "shards", report, site, private, table, good


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """URL → suffix → bytes of every sample in the tars."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".", 1)
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    by_url = {json.loads(sample["json"])["url"]: sample for sample in found.values()}
    assert len(by_url) == len(found), "a URL was stored twice"
    return by_url


def test_every_url_is_accounted_for(run):
    folder, report, _, private, table, good = run
    expected: dict[str, int] = {"refused address": 1, "refused scheme": 1, "connection refused": 1, "dns": 1}
    for _, reason in FAILURES.values():
        expected[reason] = expected.get(reason, 0) + 1
    assert report.failed == expected
    assert report.stored == len(good)
    assert report.rows == pq.read_metadata(table).num_rows == report.stored + sum(report.failed.values())
    written = json.loads((folder / "download.json").read_text())
    assert (written["rows"], written["stored"], written["failed"]) == (report.rows, report.stored, report.failed)
    assert written["settings"]["image_size"] == 256
    assert written["versions"]["img2dataset"]
    assert private.connections == 0


def test_nothing_is_lost_and_ids_and_captions_arrive(run):
    folder, _, site, _, table, good = run
    found = samples(folder)
    rows = {row["url"]: row for row in pq.read_table(table).to_pylist()}
    assert set(found) == {site.url(path) for path in good}
    for url, sample in found.items():
        told = json.loads(sample["json"])
        assert {name: told[name] for name in ("sample_id", "captions", "source")} == {
            name: rows[url][name] for name in ("sample_id", "captions", "source")}
        assert sample["txt"].decode() == rows[url]["captions"][0]


def test_images_are_upright_rgb_on_white(run):
    folder, _, site, _, _, good = run
    found = samples(folder)
    for path, original in good.items():
        stored = Image.open(io.BytesIO(found[site.url(path)]["jpg"]))
        assert stored.format == "JPEG"
        assert stored.getexif().get(0x0112, 1) == 1, path
        expected = upright_rgb(original)
        if min(expected.size) > 256:
            assert min(stored.size) == 256, path
            expected = expected.resize(stored.size, Image.Resampling.BOX)
        assert stored.size == expected.size, path
        expected = Image.open(io.BytesIO(encoded(expected, quality=95)))
        apart = np.abs(np.asarray(stored.convert("RGB"), int) - np.asarray(expected, int)).mean()
        assert apart < 2.5, f"{path}: {apart:.1f} of 255 apart from the original on white"


def test_webdataset_reads_what_the_index_says(run, tmp_path):
    for tar in run[0].glob("*.tar"):
        shutil.copy(tar, tmp_path)
    build(tmp_path)
    index = Index.open(tmp_path)
    ours = {}
    for row in range(len(index)):
        at = {name: values[0] for name, values in index.columns(np.array([row])).items()}
        with (tmp_path / index.shards[at["shard"]]).open("rb") as file:
            file.seek(at["offset"])
            ours[at["sample_id"]] = index.key(row), index.captions(row), file.read(at["size"])
        assert at["plain"]
    tars = [str(tar) for tar in sorted(tmp_path.glob("*.tar"))]
    theirs = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        told = json.loads(sample["json"])
        theirs[told["sample_id"]] = sample["__key__"], told["captions"], sample["jpg"]
    assert ours == theirs
    assert len(ours) == run[1].stored


def test_plain_small_jpegs_are_stored_byte_for_byte(run):
    folder, _, site, _, _, good = run
    found = samples(folder)
    for path in [f"/plain/{i}.jpg" for i in range(PLAIN)]:
        assert found[site.url(path)]["jpg"] == good[path]


def test_a_second_run_asks_for_nothing_and_says_the_same(run):
    folder, report, site, _, table, _ = run
    before, stamp = site.hits.total(), (folder / "download.json").stat().st_mtime_ns
    again = download(table, folder, Options(shard_size=16, threads=3, timeout=9, allow_address=HERE))
    assert again == report
    assert site.hits.total() == before
    assert (folder / "download.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(("change", "field"), [
    ({"image_size": 200}, "image_size"), ({"shard_size": 20}, "shard_size"), ({"allow_address": ()}, "allow_address"),
    ({"user_agent": "me"}, "user_agent"),
])
def test_another_setting_on_resume_is_refused(run, change, field):
    folder, _, _, _, table, _ = run
    with pytest.raises(InputError, match=f"begun with {field} = "):
        download(table, folder, Options(**{"shard_size": 16, "allow_address": HERE, **change}))


def test_another_table_on_resume_is_refused(run, tmp_path):
    rows = run[1].rows
    for urls, says in ((["http://x/"], f"begun with {run[4].name} of {rows} rows, now it is other.parquet of 1 rows: use the"),
                       ([f"http://x/{row}" for row in range(rows)], "now it is other.parquet of")):
        with pytest.raises(InputError, match=says):
            download(url_table(tmp_path / "other.parquet", urls), run[0], Options(shard_size=16, allow_address=HERE))
    same = url_table(tmp_path / run[4].name, [f"http://x/{row}" for row in range(rows)])
    with pytest.raises(InputError, match=f"{rows} rows with another content: use the same table"):
        download(same, run[0], Options(shard_size=16, allow_address=HERE))


def test_what_cannot_be_downloaded_to_is_refused_before_anything_is_asked(tmp_path):
    with serving() as site:
        site.pages["/0.jpg"] = encoded(picture(0))
        table = url_table(tmp_path / "u.parquet", [site.url("/0.jpg")])
        for place, change, says in (
                ("foo://x", {}, "foo://x: Protocol not known: foo: give a folder"), ("memory://x", {}, "one process only"),
                ("oci://b/x", {}, "oci://b/x: Install ocifs to access OCI Object Storage: install it with pip"),
                (tmp_path / "out", {"user_agent": "a\nb"}, "must be one line")):
            with pytest.raises(InputError, match=says):
                download(table, place, Options(allow_address=HERE, **change))
        assert site.connections == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["u.parquet"]


def test_damaged_files_are_named_with_a_cure(tmp_path):
    with serving() as site:
        site.pages["/0.jpg"] = encoded(picture(0))
        table, options = url_table(tmp_path / "u.parquet", [site.url("/0.jpg")] * 3), Options(
            shard_size=2, distributor="inline", allow_address=HERE)
        download(table, tmp_path / "out", options)
        for name in ("00000.parquet", "00001_stats.json", "settings.json"):
            (tmp_path / "out" / "download.json").unlink(missing_ok=True)
            whole = (tmp_path / "out" / name).read_bytes()
            (tmp_path / "out" / name).write_bytes(b"{")
            with pytest.raises(InputError, match=f"out/{name} is damaged.*: delete"):
                if name.endswith("_stats.json"):  # read only on the way to what is missing
                    (tmp_path / "out" / "00000.tar").unlink()
                download(table, tmp_path / "out", options)
            (tmp_path / "out" / name).write_bytes(whole)


def test_a_folder_with_other_tars_is_left_alone(tmp_path):
    tar = tmp_path / "00000.tar"
    tar.write_bytes(b"mine")
    with pytest.raises(InputError, match="was not downloaded by this command"):
        download(url_table(tmp_path / "u.parquet", ["http://x/"]), tmp_path, Options())
    assert tar.read_bytes() == b"mine"


@pytest.mark.parametrize(("make", "says"), [
    (lambda path: None, "does not exist"),
    (lambda path: path.write_text("x"), "no Parquet file"),
    (lambda path: pq.write_table(pa.table({"url": ["x"]}), path), "not a URL table of this version"),
    (lambda path: url_table(path, []), "has no rows"),
])
def test_wrong_tables_are_named(tmp_path, make, says):
    make(tmp_path / "u.parquet")
    with pytest.raises(InputError, match=says):
        download(tmp_path / "u.parquet", tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


def test_wrong_address_is_one_line_and_exit_code_2(tmp_path):
    table = url_table(tmp_path / "u.parquet", ["http://x/"])
    done = command("uniclip-data", "download", table, tmp_path / "out", "--allow-address", "localhost")
    assert done.returncode == 2
    assert done.stderr == "error: --allow-address: 'localhost' does not appear to be an IPv4 or IPv6 network: " \
                          "give an address or a block such as 10.0.0.0/8\n"


def test_nothing_fetched_is_exit_code_1_and_the_next_run_may_be_told_otherwise(tmp_path):
    with serving() as site:
        site.pages.update({f"/{i}.jpg": encoded(picture(i)) for i in range(3)})
        table = url_table(tmp_path / "u.parquet", [site.url(f"/{i}.jpg") for i in range(3)])
        words = [sys.executable, "-m", "pipeline.cli", "download", table, tmp_path / "out", "--processes", "1"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]  # a busy machine shows progress before
        assert re.fullmatch(r'error: none of 3 URLs could be fetched, 3 of them with "refused address", e.g. \S+/\d.jpg: '
                            r"if that address is meant, allow it with --allow-address", last), last
        assert site.connections == 0
        done = subprocess.run([*words, "--allow-address", "127.0.0.1"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "100.0%  stored" in done.stdout


def test_kill_9_in_the_middle_then_rerun_gives_the_same_set(tmp_path):
    body = encoded(picture(0))

    def slowly(handler):
        time.sleep(0.05)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    with serving() as site:
        paths = [f"/{i}.jpg" for i in range(200)]
        site.pages.update(dict.fromkeys(paths, slowly))
        table, out = url_table(tmp_path / "u.parquet", [site.url(path) for path in paths]), tmp_path / "out"
        words = ["download", table, out, "--shard-size", "10", "--threads", "2", "--allow-address", "127.0.0.1",
                 "--processes"]
        first = subprocess.Popen([Path(sys.executable).parent / "uniclip-data", *map(str, words), "2"],
                                 stderr=subprocess.DEVNULL)
        children = _wait_for(lambda: list(out.glob("*_stats.json")) and _children(first.pid))
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        _wait_for(lambda: not any(map(_alive, children)))
        finished = [json.loads(s.read_text())["count"] for s in out.glob("*_stats.json")]
        assert 0 < sum(finished) < 200
        assert not (out / "download.json").exists()
        (out / "00019.tar").write_bytes(b"torn")  # as if it had been killed between the names of one shard
        (out / "00018_stats.json").unlink(missing_ok=True)
        site.hits.clear()
        done = command("uniclip-data", *words, "1")
        assert done.returncode == 0, done.stderr
        assert set(samples(out)) == {site.url(path) for path in paths}
        assert site.hits.total() <= 200 - sum(finished) + 10, "finished shards were asked for again"
        assert json.loads((out / "download.json").read_text())["stored"] == 200
        assert not (out / "_tmp").exists()


def _children(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def _wait_for(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


def test_a_few_are_never_shown_as_none_nor_nearly_all_as_all():
    shown = Report(3000, 2999, {"http 404": 1}, {}).lines()
    assert shown == ["       2,999  >99.9%  stored", "           1   <0.1%  http 404"]
    assert Report(2000, 1999, {"dns": 1}, {}).lines() == ["       1,999  >99.9%  stored", "           1    0.1%  dns"]
    assert Report(3, 3, {}, {}).lines() == ["           3  100.0%  stored"]
