"""One WebDataset tar → the rows of the index, and what is unusable in it and why."""

import glob
import hashlib
import json
import mmap
import re
import shutil
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.files import replacing, sha256_of
from pipeline.images import Undecodable, inspect
from pipeline.schema import INDEX, sample_id_of

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# webdataset.tariterators' rules, restated because importing webdataset imports torch; a test compares the two.
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")

# The index's columns as one shard knows them; names become dictionary codes when the shards are put together.
ROWS = pa.schema([INDEX.field(name).with_type(pa.string()) if name == "source" else INDEX.field(name)
                  for name in INDEX.names if name not in {"shard", "group"}])
# The same with what a takedown may name: sha256 of the stored image, and of the original that it was made from, as the .json
# says.
SCANNED = pa.schema([*ROWS, ("sha256", pa.binary(32)), ("original", pa.binary(32))])
BLANK = "__forgotten__"  # a member that WebDataset passes over, where a forgotten one was
_SHA256 = re.compile(r"(?i)[0-9a-f]{64}")


@dataclass
class Group:
    """The members of one sample: suffix → (offset, size) in the tar."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    broken: str = ""  # why the tar does not give it whole


@dataclass(frozen=True)
class Shard:
    """What one tar holds: `rows` (schema SCANNED, sorted by key), the (key, reason) of each unusable sample, and what else a
    takedown may know those by.
    """

    rows: pa.Table
    unusable: list[tuple[str, str]]
    lost: list["Known"]
    size: int
    sha256: str


@dataclass(frozen=True)
class Known:
    """What a takedown may name a sample by; sha256 and original in hexadecimal, empty where there is none."""

    key: str
    sample_id: int
    sha256: str
    original: str


class Unusable(ValueError):
    """A sample that cannot be trained on; the message is its class."""


def why_undecodable(error: Undecodable) -> str:
    """The class of an undecodable image in plain words."""
    text = str(error)
    if text.startswith("more than"):
        return "too many pixels"
    return "not an image" if text in {"not an image", "empty"} else "broken image"


def groups(path: Path) -> Iterator[Group]:
    """The samples of a tar in its order.

    A tar that stops without its end mark ends with a `broken` group: the sample it was cut in, or one without a key.
    """
    size, group, whole = path.stat().st_size, None, False
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    found = _KEY_AND_SUFFIX.match(member.name)
                    if not member.isreg() or not found or _META.match(member.name):
                        continue
                    key, suffix = found[1], found[2].lower()
                    if group is None or group.key != key or suffix in group.members:
                        if group:
                            yield group
                        group = Group(key)
                    group.members[suffix] = member.offset_data, member.size
                    if member.offset_data + member.size > size:
                        group.broken = "truncated tar"
                whole = _ends_properly(file, tar.offset)
        except (tarfile.TarError, ValueError, OverflowError):
            pass  # a torn or foreign header: said below
    if group:
        yield group
    if not whole and not (group and group.broken):
        yield Group("", broken="truncated tar" if group else "not a tar")


def _ends_properly(file: BinaryIO, offset: int) -> bool:
    """Whether a block of zeros stands where tarfile stopped; it also stops silently at a torn or foreign header."""
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def scan(path: Path) -> Shard:
    """Read a whole tar, decoding every image."""
    rows: list[dict[str, Any]] = []
    unusable: list[tuple[str, str]] = []
    lost: list[Known] = []
    seen: set[str] = set()
    with path.open("rb") as file:
        for group in groups(path):
            known = known_by(file, group)
            try:
                if group.key in seen:
                    raise Unusable("duplicate key")
                sums = {name: bytes.fromhex(getattr(known, name)) or None for name in ("sha256", "original")}
                rows.append({**row_of(file, group), **sums})
                seen.add(group.key)
            except Unusable as reason:
                unusable.append((group.key, str(reason)))
                lost.append(known)
    table = pa.Table.from_pylist(rows, schema=SCANNED).sort_by("key")
    return Shard(table, unusable, lost, path.stat().st_size, sha256_of(path))


def known_by(file: BinaryIO, group: Group) -> Known:
    """What a takedown may name this sample by, usable or not."""
    suffix, told = _image_suffix(group), _told(file, group)
    image = _bytes(file, group, suffix) if suffix else b""
    original = told.get("sha256")
    original = original.lower() if isinstance(original, str) and _SHA256.fullmatch(original) else ""
    return Known(group.key, _sample_id(told, image), hashlib.sha256(image).hexdigest() if image else "", original)


def _image_suffix(group: Group) -> str | None:
    return next((suffix for suffix in IMAGE_SUFFIXES if suffix in group.members), None)


def row_of(file: BinaryIO, group: Group) -> dict[str, Any]:
    """One row of the index. Raises Unusable."""
    if group.broken:
        raise Unusable(group.broken)
    if not is_utf8(group.key):
        raise Unusable("key is not UTF-8")
    if (suffix := _image_suffix(group)) is None:
        raise Unusable("no image")
    image = _bytes(file, group, suffix)
    try:
        facts = inspect(image)
    except Undecodable as error:
        raise Unusable(why_undecodable(error)) from None
    told = _told(file, group)
    offset, size = group.members[suffix]
    return {"key": group.key, "offset": offset, "size": size, "width": facts.width, "height": facts.height,
            "plain": facts.plain, "captions": _captions(file, group, told), "sample_id": _sample_id(told, image),
            "source": _source(told)}


def _bytes(file: BinaryIO, group: Group, suffix: str) -> bytes:
    offset, size = group.members[suffix]
    file.seek(offset)
    return file.read(size)


def _told(file: BinaryIO, group: Group) -> dict[str, Any]:
    """What the sample's .json says; nothing where it is absent or unreadable, for the .txt may still do."""
    if "json" not in group.members:
        return {}
    try:
        told = json.loads(_bytes(file, group, "json"))
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _captions(file: BinaryIO, group: Group, told: dict[str, Any]) -> list[str]:
    """The json's `captions`, else its `caption`, else the .txt; each text once. Raises Unusable."""
    listed = told.get("captions")
    candidates = [listed if isinstance(listed, list) else [], [told.get("caption")]]
    if "txt" in group.members:
        candidates.append([_bytes(file, group, "txt").decode("utf-8", "surrogateescape")])
    for candidate in candidates:
        texts = [text.strip() for text in candidate if isinstance(text, str) and text.strip()]
        if texts and not all(map(is_utf8, texts)):
            raise Unusable("caption is not UTF-8")
        if texts:
            return list(dict.fromkeys(texts))
    raise Unusable("no caption")


