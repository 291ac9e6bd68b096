"""The texts that DeCLIP makes of a caption: what each operation may do, how often, and that draws depend on nothing else."""

from collections import Counter

import numpy as np
import pytest

from pipeline.console import InputError
from pipeline.text import CaptionTokenizer
from pipeline.wording import CHOSEN, EXCHANGED, HIDDEN, SHARE, WORDS, Draw, Wording, delete, masked, swap


class Numbered:
    """A vocabulary of 1,000: start 998, end 999; captions are their tokens."""

    start_id, end_id, vocab_size = 998, 999, 1000

    def __call__(self, captions: list[str]) -> np.ndarray:
        ids = np.zeros((len(captions), 64), np.int64)
        for row, caption in zip(ids, captions, strict=True):
            tokens = [998, *(int(word) % 998 for word in caption.split()[:62]), 999]
            row[:len(tokens)] = tokens
        return ids


def captions(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(map(str, rng.integers(1, 998, rng.integers(0, 60)))) for _ in range(count)]


def draw(count: int, seed: int = 0) -> Draw:
    return Draw(seed, np.arange(count) % 3, np.zeros(count, np.int64), np.arange(count) + 10**12)


def test_masking_takes_15_of_100_tokens_and_treats_them_as_bert_does():
    token_BL = Numbered()(captions(6000))
    read_BL = masked(token_BL, Numbered(), draw(6000))
    chosen_BL = read_BL < 0
    inside_BL = (token_BL > 0) & (token_BL < 998)
    assert not (chosen_BL & ~inside_BL).any(), "start, end and padding are never chosen"
    assert np.array_equal(read_BL[~chosen_BL], token_BL[~chosen_BL])
    tokens, read, was = inside_BL.sum(), -1 - read_BL[chosen_BL], token_BL[chosen_BL]
    assert tokens > 150_000
    assert chosen_BL.sum() / tokens == pytest.approx(CHOSEN, abs=0.004)
    assert (read == 998).mean() == pytest.approx(HIDDEN, abs=0.01)
    other = (read != 998) & (read != was)
    assert other.mean() == pytest.approx(EXCHANGED, abs=0.008)
    assert ((read == was).mean()) == pytest.approx(1 - HIDDEN - EXCHANGED, abs=0.008)
    assert read.max() == 998, "no end token is put inside"
    assert len(np.unique(read[other])) > 800


def test_texts_depend_on_the_sample_and_its_epoch_alone():
    wording, words, every = Wording(), captions(40), draw(40)
    whole = wording.texts(Numbered(), words, every)
    assert whole.shape == (40, 3, 64)
    part = Draw(0, every.epoch[7:9], every.repeat[7:9], every.sample_id_B[7:9])
    assert np.array_equal(wording.texts(Numbered(), words[7:9], part), whole[7:9])
    for other in (draw(40, seed=1), Draw(0, every.epoch + 1, every.repeat, every.sample_id_B)):
        assert not np.array_equal(wording.texts(Numbered(), words, other)[:, 1:], whole[:, 1:])


def test_a_swap_exchanges_words_and_a_deletion_leaves_a_part_in_order():
    words, rng, kept = [f"w{n}" for n in range(9)], np.random.default_rng(0), []
    for _ in range(2000):
        swapped = swap(words, rng.random(WORDS))
        assert sorted(swapped) == words
        assert sum(a != b for a, b in zip(swapped, words, strict=True)) == 2
        left = delete(words, rng.random(WORDS))
        assert left == [word for word in words if word in left]
        kept.append(len(left) / 9)
    assert np.mean(kept) == pytest.approx(1 - SHARE, abs=0.01)
    assert sum(a != b for a, b in zip(swap(words * 5, rng.random(WORDS)), words * 5, strict=True)) > 2
    assert swap(["one"], rng.random(WORDS)) == delete(["one"], np.zeros(WORDS)) == ["one"]


def test_operations_are_drawn_alike_and_synonyms_come_from_the_table(tmp_path):
    table = tmp_path / "synonyms.tsv"
    table.write_text("Red\tcrimson, Dark Red\ncat\tfeline\n")
    wording = Wording.read(table)
    assert wording.synonyms == {"red": ("crimson", "dark red"), "cat": ("feline",)}
    words = ["a", "red", "cat", "on", "the", "blue", "mat"]
    altered = wording.altered([" ".join(words)] * 6000, draw(6000))
    kinds = Counter("replaced" if {"crimson", "feline", "dark"} & set(text.split()) else
                    "swapped" if sorted(text.split()) == sorted(words) else "deleted"
                    for text in altered)
    untouched = (1 - SHARE) ** 7 / 3  # deletions that deleted nothing
    assert kinds["replaced"] / 6000 == pytest.approx(1 / 3, abs=0.02)
    assert kinds["swapped"] / 6000 == pytest.approx(1 / 3 + untouched, abs=0.02)
    assert {"a crimson cat on the blue mat", "a red feline on the blue mat"} < set(altered)
    assert any("dark red" in text for text in altered)
    without = Wording().altered(["a red cat"] * 500, draw(500))
    assert not any(word in text for text in without for word in ("crimson", "feline"))
    assert wording.digest
    assert not Wording().digest


def test_captions_without_words_and_our_own_tokenizer():
    tokenizer = CaptionTokenizer.train(["a red cat", "a blue dog"] * 20, 300, 12)
    texts = Wording().texts(tokenizer, ["", "cat", "a red cat on a mat " * 60], draw(3))
    assert (texts[:, :2, 0] == tokenizer.start_id).all()
    assert ((texts == tokenizer.end_id).sum(2) == 1).all()
    assert (texts[0, 0] == texts[0, 2]).all()


@pytest.mark.parametrize("content, message", [("red crimson\n", "line 1: 'red crimson' is not"), ("a\tb\nred\t ,\n", "line 2")])
def test_a_table_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "table.tsv").write_text(content)
    with pytest.raises(InputError, match=message):
        Wording.read(tmp_path / "table.tsv")
    with pytest.raises(InputError, match="objective.synonyms"):
        Wording.read(tmp_path / "none.tsv")
