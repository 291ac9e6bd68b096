"""Opt-outs in every spelling that is legal, and in those that people write."""

import pytest

from pipeline.optouts import opted_out, reserved

AGENT = "Mozilla/5.0 (compatible; uniclip/0.1)"


@pytest.mark.parametrize("headers", [
    ["noai"], ["NoAI"], ["noimageai"], ["none"], ["noml"], ["noimageindex"], ["noindex"], ["nofollow, noai"],
    ["nofollow", "noai"],
    ["noai, max-snippet:20"], ["max-snippet:20, noai"], ["*: noai"], ["uniclip: noai"], ["UniCLIP: nofollow, noai"],
    ["img2dataset: noai"], ["otherbot: nofollow, uniclip: noai"], ["otherbot: all", "uniclip: noai"],
    ["unavailable_after: Wed, 21 Oct 2015 07:28:00 GMT, noai"], ["unavailable_after: 2015-10-21T07:28:00Z, noai"],
    ["unavailable_after: Wed, 2015-10-21T07:28:00Z, noai"], ["unavailable_after: 25-Jun-2010, 15:00:00 PST; noai"],
    ["unavailable_after: 25 Jun 2010 15:00:00 GMT noai"], ["noai=1"], ["noai: 1"], ['"noai"'], ["'noai, nofollow'"], ["noai."],
    ["[noai]"], ["noarchive. noai."], ["no-ai"], ["no_image_ai"], ["nofollow noai"], ["nofollow; noai"], ["noai : 1"],
    ["uniclip : noai"], ["uniclip/0.1: noai"], ['"uniclip": "noai"'], ["max-age: 5, noai"], ["tdm-reservation: 1"],
    ["noarchive, tdm-reservation=1"], ["max-image-preview: large noai"],
])
def test_forbids(headers):
    assert opted_out(headers, AGENT)


@pytest.mark.parametrize("headers", [
    [], [""], [","], [":"], ["all"], ["nofollow"], ["noarchive, max-image-preview: large"], ["otherbot: noai"],
    ["otherbot : noai"], ["otherbot: nofollow, noai"], ["otherbot/2.0: noindex; noai"], ['"otherbot": noai'],
    ["max-snippet: none"], ["max-snippet=none"], ["otherbot: max-snippet:20, noai"], ["tdm-reservation: 0"], ["noairplane"],
    ["unavailable_after: Wed, 21 Oct 2015 07:28:00 GMT"], ["otherbot: unavailable_after: 2015-10-21T07:28:00Z, noai"],
])
def test_forbids_nothing(headers):
    assert not opted_out(headers, AGENT)


@pytest.mark.parametrize(("values", "forbidden"), [
    (["1"], True), ([" 1 "], True), (['"1"'], True), (["0", "1"], True), (["1; policy=x"], True), ([], False), (["0"], False),
    (["10"], False), ([""], False), (["x1"], False),
])
def test_tdm_reservation(values, forbidden):
    assert reserved(values) is forbidden
