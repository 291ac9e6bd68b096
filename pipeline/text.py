"""Caption → token ids: CLIP's vocabulary, or a byte-level BPE trained on one's own captions, one class for both."""

import gzip
import html
import importlib.util
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from pipeline.console import InputError

END_OF_WORD = "</w>"
START, END, PAD = "<start_of_text>", "<end_of_text>", "<pad>"
CLIP_MERGES = 49_152 - 256 - 2
_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
_SPACES = re.compile(r"\s+")
CAPTION_CHARACTERS = 1_000_000  # of one sample's captions together; Flickr's longest description has 65,535
_SEEN = re.compile("[0-9A-Za-z]")
_CODE = re.compile(r"&(?:amp;|#38;|#x26;)*#?\w+;?|\x1b.*", re.IGNORECASE | re.DOTALL)  # entities, and a terminal's codes
# An ampersand that was escaped again and again: ftfy takes off one layer a pass over all of the text. It does so up to the
# first line with "<"; also where the letters are full-width.
_LAYERS = re.compile("[&\uff06](?:(?:[a\uff41][m\uff4d][p\uff50]|[A\uff21][M\uff2d][P\uff30])[;\uff1b]"
                     "|#0{0,18}(?:38|65286);|#[xX]0{0,18}(?:26|[fF][fF]06);)+")
_GLANCE = 4096  # characters of a long caption, which mostly show whether it says something
# Letters, marks and signs that nobody sees: fillers, joiners, the empty Braille pattern, variation selectors.
_BLANK = {*"\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0",
          *map(chr, range(0xFE00, 0xFE10)), *map(chr, range(0xE0100, 0xE01F0))}


def clean(caption: str) -> str:
    """CLIP's normalisation: mojibake mended, HTML entities decoded twice, spaces collapsed, lower case."""
    if caption.isascii() and caption.isprintable() and "&" not in caption:  # nothing to mend, and a fiftieth of the time
        return " ".join(caption.split()).lower()
    caption = html.unescape(html.unescape(ftfy.fix_text(_unlayered(caption))))
    return _SPACES.sub(" ", caption).strip().lower()


def _unlayered(caption: str) -> str:
    """What ftfy makes the same of, in a time that does not grow with the square of the length."""
    tag = caption.find("<")
    stop = len(caption) if tag < 0 else caption.rfind("\n", 0, tag) + 1
    return _LAYERS.sub("&", caption[:stop]) + caption[stop:]


def cleaned(captions: Sequence[str]) -> list[str]:
    """`clean` of each."""
    return [clean(caption) for caption in captions]


class Alike:
    """Which captions are one to the model: those of equal token ids, whatever their case, blanks, forms and what is cut off.

    Only captions that open alike are tokenised: each rank asks this of the global batch. Equal ids spell equal bytes, blanks
    aside, and each id but a blank between two words spells one at least.
    """

    def __init__(self, tokenizer: Callable[[list[str]], np.ndarray]):
        self._tokenizer = tokenizer
        self._opening = max(0, tokenizer([""]).shape[1] - 2) // 2  # bytes, without start and end token

    def __call__(self, captions: Sequence[str]) -> list[str | bytes]:
        """Something for each caption that is equal where the token ids are."""
        openings: dict[bytes, list[str]] = {}
        for caption in dict.fromkeys(captions):
            openings.setdefault(clean(caption).replace(" ", "").encode()[:self._opening], []).append(caption)
        doubtful = [caption for those in openings.values() if len(those) > 1 for caption in those]
        ids = [row.tobytes() for row in self._tokenizer(doubtful)] if doubtful else []
        of = dict(zip(doubtful, ids, strict=True))
        return [of.get(caption, caption) for caption in captions]


def says_nothing(caption: str) -> bool:
    """Whether a cleaned caption shows nothing: blanks, entities such as &nbsp;, zero-width and control characters."""
    if _SEEN.search(_CODE.sub("", caption) if "&" in caption or "\x1b" in caption else caption):
        return False  # what nearly all are, in a fiftieth of the time
    if len(caption) > _GLANCE and not _blank(clean(re.sub(r"[&\x1b].{0,40}$", "", _unlayered(caption)[:_GLANCE]))):
        return False  # what cleaning costs may grow with the square of the length
    return _blank(clean(caption))


