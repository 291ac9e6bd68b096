"""Tars made to hang, fill memory or crash who reads them: each is read to its end in bounds, and says what it is."""

import gzip
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, command, encoded, picture

from pipeline.reader import ReadAhead
from pipeline.samples import BLANK, Keys, Unusable
from pipeline.tars import blank, scan
from pipeline.tarstream import parsed, raw_samples

JPEG, END = encoded(picture(0, 16, 12)), bytes(1024)
GIB = 2**30
SECONDS, MIB = 60, 1024  # of a processor's time, and of memory, that a tar may take of a worker
HUGE = {"12 GB image", "12 GB pax header", "12 GB long name", "12 GB text", "1 GB of zeros", "four images of 64 MB",
        "gzip bomb", "100,000 members without suffix", "sparse map of a million"}  # kept from the daily tests
HARMLESS = {"10,000 pax headers", "10,000 global headers", "folder of 8 GB"}


def header(name: str, size: int = 0, kind: bytes = b"0", link: str = "", at: tuple[int, bytes] | None = None) -> bytes:
    """A block of GNU's format; `at` overwrites some of its bytes before they are summed."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")[-512:])
    if at:
        block[at[0]:at[0] + len(at[1])] = at[1]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes, kind: bytes = b"0", size: int | None = None) -> bytes:
    return header(name, len(data) if size is None else size, kind) + data + bytes(-len(data) % 512)


def record(key: str, value: str | bytes) -> bytes:
    body = b" " + key.encode() + b"=" + (value if isinstance(value, bytes) else value.encode()) + b"\n"
    length = next(n for n in range(len(body), len(body) + 12) if len(str(n)) + len(body) == n)
    return str(length).encode() + body


def pax(*records: bytes) -> bytes:
    return member("p", b"".join(records), b"x")


def sample(key: str = "z") -> bytes:
    return member(f"{key}.jpg", JPEG) + member(f"{key}.txt", b"fine")


def sized(value: str) -> Iterable[bytes]:
    return pax(record("size", value)), member("0.jpg", JPEG), sample()


def linked(pairs: Iterable[tuple[str, str]], kind: bytes = b"1") -> bytes:
    return b"".join(header(name, 0, kind, link) for name, link in pairs)


def named(*names: str) -> bytes:
    return b"".join(pax(record("path", name.encode("utf-8", "surrogateescape"))) + member("n", JPEG) for name in names)


SPARSE = (record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0"), record("GNU.sparse.name", "0.jpg"),
          record("GNU.sparse.realsize", str(12 * GIB)))
# Pieces of each tar; a number is a hole of so many bytes.
TARS: dict[str, Iterable[bytes | int]] = {
    **{f"pax size {value[:12]!r}": (*sized(value), END) for value in (
        "-1024", "-512", "-1", "1e5", "", " 7", "0x10", "9" * 30, "9" * 5000, "٣", "1\0", str(2**63), str(12 * GIB))},
    "negative size": (header("0.jpg", at=(124, b"\xff" * 11 + b"\x00")), sample(), END),
    "size of 2^88": (header("0.jpg", at=(124, b"\x80" + b"\xff" * 11)), sample(), END),
    "12 GB claimed": (header("0.jpg", 12 * GIB), JPEG),
    "12 GB image": (header("0.jpg", 12 * GIB), 12 * GIB, sample(), END),
    "12 GB text": (member("0.jpg", JPEG), header("0.txt", 12 * GIB), 12 * GIB, sample(), END),
    "12 GB pax header": (header("p", 12 * GIB, b"x"), 12 * GIB, sample(), END),
    "12 GB long name": (header("p", 12 * GIB, b"L"), 12 * GIB, sample(), END),
    "12 GB long name claimed": (header("p", 12 * GIB, b"L"), sample(), END),
    "negative pax header": (header("p", kind=b"x", at=(124, b"\xff" * 12)), sample(), END),
    "10,000 pax headers": (pax(record("comment", "x")) * 10_000, sample(), END),
    "10,000 global headers": (b"".join(member("g", record(f"k{n}", "v"), b"g") for n in range(10_000)), sample(), END),
    "10,000 long names": (member("L", b"a.jpg\0", b"L") * 10_000, sample(), END),
    "pax headers and no member": (pax(record("path", "a")), END),
    **{f"pax record {data[:14]!r}": (member("p", data, b"x"), member("0.jpg", JPEG), sample(), END) for data in (
        b"0 a=b\n", b"-5 a=b\n", b"999999999 size=1\n", b"6 a=bb", b"5 ab\n", b"\xff" * 600, b"1" * 600, b" " * 90,
        b"12 path=\xff\xfe\n")},
    "sparse map without end": (pax(*SPARSE), member("0.jpg", b"9" * 512), END),
    "sparse map of a million": (pax(*SPARSE), member("0.jpg", b"1000000\n" + b"1\n" * 2_000_000), sample(), END),
    "old sparse without end": (header("0.jpg", 512, b"S", at=(482, b"\1")), bytes([1]) * 2**20),
    "old sparse": (header("0.jpg", 512, b"S"), bytes(512), member("0.txt", b"x"), sample(), END),
    "sparse by many records": (pax(*[record("GNU.sparse.offset", "1")] * 20_000), member("0.jpg", JPEG), sample(), END),
    "link to itself": (linked([("0.jpg", "0.jpg")]), member("0.txt", b"x"), sample(), END),
    "cycle of links": (linked([("0.jpg", "1.jpg"), ("1.jpg", "0.jpg")]), linked([("2.jpg", "3.jpg"), ("3.jpg", "2.jpg")], b"2"),
                       sample(), END),
    "10,000 links": (linked((f"{n}.jpg", f"{n + 1}.jpg") for n in range(10_000)), sample(), END),
    "links outwards": (linked([("0.txt", "/etc/passwd"), ("1.jpg", "../" * 30 + "x")], b"2"), sample(), END),
    "devices and pipes": (*(header(f"{n}.jpg", kind=kind) for n, kind in enumerate((b"3", b"4", b"6", b"Z", b"M", b"V", b"D"))),
                          sample(), END),
    "control characters": (named("\x1b]0;x\x07.jpg", "a\rb\n.jpg", "\x1b[31mred\x1b[0m.txt", "\udcff.jpg", "\u202egpj.txt"),
                           sample(), END),
    "absolute names": (named("/etc/0.jpg", "//x/1.jpg", "C:\\2.jpg"), sample(), END),
    "names upwards": (named("../" * 40 + "0.jpg", "..", ".", "a/../../b.jpg", "...jpg"), sample(), END),
    "name of a million": (pax(record("path", "a" * 900_000 + ".jpg")), member("n", JPEG), sample(), END),
    "folder of 8 GB": (header("d.jpg/", 8 * GIB - 1, b"5"), sample(), END),
    "empty names": (member("", JPEG), named("", "/", ".jpg"), sample(), END),
    "our own mark": (member(BLANK, JPEG), member(f"{BLANK}/0.jpg", JPEG), member("__a__/1.jpg", JPEG), sample(), END),
    "100,000 members without suffix": (member("README", b"") * 100_000, sample(), END),
    "end marks between": (*[END + member("x.npy", b"1")] * 500, END, sample(), END),
    "1 GB of zeros": (sample(), END, GIB, sample("late"), END),
    "bytes after the end": (sample(), END, b"no tar" * 300),
    "four images of 64 MB": (*(piece for suffix in ("webp", "png", "jpeg", "jpg")
                               for piece in (header(f"0.{suffix}", 2**26), 2**26)), sample(), END),
    "gzip bomb": (gzip.compress(bytes(2**27), 1),),
    "deep json": (member("0.jpg", JPEG), member("0.json", b"[" * 10_000_000), sample(), END),
    "long number in json": (member("0.jpg", JPEG), member("0.json", b'{"caption": ' + b"9" * 10_000_000 + b"}"), sample(), END),
    "random bytes": (os.urandom(100_000),),
}


def write(path: Path, pieces: Iterable[bytes | int]) -> Path:
    with path.open("wb") as file:
        for piece in pieces:
            if isinstance(piece, int):
                file.seek(piece, os.SEEK_CUR)
            else:
                file.write(piece)
    return path


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(key, reason) of a stream, without a reason for a sample."""
    reads, keys = ReadAhead(1), Keys()
    for _, group in raw_samples([str(path)], reads, 60):
        try:
            row = parsed(group)
        except Unusable as reason:
            row = reason
        row = keys.judge(group, row)
        yield group.key, str(row) if isinstance(row, Exception) else ""
    reads.close()


