"""Evaluation sets on disk, in CLIP_benchmark's WebDataset layout, read and written as they are; tables are read too.

    FOLDER/dataset_type.txt                       classification (also when absent) or retrieval
    FOLDER/classnames.txt                         line i names label i
    FOLDER/zeroshot_classification_templates.txt  one prompt a line, {c} stands for the class
    FOLDER/SPLIT/nshards.txt                      1 when absent
    FOLDER/SPLIT/0.tar …                          image + .cls (an integer) or .txt (captions joined by newline)
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

from pipeline import tablesets
from pipeline.console import InputError, existing
from pipeline.files import sha256_of
from pipeline.samples import PACKED, Group, groups, has

CLASSIFICATION, RETRIEVAL = "classification", "retrieval"
DATASET_TYPE, NSHARDS = "dataset_type.txt", "nshards.txt"
CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")  # the order in which CLIP_benchmark looks for them
_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}

Target = int | list[str]
Example = tuple[str, bytes, Target]


@dataclass(frozen=True)
class EvalSet:
    """One split of a set; `kind` is classification or retrieval.

    `manifest_sha256` covers every file of the split, its type and class names; templates are hashed with the prompts.
    """

    name: str
    kind: str
    split: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    shards: tuple[Path, ...]
    manifest_sha256: str
    note: str = ""  # what a reader of the numbers should know

    def read(self, shard: Path) -> Iterator[Example]:
        """Yield (key, image bytes, label or captions) of one of `shards`. Raises InputError naming shard and key."""
        if shard.suffix == ".tsv":
            yield from tablesets.examples(shard, self.split)
            return
        for group in _whole(shard):
            where, sample = f"{shard}, key {group.key}", group.data
            image = next((sample[e] for e in IMAGE_EXTENSIONS if e in sample), None)
            if image is None:
                raise InputError(f"{where}: no image: {has(group)}")
            target = _label(sample, where, self) if self.kind == CLASSIFICATION else _captions(sample, where)
            yield group.key, image, target

    def examples(self) -> Iterator[Example]:
        """Yield (key, image bytes, label or captions) of the whole split, in the order of the tars."""
        return chain.from_iterable(map(self.read, self.shards))


def open_evalset(folder: Path | str, split: str = "test") -> EvalSet:
    """Check the layout of `folder` and hash the files of `split`. Raises InputError with the file and the cure."""
    if str(folder).startswith("pipe:"):
        raise InputError(f"evaluation set {folder}: pipe: would run a shell command; give a folder")
    folder = existing(Path(folder), "evaluation set").resolve()
    if table := tablesets.table_of(folder):
        return _open_table(folder, table, split)
    kind = _kind(folder)
    shards = _shards(folder, split)
    files = [folder / split / NSHARDS, folder / DATASET_TYPE, folder / CLASSNAMES, *shards]
    return EvalSet(folder.name, kind, split, _lines(folder / CLASSNAMES), _templates(folder / TEMPLATES), shards,
                   _manifest(folder, [file for file in files if file.exists()]))


def _open_table(folder: Path, table: Path, split: str) -> EvalSet:
    if split not in tablesets.splits(table):
        raise InputError(f"{table} has no split {split!r}; splits present: {', '.join(tablesets.splits(table)) or 'none'}")
    kind = CLASSIFICATION if table.name == tablesets.LABELS else RETRIEVAL
    twice = tablesets.of_two_labels(table, split)
    note = f"{len(twice):,} images are listed under two labels or more ({', '.join(twice[:3])}): each label counts, and one " \
           "answer cannot be right for all of them" if twice else ""
    return EvalSet(folder.name, kind, split, tablesets.classes(table), _templates(folder / TEMPLATES), (table,),
                   _manifest(folder, [table, *tablesets.images(table, split)]), note)


def require_prompts(evalset: EvalSet, folder: Path, templates: Sequence[str]) -> None:
    """Raise InputError where zero-shot classification would lack names of classes, or templates."""
    for found, name in ((evalset.classnames, CLASSNAMES), (templates, TEMPLATES)):
        if not found:
            raise InputError(f"evaluation set {folder} has no {name}: "
                             "zero-shot classification needs the names of the classes and prompts with {c}")


def rendered(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every prompt, class by class: C·P texts."""
    return [template.replace("{c}", name) for name in classnames for template in templates]


