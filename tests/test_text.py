"""Tokens equal open_clip's; a trained vocabulary survives its file."""

import html
import random
import re
import subprocess
import sys
import time

import ftfy
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.text import Alike, CaptionTokenizer, clean, says_nothing

CAPTIONS = ["a small red circle left of a large blue square", "Hello  WORLD!! it's 2024 &amp;amp; café 😀 naïve",
            "", "don't we'll 'quoted' -- 12345", "日本語テキスト", "a" * 400, "x " * 200, "weird\tspace â€œmojibakeâ€\x9d"]


@pytest.fixture(scope="module")
def reference():
    import open_clip

    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def clip():
    return CaptionTokenizer.clip()


def test_clips_vocabulary_has_its_size_and_specials(clip):
    assert (clip.vocab_size, clip.start_id, clip.end_id) == (49_408, 49_406, 49_407)


def test_ids_equal_open_clips(clip, reference):
    assert np.array_equal(clip(CAPTIONS), reference(CAPTIONS).numpy())


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cn", "Cs")), max_size=60))
def test_ids_equal_open_clips_on_any_text(clip, reference, text):
    assume("_of_text>" not in text.lower())  # open_clip lets a caption forge special tokens; we do not
    assert np.array_equal(clip([text]), reference([text]).numpy())


def test_a_trained_vocabulary_survives_its_file():
    tokenizer = CaptionTokenizer.train(CAPTIONS * 20, 400, 16)
    again = CaptionTokenizer.from_json(tokenizer.to_json(), 16)
    ids = tokenizer(CAPTIONS)
    assert np.array_equal(again(CAPTIONS), ids)
    assert ids.shape == (len(CAPTIONS), 16)
    assert (ids[:, 0] == tokenizer.start_id).all()
    assert ((ids == tokenizer.end_id).sum(1) == 1).all()
    assert tokenizer.vocab_size <= 400


@pytest.mark.parametrize("make", [CaptionTokenizer.clip, lambda: CaptionTokenizer.train(CAPTIONS, 400, 77)])
def test_a_caption_cannot_forge_special_tokens(make):
    tokenizer = make()
    for again in (tokenizer, CaptionTokenizer.from_json(tokenizer.to_json(), 77)):
        ids = again(["<end_of_text> after <start_of_text><pad>"])[0]
        assert (ids == again.end_id).sum() == (ids == again.start_id).sum() == 1
        assert ids[1] != again.end_id



def test_equal_captions_train_equal_vocabularies_in_every_process():
    code = ("import hashlib; from pipeline.text import CaptionTokenizer as T; "
            "print(hashlib.sha256(T.train([f'a {c} {s} left of it' for c in ('red', 'teal', 'blue', 'grey') "
            "for s in ('circle', 'square', 'star')], 330, 16).to_json().encode()).hexdigest())")
    assert len({subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(3)}) == 1


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=0x17F), max_size=40))
def test_the_short_way_of_cleaning_is_the_long_one(text):
    assert clean(text) == re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip().lower()


@pytest.mark.parametrize("make", [lambda: CaptionTokenizer.clip(6), lambda: CaptionTokenizer.clip(20),
                                  lambda: CaptionTokenizer.train(CAPTIONS, 300, 12)])
def test_captions_are_alike_exactly_where_their_ids_are(make):
    """Case, blanks, Unicode forms, entities, apostrophes, and what the context cuts off; short ids, and bytes of letters."""
    words = ["Red", "red", "it's", "it 's", "café", "cafe\u0301", "ＣＡＦÉ", "&amp;", "&", "&amp;amp;", "🐕", "日本", "12",
             "1 2", "a", "â€œ", "“", "ﬁ", "fi", "\u00a0", "\t", "ß", "x" * 9]
    draw, tokenizer = random.Random(1), make()
    captions = [draw.choice(["", " ", "  "]).join(draw.choices(words, k=draw.randint(0, 7))) for _ in range(3000)]
    ids = [row.tobytes() for row in tokenizer(captions)]
    alike = Alike(tokenizer)(captions)
    assert len(set(zip(ids, alike, strict=True))) == len(set(ids)) == len(set(alike)) < len(set(captions))


LAYERED = ["amp;", "AMP;", "#38;", "#x26;", "#038;", "#X0026;", "#65286;", "ａｍｐ；", "lt;", "nbsp;", "#32;", "&", "＆", "<",
           "\n", " ", "a", "é", "â€œ", ";"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(LAYERED), max_size=12).map(lambda parts: "&" + "".join(parts)))
def test_an_ampersand_escaped_many_times_is_cleaned_as_ftfy_does(text):
    assert clean(text) == re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip().lower()


@pytest.mark.parametrize(("text", "nothing"), [("&" + "amp;" * 250_000, False), ("&" + "#38;" * 250_000, False),
                                               ("＆" + "ａｍｐ；" * 250_000, False), ("&" + "amp;" * 249_999 + "nbsp;", True),
                                               ("日" + "&amp;" * 199_999, False), ("&nbsp;" * 166_666, True)])
def test_a_million_characters_are_judged_in_seconds(text, nothing):
    begun = time.perf_counter()
    assert says_nothing(text) is nothing
    clean(text)
    assert time.perf_counter() - begun < 4
