"""robots.txt as RFC 9309 wants it read, against real servers; 127.0.0.2 stands for a private address."""

import threading

import pytest
from conftest import encoded, picture
from test_download import HERE, url_table
from webserver import serving

from pipeline.download import Options, download
from pipeline.fetch import USER_AGENT, Failure, Policy, fetch
from pipeline.robots import Robots

OPTIONS = {"distributor": "inline", "threads": 4, "allow_address": HERE}
LONG = b"# " + b"x" * 600_000


def refusal(site, path: str = "/a.jpg", user_agent: str = USER_AGENT) -> str:
    """Why `path` may not be fetched; empty when it may."""
    policy = Policy(timeout=1, deadline=2, allow=HERE, user_agent=user_agent)
    try:
        assert fetch(site.url(path), policy, judge=Robots(policy).judge) == b"picture"
    except Failure as failure:
        return failure.reason
    return ""


def test_robots_txt_is_obeyed_on_every_hop(tmp_path):
    with serving() as site, serving() as other:
        site.pages["/robots.txt"] = b"User-agent: *\nDisallow: /private\n\nUser-agent: uniclip\nDisallow: /ours"
        other.pages["/robots.txt"] = b"User-agent: *\nDisallow: /"
        site.pages |= {"/ok.jpg": encoded(picture(0)), "/ours/1.jpg": encoded(picture(1)),
                       "/private/2.jpg": encoded(picture(2)), "/hop.jpg": (302, {"Location": other.url("/x.jpg")}, b"")}
        other.pages["/x.jpg"] = encoded(picture(3))
        urls = [site.url(path) for path in ("/ok.jpg", "/ours/1.jpg", "/private/2.jpg", "/hop.jpg")]
        table = url_table(tmp_path / "u.parquet", urls)
        report = download(table, tmp_path / "out", Options(robots=True, **OPTIONS))
        assert (report.stored, report.failed) == (2, {"robots.txt": 2})
        assert (site.hits["/robots.txt"], site.hits["/ours/1.jpg"], other.hits["/x.jpg"]) == (1, 0, 0)
        assert download(table, tmp_path / "all", Options(**OPTIONS)).stored == 4


@pytest.mark.parametrize(("rules", "path", "may"), [
    ("Disallow: /a", "/a.jpg", False), ("Disallow:", "/a.jpg", True), ("Disallow: /a.jpg$", "/a.jpg", False),
    ("Disallow: /a.jpg$", "/a.jpg?x", True), ("Disallow: /a.jpg$", "/a.jpg#x", False),
    ("Disallow: /*x", "/a.jpg#x", True), ("Disallow: /*.jpg", "/b/a.jpg", False), ("Disallow: /*.png$", "/a.jpg", True),
    ("Disallow: /*/c/*.jpg$", "/b/c/a.jpg", False), ("Disallow: /\nAllow: /b/", "/b/a.jpg", True),
    ("Allow: /b/\nDisallow: /b/a", "/b/a.jpg", False), ("Allow: /b\nDisallow: /b", "/b/a.jpg", True),
    ("Disallow: /%C3%BC", "/ü.jpg", False), ("Disallow: /ü", "/%C3%BC.jpg", False),
    ("Disallow: /*?size=", "/a.jpg?size=1", False),
    ("Allow: /\n\nUser-agent: other\nDisallow: /", "/a.jpg", True),
    ("Allow: /\n\nUser-agent: UniCLIP\nDisallow: /a", "/a.jpg", False),
    ("Allow: /\n\nUser-agent: uniclip\nDisallow: /b\n\nUser-agent: uniclip\nDisallow: /a", "/a.jpg", False),
    ("Disallow: /\n\nUser-agent: other\nUser-agent: uniclip/0.1\nDisallow: /b", "/a.jpg", True),
    ("Disallow: /" + "*a" * 5000 + "$", "/" + "a" * 5000 + "b", True),
])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_rules_are_read_as_the_standard_says(start, rules, path, may):
    with serving() as site:
        site.pages |= {"/robots.txt": start + b"User-agent: *\n" + rules.encode(), path.partition("#")[0]: b"picture"}
        site.pages.setdefault("/ü.jpg", b"picture")
        assert refusal(site, path) == ("" if may else "robots.txt")


@pytest.mark.parametrize(("answer", "reason"), [
    ((404, {}, b""), ""), ((403, {}, b"User-agent: *\nDisallow: /"), ""), ((503, {}, b""), "http 503"),
    ((500, {}, b""), "http 500"), ((429, {}, b""), "http 429"), (b"\xff\xfe nonsense", ""), (b"<html>", ""), (b"", ""),
    (lambda handler: None, "connection broken"), (lambda handler: handler.connection.recv(1), "timeout"),
    ((200, {"Content-Length": "99"}, b"User-agent: *\n"), "connection broken"),
    (LONG + b"\nUser-agent: *\nDisallow: /", ""), (b"User-agent: *\nDisallow: /a\n" + LONG, "robots.txt"),
    (b"User-agent: *\nAllow: /b#" + b"x" * (512_000 - 37) + b"\nDisallow: /abc", ""),
    ((200, {"X-Robots-Tag": "noindex"}, b"User-agent: *\nDisallow: /b"), ""),
    ((301, {"Location": "/rules"}, b""), "robots.txt"), ((302, {"Location": "http://127.0.0.2/"}, b""), "refused address"),
    ((302, {"Location": "/robots.txt"}, b""), "too many redirects"),
])
def test_robots_txt_that_cannot_be_read_closes_the_site_unless_it_is_not_there(answer, reason):
    with serving() as site:
        site.pages |= {"/robots.txt": answer, "/a.jpg": b"picture", "/rules": b"User-agent: *\nDisallow: /a"}
        assert refusal(site) == reason
        assert site.hits["/a.jpg"] == (not reason)


def test_the_rules_for_another_user_agent_are_asked_by_its_own_name():
    with serving() as site:
        site.pages |= {"/robots.txt": b"User-agent: *\nDisallow: /\n\nUser-agent: acmebot\nAllow: /", "/a.jpg": b"picture"}
        assert refusal(site) == "robots.txt"
        assert refusal(site, user_agent="AcmeBot/2.1 (+mailto:a@example.com)") == ""


def test_a_site_is_asked_once_by_many_threads():
    with serving() as site:
        site.pages |= {"/robots.txt": b"User-agent: *\nDisallow: /b", "/a.jpg": b"picture"}
        judge = Robots(Policy(timeout=1, allow=HERE)).judge
        threads = [threading.Thread(target=judge, args=[site.url("/a.jpg")]) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert site.hits["/robots.txt"] == 1