def _blank(cleaned: str) -> bool:
    return all(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Zs") or c in _BLANK for c in cleaned)


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order of CLIP's vocabulary (printable ones first)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(others)]


def _words() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(_WORDS, behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _spaced() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=True)


def _rules(bpe: Tokenizer) -> dict[str, Any]:
    """All that a tokenizer's file says but its words."""
    told = json.loads(bpe.to_str())
    words = ("added_tokens", "vocab", "merges")
    return {name: value for part in (told, told.pop("model")) for name, value in part.items() if name not in words}


class CaptionTokenizer:
    """Captions → (n, context) int64 ids: start token, text, end token, padding with id 0.

    The text is cut so that the end token is always there. Special tokens written inside a caption are plain text.
    """

    def __init__(self, bpe: Tokenizer, context: int):
        bpe.encode_special_tokens = True  # in captions they are text like any other
        self._bpe, self.context = bpe, context
        start, end = bpe.token_to_id(START), bpe.token_to_id(END)
        if start is None or end is None:
            raise InputError(f"tokenizer has no {START} or {END}: use one that this project wrote")
        self.start_id, self.end_id, self.vocab_size = start, end, bpe.get_vocab_size()

    def __call__(self, captions: list[str]) -> np.ndarray:
        """→ (n, context) int64."""
        ids = np.zeros((len(captions), self.context), np.int64)
        for row, encoded in zip(ids, self._bpe.encode_batch([clean(c) for c in captions], add_special_tokens=False),
                                strict=True):
            tokens = [self.start_id, *encoded.ids[: self.context - 2], self.end_id]
            row[: len(tokens)] = tokens
        return ids

    def to_json(self) -> str:
        """The `tokenizers` file format."""
        return self._bpe.to_str()

    @classmethod
    def from_json(cls, told: str, context: int) -> "CaptionTokenizer":
        """What `to_json` wrote. Raises InputError for a tokenizer that works otherwise: it may be from anybody."""
        try:
            bpe = Tokenizer.from_str(told)
        except BaseException as error:  # of `tokenizers`: a plain Exception, or Rust's panic, which is none
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise InputError(f"not a file of `tokenizers`: {error}") from None
        ids = bpe.get_vocab().values()
        if sorted(ids) != list(range(len(ids))):
            raise InputError("its token ids are not 0, 1, 2 … without a gap")
        if _rules(bpe) not in (_rules(cls._with(_words(), END_OF_WORD)), _rules(cls._with(_spaced(), None))):
            raise InputError("it splits or alters text otherwise than a vocabulary of this project")
        return cls(bpe, context)

    @staticmethod
    def _with(pre_tokenizer: pre_tokenizers.PreTokenizer, suffix: str | None, **words: Any) -> Tokenizer:
        """A BPE with these words, none unless given."""
        closing = {"end_of_word_suffix": suffix, "continuing_subword_prefix": ""} if suffix else {}
        bpe = Tokenizer(models.BPE(**words, **closing))
        bpe.pre_tokenizer = pre_tokenizer
        return bpe

    @classmethod
    def clip(cls, context: int = 77) -> "CaptionTokenizer":
        """CLIP's byte-pair vocabulary of 49,408, read from the merges that open_clip_torch carries."""
        spec = importlib.util.find_spec("open_clip")  # found, not imported: importing it takes seconds
        if spec is None or not spec.submodule_search_locations:
            raise InputError("open_clip_torch is not installed: it carries CLIP's vocabulary (pip install open_clip_torch)")
        path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : CLIP_MERGES + 1]
        merges = [(left, right) for left, right in (line.split() for line in lines)]
        letters = _byte_letters()
        tokens = [*letters, *(x + END_OF_WORD for x in letters), *(a + b for a, b in merges), START, END]
        vocab = {token: number for number, token in enumerate(tokens)}
        return cls(cls._with(_words(), END_OF_WORD, vocab=vocab, merges=merges), context)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context: int) -> "CaptionTokenizer":
        """A byte-level BPE of at most `vocab_size` tokens, learnt from `captions`; equal captions give equal ids.

        GPT-2's form, where a word's leading space is part of it: with CLIP's end-of-word suffix the `tokenizers` trainer
        numbers its letters in the order of a randomly seeded hash map, differently in every process.
        """
        bpe = cls._with(_spaced(), None)
        bpe.train_from_iterator((clean(c) for c in captions), trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[PAD, START, END], initial_alphabet=_byte_letters(), show_progress=False))
        return cls(bpe, context)
