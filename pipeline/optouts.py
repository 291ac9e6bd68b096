"""Whether a server's headers forbid the use of what it sends: X-Robots-Tag, and the tdm-reservation of W3C's TDMRep."""

import re
from collections.abc import Iterable, Iterator

# Words are compared without - and _, so that `no-ai` counts too.
OPT_OUTS = frozenset({"noai", "noimageai", "noml", "none", "noindex", "noimageindex"})
_OTHERS = {"all", "index", "follow", "archive", "snippet", "imageindex", "translate", "nofollow", "noarchive", "nocache",
           "nosnippet", "notranslate", "noodp", "noydir", "noyaca", "indexifembedded", "maxsnippet", "maximagepreview",
           "maxvideopreview", "unavailableafter", "tdmreservation"}
_DIRECTIVES = OPT_OUTS | _OTHERS
_VALUE = re.compile(r"(?:max-snippet|max-image-preview|max-video-preview|unavailable_after)\s*[:=]\s*\S*|=\s*\S*")
_WORD = re.compile(r"[*a-z0-9][a-z0-9_-]*")
_RESERVED = re.compile(r"\btdm-reservation\W*1\b")


def opted_out(values: Iterable[str], user_agent: str) -> bool:
    """Whether X-Robots-Tag header values forbid use by us: one `directive` or `agent: directive` between commas.

    Loose spellings count too: `;` or blanks between directives, quotes, full stops, a directive with a value. An agent's
    scope lasts to the end of its header or to the next agent. Grammar:
    developers.google.com/search/docs/crawling-indexing/robots-meta-tag.
    """
    ours = {"*", "all", "uniclip", "img2dataset", *_words(user_agent.lower())}
    return any(_RESERVED.search(value.lower()) or not OPT_OUTS.isdisjoint(_directives(value.lower(), ours)) for value in values)


def reserved(values: Iterable[str]) -> bool:
    """Whether tdm-reservation header values reserve the rights to mine what is sent."""
    return any(re.findall(r"\w+", value)[:1] == ["1"] for value in values)


def _directives(value: str, ours: set[str]) -> Iterator[str]:
    """The words of one header value that apply to us. A name before a colon is an agent's where a directive follows."""
    applies = True
    for part in re.split("[,;]", value):
        before, colon, after = part.partition(":")
        agent, first = _words(before)[-1:], _words(after)[:1]
        if colon and agent and first and first[0] in _DIRECTIVES and agent[0] not in _DIRECTIVES:
            applies, part = agent[0] in ours, after
        if applies:
            yield from _words(_VALUE.sub(" ", part))


def _words(text: str) -> list[str]:
    """Names of directives or agents; of `uniclip/0.1` the name alone."""
    return [word.replace("-", "").replace("_", "") for word in _WORD.findall(re.sub(r"/\d[\w.]*", " ", text))]
