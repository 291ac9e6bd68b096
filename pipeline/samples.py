"""The members of a tar → its samples, cut as WebDataset does it; what is no sample is named, not dropped."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

from pipeline.members import Member, Tar, Torn, shown

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# What is read of each sample, and the most bytes of each: a member of gigabytes must not take the machine's memory.
MAX_BYTES = {**dict.fromkeys(IMAGE_SUFFIXES, 2**26), **dict.fromkeys(("txt", "json", "cls"), 2**24)}
# webdataset.tariterators' rules, restated because importing webdataset imports torch; a test compares the two.
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
BLANK = "__forgotten__"  # a member that WebDataset passes over, where a forgotten one was
_LOOSE = ("no sample's file: a name that is hidden (.x), metadata (__x__) or without a suffix; name it KEY.SUFFIX, "
          "or leave it out")

PACKED = re.compile(r"(?i)\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz|tzst)$")  # names of compressed tars

T = TypeVar("T")


@dataclass
class Group:
    """The members of one sample, suffix → (offset, size) in the tar, and the bytes of those that are used.

    flaw: why the tar does not give it whole, as `class: detail`. A group without members is no sample: its key is the name of
    a member that belongs to none, or empty for the tar itself.
    """

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    flaw: str = ""

    @property
    def loose(self) -> bool:
        """Whether this is a member that belongs to no sample."""
        return bool(self.key) and not self.members

    @property
    def hidden(self) -> bool:
        """Whether this is such a member by its name: macOS puts ._0001.jpg beside 0001.jpg."""
        return self.loose and self.key.rpartition("/")[2].startswith(".")


class Unusable(ValueError):
    """A sample that cannot be trained on; the message is its class."""


def groups(file: BinaryIO) -> Iterator[Group]:
    """The samples of a tar in its order, and a group for each member that belongs to none.

    A tar that stops before its end mark ends with a group that is not whole: the sample it was cut in, or one without a key.
    """
    tar, group, owner = Tar(file), None, None
    try:
        for member in tar:
            if member.folder or member.name == BLANK:
                owner = None
            elif not (found := key_and_suffix(member.name)):
                owner = Group(shown(member.name), flaw=member.flaw or _LOOSE)
                yield owner
            else:
                if group is None or group.key != found[0] or found[1] in group.members:
                    if group:
                        yield group
                    group = Group(found[0])
                owner = group
                _take(tar, member, group, found[1])
        lost = ""
    except Torn as torn:
        lost = str(torn)
    if group and lost and tar.inside and owner is group:
        group.flaw, lost = group.flaw or lost, ""
    if group:
        yield group
    if lost:
        yield Group("", flaw=lost)


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member's name; None where it belongs to no sample."""
    found = _KEY_AND_SUFFIX.match(name)
    hidden = name.rpartition("/")[2].startswith(".")
    return None if not found or hidden or _META.match(name) else (found[1], found[2].lower())


def _take(tar: Tar, member: Member, group: Group, suffix: str) -> None:
    group.members[suffix] = member.offset, member.size
    if not (most := MAX_BYTES.get(suffix)):
        return
    if not member.flaw and member.size > most:
        group.flaw = group.flaw or (f"too large: {shown(member.name)} has {member.size:,} bytes, "
                                    f"of .{suffix} at most {most:,} are read")
    elif member.flaw:
        group.flaw = group.flaw or member.flaw
    else:
        group.data[suffix] = tar.read(member)


class Keys:
    """The keys of one tar so far: of equal ones the first usable sample counts."""

    def __init__(self):
        self._usable, self._partial = set(), set()

    def judge(self, group: Group, row: T | Exception) -> T | Exception:
        """`row`, which is what was made of the next group; Unusable where its key has come before."""
        if not group.members:
            return row
        if group.key in self._usable:
            return Unusable("duplicate key")
        if not isinstance(row, Exception):
            self._usable.add(group.key)
        elif not group.flaw and str(row).startswith(("no image", "no caption")):
            if group.key in self._partial:
                return Unusable("image and text are apart: a key's members must follow each other; sort the tar "
                                "(tar --sort=name)")
            self._partial.add(group.key)
        return row


def has(group: Group) -> str:
    """What a sample without an image has instead, and how its image would be found."""
    names = sorted(group.members)
    has = f"has {', '.join(map(shown, names[:4]))}{', …' if len(names) > 4 else ''}"
    if any(name.rpartition(".")[2] in IMAGE_SUFFIXES for name in names):
        return f"{has}; a key ends at its name's first dot: name the members KEY.jpg and KEY.txt"
    return f"{has}; an image ends in .{', .'.join(IMAGE_SUFFIXES)}"
