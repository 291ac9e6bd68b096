"""Three texts of a caption for DeCLIP: itself, one easily altered, one masked. Drawn by counter, like everything else.

EDA (Wei & Zou 2019) takes one of synonym replacement, random swap and random deletion. Synonyms come from a table that the
user gives: WordNet's data are in no package. Masking is BERT's: of 15 % of the tokens 80 % are hidden, 10 % exchanged, and
10 % left as they are. B captions, T = 3 texts, L tokens.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.console import InputError, existing
from pipeline.sampling import EDA_STREAM, MASK_STREAM, uniforms
from pipeline.text import clean

SHARE = 0.1  # of the words that EDA alters; at least one word, except by deletion
WORDS = 128  # that may be altered; the rest of a longer caption is far behind any context
CHOSEN, HIDDEN, EXCHANGED = 0.15, 0.8, 0.1


class Tokenizer(Protocol):
    """What pipeline.text.CaptionTokenizer offers."""

    start_id: int
    end_id: int
    vocab_size: int

    def __call__(self, captions: list[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Draw:
    """What the numbers of B samples are drawn from; epoch and repeat may differ by sample."""

    seed: int
    epoch: np.ndarray | int
    repeat: np.ndarray | int
    sample_id_B: np.ndarray

    def __call__(self, stream: int, item: int, count: int) -> np.ndarray:
        """(count, B) in (0, 1)."""
        return uniforms(self.seed, self.epoch, self.repeat, self.sample_id_B, stream, item, count)


@dataclass(frozen=True)
class Wording:
    """Makes the texts. synonyms: word → words that may stand for it; digest: of the table, empty without one."""

    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    digest: str = ""

    @classmethod
    def read(cls, path: Path | None) -> "Wording":
        """A table of lines `word<TAB>synonym, synonym, …`. Raises InputError."""
        if path is None:
            return cls()
        existing(path, "table of synonyms", "set objective.synonyms to a text file, or leave it out")
        text, synonyms = path.read_text(encoding="utf-8-sig"), {}
        for number, line in enumerate(text.splitlines(), start=1):
            word, tab, others = line.partition("\t")
            if not tab or not (found := tuple(other for part in others.split(",") if (other := clean(part)))):
                raise InputError(f"{path}, line {number}: {line!r} is not `word<TAB>synonym, synonym`")
            synonyms[clean(word)] = found
        return cls(synonyms, hashlib.sha256(text.encode()).hexdigest())

    def texts(self, tokenizer: Tokenizer, captions: list[str], draw: Draw) -> np.ndarray:
        """Caption, altered caption, masked caption → (B, 3, L) int64; see `masked`."""
        token_BL = tokenizer(captions)
        altered_BL = tokenizer(self.altered(captions, draw))
        return np.stack([token_BL, altered_BL, masked(token_BL, tokenizer, draw)], axis=1)

    def altered(self, captions: list[str], draw: Draw) -> list[str]:
        """Each caption, by one operation; which one is drawn first."""
        operations = [swap, delete, *([self._replace] if self.synonyms else [])]
        altered = []
        for caption, u in zip(captions, draw(EDA_STREAM, 0, 1 + WORDS).T, strict=True):
            words = clean(caption).split(" ")
            operation = operations[int(u[0] * len(operations))]
            altered.append(" ".join([*operation(words[:WORDS], u[1:]), *words[WORDS:]]))
        return altered

    def _replace(self, words: list[str], u: np.ndarray) -> list[str]:
        """Some of the words that have synonyms, by one of them."""
        places = [n for n, word in enumerate(words) if word in self.synonyms]
        words = list(words)
        for n in sorted(places, key=lambda n: u[n])[:_count(words)]:
            others = self.synonyms[words[n]]
            words[n] = others[int(u[(n + WORDS // 2) % WORDS] * len(others))]
        return words


def _count(words: list[str]) -> int:
    return max(1, round(SHARE * len(words)))


def swap(words: list[str], u: np.ndarray) -> list[str]:
    """Two words change places, as often as SHARE says."""
    words = list(words)
    for a, b in u[: 2 * _count(words)].reshape(-1, 2) if len(words) > 1 else ():
        first = int(a * len(words))
        second = (first + 1 + int(b * (len(words) - 1))) % len(words)
        words[first], words[second] = words[second], words[first]
    return words


def delete(words: list[str], u: np.ndarray) -> list[str]:
    """Each word goes with probability SHARE; one stays."""
    return [word for word, x in zip(words, u, strict=False) if x >= SHARE] or [words[int(u[-1] * len(words))]]


def masked(token_BL: np.ndarray, tokenizer: Tokenizer, draw: Draw) -> np.ndarray:
    """The tokens as they are to be read, where a chosen one is −1 − id: no id is negative, none is read by mistake.

    A start token inside a text is the mask; it stands nowhere else. Tokens after the end, and both special ones, stay.
    """
    length = token_BL.shape[1]
    chosen, kind, other = (draw(MASK_STREAM, item, length).T for item in range(3))
    inside_BL = (np.cumsum(token_BL == tokenizer.end_id, axis=1) == 0) & (np.arange(length) > 0)
    plain = np.setdiff1d(np.arange(tokenizer.vocab_size), [tokenizer.start_id, tokenizer.end_id])
    read_BL = np.select([kind < HIDDEN, kind < HIDDEN + EXCHANGED],
                        [np.full_like(token_BL, tokenizer.start_id), plain[(other * len(plain)).astype(np.int64)]], token_BL)
    return np.where(inside_BL & (chosen < CHOSEN), -1 - read_BL, token_BL)


def tokens_of(tokenizer: Callable[[list[str]], np.ndarray] | Tokenizer, captions: list[str], wording: Wording | None,
              draw: Draw) -> np.ndarray:
    """The texts of B samples → (B, T, L) int64: captions alone, or all that `wording` makes of them."""
    if wording is None:
        return tokenizer(captions)[:, None]
    return wording.texts(tokenizer, captions, draw)  # type: ignore[arg-type]  # a wording comes with our tokenizer