def is_evalset(folder: Path) -> bool:
    """Whether the folder itself is a set, in either layout."""
    return tablesets.table_of(folder) is not None or bool(splits_of(folder))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): convert it") from None


def _lines(path: Path) -> tuple[str, ...]:
    """The stripped lines of a file, none when it is absent. An empty line would shift every label below it."""
    lines = tuple(line.strip() for line in _text(path).splitlines()) if path.exists() else ()
    if "" in lines:
        raise InputError(f"{path}: line {lines.index('') + 1} is empty: remove it")
    return lines


def _templates(path: Path) -> tuple[str, ...]:
    templates = _lines(path)
    for number, template in enumerate(templates, 1):
        if "{c}" not in template:
            raise InputError(f"{path}: line {number} ({template!r}) has no {{c}} where the class name goes")
    return templates


def _kind(folder: Path) -> str:
    path = folder / DATASET_TYPE
    kind = _text(path).strip().lower() if path.exists() else CLASSIFICATION
    if kind not in (CLASSIFICATION, RETRIEVAL):
        raise InputError(f"{path} says {kind!r}: only {CLASSIFICATION} and {RETRIEVAL} can be evaluated here")
    return kind


def _tars(folder: Path) -> set[str]:
    return {tar.name for tar in folder.glob("*.tar") if tar.stem.isdecimal()}


def splits_of(folder: Path) -> list[str]:
    """Names of the splits a set folder holds."""
    if table := tablesets.table_of(folder):
        return tablesets.splits(table)
    return sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith(".") and _tars(sub))


def _shards(folder: Path, split: str) -> tuple[Path, ...]:
    """The tars nshards.txt counts; one too many or one missing would silently evaluate another set."""
    if not split or split not in splits_of(folder):
        if packed := sorted(path.name for path in folder.glob(f"{split}/*") if PACKED.search(path.name)):
            raise InputError(f"{folder / split} holds {packed[0]}, which is compressed: unpack it and name it NUMBER.tar")
        present = ", ".join(splits_of(folder)) or "none: is this CLIP_benchmark's WebDataset layout?"
        raise InputError(f"evaluation set {folder} has no split {split!r}; splits present: {present}")
    path = folder / split / NSHARDS
    said = _text(path).strip() if path.exists() else "1"
    if not said.isdecimal() or int(said) < 1:
        raise InputError(f"{path} says {said!r}: expected the number of tars")
    expected, found = {f"{i}.tar" for i in range(int(said))}, _tars(folder / split)
    if expected != found:
        wrong = sorted(expected - found) or sorted(found - expected)
        what = "missing" if expected - found else "beyond that number"
        raise InputError(f"{path} says {said}, but {len(found)} tars are there ({wrong[0]} is {what}): "
                         "fetch the missing tars or correct the number")
    return tuple(folder / split / f"{i}.tar" for i in range(int(said)))