def read_by_all(path: Path) -> list[tuple[str, str]]:
    """What index and stream say, which is the same; a takedown of other keys leaves the bytes as they are."""
    shard = scan(path)
    told = sorted([*((key, "") for key in shard.rows["key"].to_pylist()), *shard.unusable])
    assert sorted(lines(path)) == told
    if path.stat().st_size < 2**27:
        before = path.read_bytes()
        blank(path, {"nobody"})
        assert path.read_bytes() == before
    return told


RUN = """
import json, resource, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from test_hostile_tars import read_by_all
told = read_by_all(Path(sys.argv[1]))
print(json.dumps([told, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


@pytest.mark.parametrize("kind", [kind for kind in TARS if kind not in HUGE])
def test_index_and_stream_say_the_same_of_a_hostile_tar(kind, tmp_path):
    told = read_by_all(write(tmp_path / "0.tar", TARS[kind]))
    usable = {key for key, reason in told if not reason}
    assert usable <= {"z", "late", "0", "/etc/0", "C:\\2", "//x/1"}
    assert kind in HARMLESS or any(reason for _, reason in told), "said nothing"


@pytest.mark.slow
def test_fifty_hostile_tars_cost_a_worker_neither_a_minute_nor_a_gigabyte(tmp_path, capsys):
    assert len(TARS) >= 50
    worst = [0.0, 0.0]
    for kind, pieces in TARS.items():
        path = write(tmp_path / "0.tar", pieces)
        done = subprocess.run([sys.executable, "-c", RUN, path], capture_output=True, text=True, timeout=10 * SECONDS, cwd=ROOT)
        assert done.returncode == 0, (kind, done.stderr)
        _, seconds, mib = json.loads(done.stdout)
        assert seconds < SECONDS and mib < MIB, (kind, seconds, mib)
        worst = [max(worst[0], seconds), max(worst[1], mib)]
        path.unlink()
    with capsys.disabled():
        print(f"\n{len(TARS)} hostile tars: at most {worst[0]:.0f} s and {worst[1]:.0f} MiB")


def test_one_index_over_all_of_them_names_each(tmp_path):
    for number, kind in enumerate(kind for kind in TARS if kind not in HUGE):
        write(tmp_path / f"{number:02}.tar", TARS[kind])
    write(tmp_path / "good.tar", [sample(), END])
    done = command("uniclip-data", "index", tmp_path, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    told = [json.loads(line)["shard"] for line in (tmp_path / "quarantine.jsonl").open()]
    assert len(set(told)) == len(TARS) - len(HUGE) - len(HARMLESS)
