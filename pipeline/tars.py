"""One WebDataset tar → the rows of the index, and what is unusable in it and why."""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.files import sha256_of
from pipeline.images import Undecodable, inspect
from pipeline.schema import INDEX, sample_id_of

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# webdataset.tariterators' rules, restated because importing webdataset imports torch; a test compares the two.
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")

# The index's columns as one shard knows them; names become dictionary codes when the shards are put together.
ROWS = pa.schema([INDEX.field(name).with_type(pa.string()) if name == "source" else INDEX.field(name)
                  for name in INDEX.names if name not in {"shard", "group"}])


@dataclass
class Group:
    """The members of one sample: suffix → (offset, size) in the tar."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    broken: str = ""  # why the tar does not give it whole


@dataclass(frozen=True)
class Shard:
    """What one tar holds: `rows` (schema ROWS, sorted by key) and the (key, reason) of each unusable sample."""

    rows: pa.Table
    unusable: list[tuple[str, str]]
    size: int
    sha256: str


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
    seen: set[str] = set()
    with path.open("rb") as file:
        for group in groups(path):
            try:
                if group.key in seen:
                    raise Unusable("duplicate key")
                rows.append(row_of(file, group))
                seen.add(group.key)
            except Unusable as reason:
                unusable.append((group.key, str(reason)))
    table = pa.Table.from_pylist(rows, schema=ROWS).sort_by("key")
    return Shard(table, unusable, path.stat().st_size, sha256_of(path))


def row_of(file: BinaryIO, group: Group) -> dict[str, Any]:
    """One row of the index. Raises Unusable."""
    if group.broken:
        raise Unusable(group.broken)
    if not _is_utf8(group.key):
        raise Unusable("key is not UTF-8")
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in group.members), None)
    if suffix is None:
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
        if texts and not all(map(_is_utf8, texts)):
            raise Unusable("caption is not UTF-8")
        if texts:
            return list(dict.fromkeys(texts))
    raise Unusable("no caption")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _source(told: dict[str, Any]) -> str:
    source = told.get("source")
    return source if isinstance(source, str) and _is_utf8(source) else ""


def _sample_id(told: dict[str, Any], image: bytes) -> int:
    """Never a number that the .json gives: in other people's tars that may count each tar's samples from 0."""
    url = told.get("url")
    return sample_id_of(url if isinstance(url, str) and url and _is_utf8(url) else image)