def _manifest(folder: Path, files: list[Path]) -> str:
    """sha256 over the lines `sha256sum` would print for the files, in the order of their names."""
    lines = [f"{sha256_of(file)}  {file.relative_to(folder).as_posix()}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _whole(shard: Path) -> Iterator[Group]:
    """The samples of a tar. Raises InputError for one that is not whole, or a member of none: a result covers a whole set.

    Hidden members are passed over: they change no result.
    """
    seen = set()
    try:
        with shard.open("rb") as file:
            for group, following in pairwise(chain((one for one in groups(file) if not one.hidden), [None])):
                if torn := next((one for one in (group, following) if one and not one.key), None):
                    raise InputError(f"{shard} cannot be read as a WebDataset tar ({torn.flaw}): fetch or write it again")
                assert group is not None
                seen.update([following.key] if following and following.key == group.key else ())
                if group.flaw or group.key in seen:
                    raise InputError(f"{shard}, key {group.key}: {group.flaw or 'duplicate key: name its members otherwise'}")
                seen.add(group.key)
                yield group
    except OSError as error:
        raise InputError(f"{shard} cannot be read ({error}): fetch or write it again") from None


def _label(sample: dict[str, bytes], where: str, evalset: EvalSet) -> int:
    if "cls" not in sample:
        raise InputError(f"{where}: no .cls member beside its image (sort the tar: --sort=name); "
                         f"a retrieval set says so in {DATASET_TYPE}")
    text = sample["cls"].removeprefix(b"\xef\xbb\xbf").decode("ascii", "replace").strip()
    if not text.isdecimal():
        raise InputError(f"{where}: label {text!r} is not a non-negative integer")
    if evalset.classnames and int(text) >= len(evalset.classnames):
        raise InputError(f"{where}: label {text} is outside {CLASSNAMES}, which names 0 to "
                         f"{len(evalset.classnames) - 1}")
    return int(text)


def _captions(sample: dict[str, bytes], where: str) -> list[str]:
    if "txt" not in sample:
        raise InputError(f"{where}: no .txt member with captions; is this set of kind {RETRIEVAL}?")
    try:
        captions = [line for line in sample["txt"].decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: its .txt member is not UTF-8 (byte {error.start})") from None
    if not captions:
        raise InputError(f"{where}: no caption in its .txt member")
    return captions


def write_evalset(folder: Path, split: str, examples: Iterable[tuple[bytes, Target]], kind: str,
                  classnames: Iterable[str] = (), templates: Iterable[str] = (), per_shard: int = 10_000) -> int:
    """Write (image bytes, label or captions) as FOLDER/SPLIT; returns the number of examples.

    Keys are numbered s0000000 … as CLIP_benchmark's own converter does. The split appears under its name only when
    complete. Raises InputError when it is there already, or when another split of the folder has other classes.
    """
    if (folder / split).exists():
        raise InputError(f"{folder / split} is there already: remove it or choose another folder")
    partial = folder / f".{split}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, lines in {DATASET_TYPE: [kind], CLASSNAMES: classnames, TEMPLATES: templates}.items():
        _agreed(folder / name, "".join(f"{line}\n" for line in lines))
    count, shards = _write_tars(partial, examples, per_shard)
    (partial / NSHARDS).write_text(f"{shards}\n", encoding="utf-8")
    partial.rename(folder / split)
    return count


def _agreed(path: Path, text: str) -> None:
    if path.exists() and _text(path) != text:
        raise InputError(f"{path} differs from what this split needs: choose another folder")
    if text:
        path.write_text(text, encoding="utf-8")


def _write_tars(folder: Path, examples: Iterable[tuple[bytes, Target]], per_shard: int) -> tuple[int, int]:
    """(examples, tars) written. mtime 0, so that equal sets have equal hashes."""
    from webdataset import ShardWriter

    pattern = str(folder.resolve()).replace("%", "%%") + "/%d.tar"
    with ShardWriter(pattern, maxcount=per_shard, verbose=0, mtime=0) as sink:
        for number, (image, target) in enumerate(examples):
            sink.write({"__key__": f"s{number:07d}", _extension(image, number): image, **_member(target, number)})
        count, shards = sink.total, sink.shard
    if not count:
        raise InputError(f"{folder.parent}: nothing to write: no examples were given")
    return count, shards


def _extension(image: bytes, number: int) -> str:
    for signature, extension in _SIGNATURES.items():
        if image.startswith(signature):
            return extension
    raise InputError(f"example {number}: image is none of {', '.join(_SIGNATURES.values())}: convert it first")


def _member(target: Target, number: int) -> dict[str, bytes]:
    if isinstance(target, int):
        return {"cls": str(target).encode("ascii")}
    folded = dict.fromkeys(" ".join(caption.split()) for caption in target)  # a line break inside would become two captions
    captions = list(filter(None, folded))
    if not captions:
        raise InputError(f"example {number} has no caption")
    return {"txt": "\n".join(captions).encode()}