def is_utf8(text: str) -> bool:
    """False for what the system gave us as bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _source(told: dict[str, Any]) -> str:
    source = told.get("source")
    return source if isinstance(source, str) and is_utf8(source) else ""


def _sample_id(told: dict[str, Any], image: bytes) -> int:
    """Never a number that the .json gives: in other people's tars that may count each tar's samples from 0."""
    url = told.get("url")
    return sample_id_of(url if isinstance(url, str) and url and is_utf8(url) else image)


def blank(path: Path, keys: Collection[str]) -> None:
    """Put zeros where these samples' members are, names too; what is left is a valid tar.

    Every other byte keeps its place, so that no index of the tar can read a wrong image. A link's target is rewritten.
    """
    path = path.resolve()
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a takedown that was killed
        left.unlink(missing_ok=True)
    with replacing(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
        spans, end, at = list(_spans(old, keys)), path.stat().st_size, 0
        with mmap.mmap(old.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            for start, stop in spans:
                new.write(view[at:start])
                member = tarfile.TarInfo(BLANK)
                member.size = stop - start - tarfile.BLOCKSIZE
                new.write(member.tobuf(tarfile.GNU_FORMAT))
                new.write(bytes(min(stop, end) - start - tarfile.BLOCKSIZE))
                at = min(stop, end)
            new.write(view[at:])
        shutil.copymode(path, temporary)


def _spans(file: BinaryIO, keys: Collection[str]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each member of these samples, from its first header on."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                found = _KEY_AND_SUFFIX.match(member.name)
                if found and found[1] in keys:
                    yield member.offset, tar.offset
    except (tarfile.TarError, ValueError, OverflowError):
        pass  # as in `groups`: nothing behind this can be read
