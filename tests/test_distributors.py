"""The same download through processes, Ray, Spark and this very process; to folders and to fsspec URLs."""

import hashlib
import importlib.util
import json
import shutil
import tarfile
from io import BytesIO

import fsspec
import pytest
from conftest import encoded, picture
from test_download import HERE, samples, url_table
from webserver import Site, serving

from pipeline import distributors
from pipeline.console import InputError, WorkFailed
from pipeline.distributors import in_ray, in_spark
from pipeline.download import Options, download
from pipeline.fetch import Failure, Policy, fetch
from pipeline.stores import Store

COUNT = 60


@pytest.fixture(scope="module")
def site():
    with serving() as site:
        site.pages.update({f"/{number}.jpg": encoded(picture(number), quality=90) for number in range(COUNT)})
        yield site


def urls_of(site: Site, count: int = COUNT) -> list[str]:
    return [site.url(f"/{number}.jpg") for number in range(count)] + [site.url("/missing")]


def digests(folder) -> dict[str, str]:
    """URL → sha256 of the stored image."""
    return {url: hashlib.sha256(sample["jpg"]).hexdigest() for url, sample in samples(folder).items()}


@pytest.fixture(scope="module")
def plain(site, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    download(url_table(folder / "u.parquet", urls_of(site)), folder / "out", Options(distributor="inline", **OPTIONS))
    return folder


OPTIONS = {"shard_size": 10, "threads": 4, "allow_address": HERE, "processes": 2}


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'uniclip[ray]'")
def test_a_real_ray_cluster_gives_the_same_set_and_notices_failures(plain):
    report = download(plain / "u.parquet", plain / "ray", Options(distributor="ray", **OPTIONS))
    assert (report.stored, report.failed) == (COUNT, {"http 404": 1})
    assert digests(plain / "ray") == digests(plain / "out")

    def fails(task):
        if task == 3:
            raise WorkFailed("shard 3 is lost")
        return task

    with pytest.raises(WorkFailed, match="Ray: .*shard 3 is lost: run the same command again"):
        list(in_ray(fails, range(8), 2))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pyspark") is None or not shutil.which("java"),
                    reason="needs Java 17 and pip install 'uniclip[spark]'")
def test_spark_gives_the_same_set_and_notices_failures(plain):
    report = download(plain / "u.parquet", plain / "spark", Options(distributor="spark", **OPTIONS))
    assert (report.stored, report.failed) == (COUNT, {"http 404": 1})
    assert digests(plain / "spark") == digests(plain / "out")

    def fails(task):
        if task == 3:
            raise WorkFailed("shard 3 is lost")
        return task

    with pytest.raises(WorkFailed, match="Spark: .*shard 3 is lost"):
        list(in_spark(fails, range(8), 2))


@pytest.mark.parametrize(("name", "says"), [
    ("ray", "needs ray, which is not installed: pip install 'uniclip.ray.'"),
    ("spark", "needs pyspark, which is not installed"), ("slurm", "'slurm' is none of processes, ray, spark"),
])
def test_a_distributor_that_is_not_there_is_refused_before_anything_is_done(plain, tmp_path, monkeypatch, name, says):
    monkeypatch.setattr(distributors.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(InputError, match=says):
        download(plain / "u.parquet", tmp_path / "out", Options(distributor=name))
    assert not (tmp_path / "out").exists()


def _tars(store: Store) -> dict[str, str]:
    found = {}
    for name in sorted(store.names()):
        if name.endswith(".tar"):
            with tarfile.open(fileobj=BytesIO(store.read(name))) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}
            for member, data in members.items():
                if member.endswith(".json"):
                    found[json.loads(data)["url"]] = hashlib.sha256(members[member[:-4] + "jpg"]).hexdigest()
    return found


def test_a_download_to_an_fsspec_url_works_and_resumes(plain, site):
    options = Options(distributor="inline", **OPTIONS)
    place = "memory://bucket/set"
    report = download(plain / "u.parquet", place, options)
    store = Store(place)
    assert _tars(store) == digests(plain / "out")
    assert store.read_json("download.json")["stored"] == report.stored == COUNT
    store.remove("00002_stats.json")  # as if it had been killed before it wrote the mark of this shard
    store.remove("00004.tar")
    store.remove("download.json")
    site.hits.clear()
    assert download(plain / "u.parquet", place, options) == report
    assert site.hits.total() == 20
    assert _tars(store) == digests(plain / "out")
    with pytest.raises(InputError, match="begun with image_size = 256, now it is 64"):
        download(plain / "u.parquet", place, Options(distributor="inline", **{**OPTIONS, "image_size": 64}))
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_whatever_a_driver_raises_is_one_line_with_the_place(plain, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    place = f"tar://set::{tmp_path}/a.tar"  # fsspec's driver for tars reads only, and raises ValueError
    with pytest.raises(WorkFailed, match="a.tar: ValueError: Read-only filesystem"):
        download(plain / "u.parquet", place, Options(distributor="inline", **OPTIONS))


def test_webp_is_stored_when_asked_for(plain, tmp_path):
    report = download(plain / "u.parquet", tmp_path / "out", Options(distributor="inline", format="webp", **OPTIONS))
    assert report.stored == COUNT
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        images = [tar.extractfile(member).read() for member in tar if member.name.endswith(".webp")]
    assert len(images) == 10
    assert all(data[:4] == b"RIFF" and data[8:12] == b"WEBP" for data in images)
    with pytest.raises(InputError, match="'gif' is none of jpg, webp"):
        download(plain / "u.parquet", tmp_path / "other", Options(format="gif"))


def test_ipv6_without_a_port_is_judged():
    with pytest.raises(Failure, match="refused address"):
        fetch("http://[::ffff:127.0.0.2]/", Policy(timeout=1))


def test_stores_are_alike(tmp_path):
    for place in (tmp_path / "a", "memory://stores/a"):
        store = Store(place)
        assert store.names() == set()
        if store.local:
            store.local.mkdir()
        (tmp_path / "x.bin").write_bytes(b"data")
        store.take(tmp_path / "x.bin")
        store.write_json("y.json", {"ü": 1})
        assert (store.names(), store.read("x.bin"), store.read_json("y.json")) == ({"x.bin", "y.json"}, b"data", {"ü": 1})
        assert store.exists("x.bin")
        assert not (tmp_path / "x.bin").exists()
        store.remove("x.bin")
        store.remove("x.bin")
        assert not store.exists("x.bin")
