"""The same Batch from tars without an index, local or remote, through the webdataset library.

Every sample comes once a pass; its vectors and caption are keyed by its id and the pass, as in the indexed way. The order is
a shuffle of shards and a buffer, so this way in is not exactly resumable: a resumed stream begins a pass of its own.
"""

import hashlib
import json
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import or_
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from braceexpand import braceexpand
from fsspec import get_filesystem_class
from fsspec.utils import get_protocol

from pipeline.console import InputError, say
from pipeline.execution import Guarded, fit, valid_mask
from pipeline.faults import reason
from pipeline.images import Undecodable
from pipeline.ledger import Ledger
from pipeline.loader import group_ids, slice_of, to_device
from pipeline.plan import digest
from pipeline.prefetch import delivered
from pipeline.reader import ReadAhead
from pipeline.recipe import Cursor, Recipe, make_executor
from pipeline.samples import PACKED, Group, Keys, Unusable
from pipeline.sampling import draw_captions, sample_vectors
from pipeline.schema import Batch, sample_id_of
from pipeline.skips import Forgotten
from pipeline.tarstream import Sample, parsed, raw_samples
from pipeline.wording import Draw, tokens_of

SHUFFLE_BUFFER = 4096  # encoded samples
PARSED_AHEAD = 64
PARSE_TIMEOUT = 600.0  # seconds; nothing there waits for anybody


def shard_urls(pattern: str) -> list[str]:
    """`a/{000..009}.tar b.tar` → URLs. Raises InputError for shell pipes and for local files that are not there."""
    urls = [url for word in pattern.split() for url in braceexpand(word)]
    for url in urls:
        if url.startswith("pipe:"):
            raise InputError(f"data.stream: {url!r} would run a shell command; give files or fsspec URLs")
        if PACKED.search(url):
            raise InputError(f"data.stream: {url} is compressed: unpack it, images gain nothing from it")
        try:
            get_filesystem_class(get_protocol(url))
        except (ValueError, ImportError) as error:
            raise InputError(f"data.stream: {url}: {error}") from None
        if "://" not in url and not Path(url).is_file():
            raise InputError(f"data.stream: {url} does not exist: write folder/{{000..009}}.tar with the shards' numbers")
    if not urls:
        raise InputError("data.stream names no tar: write folder/{000..009}.tar with the shards' numbers")
    return urls


