"""One WebDataset tar → the rows of the index, and what is unusable in it and why."""

import glob
import hashlib
import json
import mmap
import re
import shutil
import tarfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.console import WorkFailed
from pipeline.files import replacing, sha256_of
from pipeline.images import Undecodable, inspect
from pipeline.members import Tar, Torn, shown
from pipeline.samples import BLANK, IMAGE_SUFFIXES, Group, Keys, Unusable, groups, has, key_and_suffix
from pipeline.schema import INDEX, sample_id_of
from pipeline.text import CAPTION_CHARACTERS, says_nothing

# The index's columns as one shard knows them; names become dictionary codes when the shards are put together.
ROWS = pa.schema([INDEX.field(name).with_type(pa.string()) if name == "source" else INDEX.field(name)
                  for name in INDEX.names if name not in {"shard", "group"}])
# The same with what a takedown may name: sha256 of the stored image, and of the original that it was made from, as the .json
# says.
SCANNED = pa.schema([*ROWS, ("sha256", pa.binary(32)), ("original", pa.binary(32))])
SCAN_VERSION = 2  # of what `scan` takes from a tar; a scan of another version is made again
_SHA256 = re.compile(r"(?i)[0-9a-f]{64}")

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


def why_undecodable(error: Undecodable) -> str:
    """The class of an undecodable image in plain words."""
    text = str(error)
    if text.startswith("more than"):
        return "too many pixels"
    if text.startswith("format not read"):
        return text
    if text.startswith("too costly"):
        return "too costly to decode"
    return "not an image" if text in {"not an image", "empty"} else "broken image"


def scan(path: Path) -> Shard:
    """Read a whole tar, decoding every image. An error of the machine is raised with the tar's name."""
    try:
        return _scan(path)
    except MemoryError:
        raise WorkFailed(f"{path}: not enough memory to read it: give fewer --workers") from None
    except OSError as error:
        raise WorkFailed(f"{path} cannot be read ({error}): copy it again, or look after its disk") from None
    except Exception as error:
        error.add_note(f"while {path} was read")
        raise


def _scan(path: Path) -> Shard:
    rows: list[dict[str, Any]] = []
    unusable: list[tuple[str, str]] = []
    lost: list[Known] = []
    keys = Keys()
    with path.open("rb") as file:
        for group in groups(file):
            known = known_by(group)
            found = keys.judge(group, _row(group))
            if isinstance(found, Exception):
                unusable.append((group.key, str(found)))
                lost += [known] if group.data else []  # without bytes, nothing can name it
            else:
                rows.append({**found, **{name: bytes.fromhex(getattr(known, name)) or None for name in ("sha256", "original")}})
    table = pa.Table.from_pylist(rows, schema=SCANNED).sort_by("key")
    return Shard(table, unusable, lost, path.stat().st_size, sha256_of(path))


def _row(group: Group) -> dict[str, Any] | Unusable:
    try:
        return row_of(group)
    except Unusable as reason:
        return reason


def known_by(group: Group) -> Known:
    """What a takedown may name this sample by, usable or not."""
    image, told = image_of(group), _told(group)[0]
    original = told.get("sha256")
    original = original.lower() if isinstance(original, str) and _SHA256.fullmatch(original) else ""
    return Known(group.key, _sample_id(told, image), hashlib.sha256(image).hexdigest() if image else "", original)


def image_of(group: Group) -> bytes:
    """The bytes of its image; none where it has none."""
    return group.data.get(_image_suffix(group) or "", b"")


def _image_suffix(group: Group) -> str | None:
    return next((suffix for suffix in IMAGE_SUFFIXES if suffix in group.members), None)


def row_of(group: Group) -> dict[str, Any]:
    """One row of the index. Raises Unusable."""
    if group.flaw:
        raise Unusable(group.flaw)
    if not is_utf8(group.key):
        raise Unusable("key is not UTF-8")
    if (suffix := _image_suffix(group)) is None:
        raise Unusable(f"no image: {has(group)}")
    image = group.data[suffix]
    try:
        facts = inspect(image)
    except Undecodable as error:
        raise Unusable(why_undecodable(error)) from None
    told, wrong = _told(group)
    offset, size = group.members[suffix]
    return {"key": group.key, "offset": offset, "size": size, "width": facts.width, "height": facts.height,
            "plain": facts.plain, "captions": _captions(group, told, wrong), "sample_id": _sample_id(told, image),
            "source": _source(told)}


def _told(group: Group) -> tuple[dict[str, Any], str]:
    """What the sample's .json says; or nothing and what is wrong with it, for the .txt may still do."""
    if (data := group.data.get("json")) is None:
        return {}, ""
    try:
        told = json.loads(data)
    except UnicodeDecodeError:
        return {}, "json is not UTF-8"
    except (ValueError, RecursionError):
        return {}, "json is damaged"
    return (told, "") if isinstance(told, dict) else ({}, "json is no object {…}")


def _captions(group: Group, told: dict[str, Any], wrong: str) -> list[str]:
    """The json's `captions`, else its `caption`, else the .txt; each text once. Raises Unusable."""
    listed = told.get("captions")
    candidates = [listed if isinstance(listed, list) else [], [told.get("caption")]]
    if "txt" in group.data:
        candidates.append([group.data["txt"].decode("utf-8-sig", "surrogateescape")])
    for candidate in candidates:
        texts = [text.strip() for text in candidate if isinstance(text, str) and text.strip()]
        if texts and not all(map(is_utf8, texts)):
            raise Unusable("caption is not UTF-8")
        if sum(map(len, texts)) > CAPTION_CHARACTERS:
            raise Unusable(f"captions too long: more than {CAPTION_CHARACTERS:,} characters in all")
        if texts := [text for text in dict.fromkeys(texts) if not says_nothing(text)]:
            return texts
    raise Unusable(f"no caption: {'; '.join(_without_caption(group, told, wrong))}")


def _without_caption(group: Group, told: dict[str, Any], wrong: str) -> Iterator[str]:
    """What there is instead of a caption."""
    if wrong:
        yield wrong
    elif isinstance(told.get("captions"), str):
        yield 'json has captions as one text; write a list, or call it "caption"'
    elif "json" in group.data:
        texts = sorted(key for key, value in told.items()
                       if isinstance(value, str) and key != "url" and not says_nothing(value))
        yield f"json has {', '.join(map(shown, texts[:4])) or 'no text'}; a caption is called captions or caption"
    if "txt" in group.data:
        yield "txt shows nothing"
    if not {"txt", "json"} & set(group.data):
        yield f"has {', '.join(map(shown, sorted(group.members)[:4]))}; write KEY.txt, or KEY.json with captions"


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
                at = min(stop, end)
                while (left := at - new.tell()) > 0:  # in pieces: a header may tell of gigabytes
                    new.write(bytes(min(left, 2**20)))
            new.write(view[at:])
        shutil.copymode(path, temporary)


def _spans(file: BinaryIO, keys: Collection[str]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each member of these samples, from its first header on."""
    with suppress(Torn):  # as in `groups`: nothing behind this can be read
        for member in Tar(file):
            if (found := key_and_suffix(member.name)) and found[0] in keys:
                yield member.start, member.stop