@dataclass(frozen=True)
class Stream:
    """Tars that are read in turn; samples whose id is in `skip_ids` (ascending) are passed over, as are those `gone`.

    `chosen` tells the skip lists; gone: what forgotten.parquet beside local tars names. A tar that gives nothing for
    `timeout` seconds is left for the next one.
    """

    urls: tuple[str, ...]
    skip_ids: np.ndarray
    chosen: dict[str, object]
    timeout: float = 60.0
    gone: Forgotten = field(default_factory=Forgotten)

    @classmethod
    def open(cls, pattern: str, skip_ids: np.ndarray, timeout: float = 60.0) -> "Stream":
        """Raises InputError."""
        urls = tuple(shard_urls(pattern))
        folders = {path.parent for url in urls if "://" not in url for path in (Path(url), Path(url).resolve())}
        gone = reduce(or_, map(Forgotten.beside, sorted(folders)), Forgotten())
        chosen: dict[str, object] = {"skip": digest(skip_ids) if len(skip_ids) else ""}
        return cls(urls, skip_ids, chosen, timeout, gone)

    @property
    def fingerprint(self) -> str:
        """Hash of the names of the shards: nobody has looked inside."""
        return hashlib.sha256(json.dumps(self.urls).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{len(self.urls):,} tars without an index (not exactly resumable)"

    def wants(self, row: Sample) -> bool:
        """Whether a parsed sample is neither skipped nor taken down."""
        at = int(np.searchsorted(self.skip_ids, row["sample_id"]))
        skipped = at < len(self.skip_ids) and self.skip_ids[at] == row["sample_id"]
        return not skipped and not self.gone.names(row["known"])

    def captions(self) -> Iterator[str]:
        """Every caption, in one pass over all tars."""
        reads = ReadAhead(1)
        for _, group in raw_samples(self.urls, reads, self.timeout):
            try:
                row = parsed(group)
            except Unusable:
                continue
            if self.wants(row):
                yield from row["captions"]
        reads.close()

    def loader(self, tokenizer: Callable[[list[str]], np.ndarray], recipe: Recipe, cursor: Cursor, batch_size: int,
               device: str = "cpu", rank: int = 0, world: int = 1, ledger: Ledger | None = None) -> "StreamLoader":
        """Batches from a fresh pass on."""
        return StreamLoader(self, tokenizer, recipe, cursor, batch_size, device, rank, world, ledger)


class StreamLoader:
    """Iterates (Batch, Cursor after it) without end. Each rank reads tars of its own; batches are never short.

    Unusable samples do not enter a batch; each has its line in the ledger. group_id is the smallest hash of a caption's
    token ids in the component, so that ranks that have not seen each other's samples number equal captions alike.
    """

    def __init__(self, stream: Stream, tokenizer: Callable[[list[str]], np.ndarray], recipe: Recipe, cursor: Cursor,
                 batch_size: int, device: str, rank: int, world: int, ledger: Ledger | None):
        if len(stream.urls) < world:
            raise InputError(f"data.stream has {len(stream.urls)} tars for {world} processes: each needs one of its own")
        self._stream, self._tokenizer, self._recipe, self._cursor = stream, tokenizer, recipe, cursor
        self._batch_size, self._device, self._rank, self._world = batch_size, device, rank, world
        part = slice_of(rank, world, batch_size)
        self._count = part.stop - part.start
        self._ledger = ledger or Ledger()
        self._executor = Guarded(make_executor(recipe, device))
        self._reads, self._parsers = ReadAhead(1), ReadAhead(min(recipe.threads or 4, 16))
        if cursor.samples_seen:
            say("a stream is not exactly resumable: it begins a pass of its own, with views of its own")

    def _pass(self, number: int, fault: Callable[[dict], None]) -> Iterator[Sample]:
        """This rank's usable samples of one pass over all tars, shuffled."""
        urls = random.Random(f"{self._cursor.seed} {number}").sample(self._stream.urls, len(self._stream.urls))
        raw = raw_samples(urls[self._rank :: self._world], self._reads, self._stream.timeout)
        shuffled = wds.shuffle(SHUFFLE_BUFFER, rng=random.Random(f"{self._cursor.seed} {number} {self._rank}"))
        yield from shuffled(self._usable(self._parsed(raw), fault))

    def _parsed(self, raw: Iterator[tuple[str, Group]]) -> Iterator[tuple[str, Group, Sample | Exception]]:
        """(url, group, its row or why there is none) in order, parsed on threads."""
        waiting: deque[tuple[str, Group, list[Future[Sample]]]] = deque()
        for url, group in raw:
            waiting.append((url, group, self._parsers.ask([partial(parsed, group)])))
            if len(waiting) >= PARSED_AHEAD:
                yield self._answer(*waiting.popleft())
        while waiting:
            yield self._answer(*waiting.popleft())

    def _answer(self, url: str, group: Group, future: list[Future[Sample]]) -> tuple[str, Group, Sample | Exception]:
        return url, group, self._parsers.answers(future, PARSE_TIMEOUT)[0]

    def _usable(self, rows: Iterator[tuple[str, Group, Sample | Exception]], fault: Callable[[dict], None]
                ) -> Iterator[Sample]:
        """The rows that are wanted; of equal keys in a tar the first usable one, as in the index."""
        keys, tar = Keys(), ""
        for url, group, row in rows:
            if url != tar:
                keys, tar = Keys(), url
            row = keys.judge(group, row)
            if isinstance(row, Exception):
                loose = {"sample": False} if group.loose else {}
                fault({"shard": url, "key": group.key, "reason": reason(row, Unusable, TimeoutError), **loose})
            elif self._stream.wants(row):
                yield {**row, "url": url}

    def _samples(self, faults: list[dict]) -> Iterator[tuple[int, Sample]]:
        """(pass, sample) without end. Raises InputError when a pass gives nothing."""
        number = self._cursor.samples_seen
        while True:
            empty = True
            for sample in self._pass(number, faults.append):
                empty = False
                yield number % 2**32, sample
            if empty:
                last = ": {shard}: {reason}".format(**faults[-1]) if faults else ""
                raise InputError(f"data.stream: no usable sample in {len(self._stream.urls)} tars{last}")
            number += 1

    def _batch(self, epochs: np.ndarray, samples: list[Sample], fault: Callable[[dict], None]) -> Batch:
        seed, ids = self._cursor.seed, np.array([s["sample_id"] for s in samples], np.int64)
        choices = [s["captions"] for s in samples]
        drawn = draw_captions(seed, epochs, 0, ids, np.array([len(c) for c in choices]))
        captions = [c[d] for c, d in zip(choices, drawn, strict=True)]
        sizes = np.array([[s["width"], s["height"]] for s in samples])
        vectors = sample_vectors(seed, epochs, 0, ids, sizes, self._recipe.kinds)
        (views, vectors, ids_B), bad = self._executor([_fit(s) for s in samples], vectors, ids)
        for b, why in bad.items():
            fault({"shard": samples[b]["url"], "key": samples[b]["key"], "reason": why})
        tokens = torch.from_numpy(tokens_of(self._tokenizer, captions, self._recipe.wording, Draw(seed, epochs, 0, ids)))
        texts = [row.tobytes() for row in tokens[:, 0].numpy()]
        groups = torch.from_numpy(_named(group_ids(ids, np.full(len(ids), -1), texts, list), texts))
        return to_device(Batch(views, vectors, tokens, ids_B, groups, valid_mask(len(ids), bad)), self._device)

    def _batches(self) -> Iterator[tuple[Batch, Cursor, list[dict]]]:
        faults: list[dict] = []
        samples, seen = self._samples(faults), self._cursor.samples_seen
        while True:
            chosen = [next(samples) for _ in range(self._count)]
            seen += self._batch_size
            batch = self._batch(np.array([e for e, _ in chosen], np.int64), [s for _, s in chosen], faults.append)
            lines = [{"samples": seen, **line} for line in faults]
            faults.clear()
            yield batch, replace(self._cursor, samples_seen=seen), lines

    def __iter__(self) -> Generator[tuple[Batch, Cursor], None, None]:
        """Raises WorkFailed past the bad-sample budget."""
        return delivered(self._batches(), self._ledger, self._wake, self.close)

    def _wake(self) -> None:
        self._reads.close()
        self._parsers.close()

    def close(self) -> None:
        """Give back threads and the executor's memory."""
        self._wake()
        self._executor.close()


def _fit(sample: Sample) -> bytes | Exception:
    try:
        return fit(sample["image"], sample["plain"])
    except Undecodable as error:
        return error


def _named(group_B: np.ndarray, texts: list[bytes]) -> np.ndarray:
    """Each component by the smallest hash of its captions' token ids."""
    name_B = np.array([sample_id_of(text) for text in texts], np.int64)
    smallest = name_B.copy()
    np.minimum.at(smallest, group_B, name_B)
    return smallest[group_B]
