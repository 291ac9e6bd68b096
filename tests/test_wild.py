"""The drill with 1,700 URLs of hostile servers through the real download; the account is held against the servers' own plan."""

import json
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack

import pyarrow.parquet as pq
import pytest
from test_download import samples, url_table
from wild import STORED, Names, Wild, bodies, heads, redirects, running

pytestmark = pytest.mark.slow
URLS = 1_700
PEAK = 620  # MiB of a worker, four bodies of 50 MB among them
DEAR = {"header-drip", "body-drip", "103-drip", "silence", "endless", "gzip-bomb", "gzip-bomb-twice", "chunks-minus",
        "headers-flood"}
INSIDE = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'


def _planned(kinds: dict, good: Wild, secret: int) -> dict[str, str]:
    """URL → outcome, URLS in all: each kind about equally often, dear ones less."""
    base = f"http://127.0.0.1:{good.server_address[1]}"
    hosts = "127.0.0.2", "2130706434", "0x7f.2", "[::ffff:127.0.0.2]", "１２７.0.0.2"
    direct = [f"http://{host}:{secret}/a.jpg" for host in hosts]
    plan = dict.fromkeys([*direct, "http://169.254.169.254/", "http://192.168.0.1/a.jpg"], "refused address")
    plan |= dict.fromkeys(("file:///etc/passwd", "ftp://127.0.0.1/a", "data:,a", "/etc/passwd"), "refused scheme")
    plan |= dict.fromkeys(("http://[::1/", "http://127.0.0.1:99999/", "http:///a.jpg"), "bad url")
    for number in range(1, 100):
        for kind, (_, outcome) in kinds.items():
            if len(plan) < URLS and (kind not in DEAR or number < 4):
                plan[f"{base}/{kind}/{number}" + ("#part" if number == 2 else "")] = outcome
    return plan


@pytest.fixture(scope="module")
def drill(tmp_path_factory):
    """(folder, plan, good server, private server, name server or None, peak MiB of a worker)."""
    folder = tmp_path_factory.mktemp("wild")
    with ExitStack() as stack:
        private = stack.enter_context(running(Wild("127.0.0.2", {"a.jpg": b"secret"})))
        good = stack.enter_context(running(Wild("127.0.0.1", {})))
        port, secret = good.server_address[1], private.server_address[1]
        kinds = heads() | bodies() | redirects(port, secret)
        good.replies = {kind: reply for kind, (reply, _) in kinds.items()}
        names = _names(stack)
        plan = _planned(kinds, good, secret)
        if names:
            rebound = {"rebind": STORED, "rebind-hop": "refused address", "two": "refused address"}
            for url in list(plan)[-3 * 10:]:
                del plan[url]
            plan |= {f"http://{kind}{number}.test:{port}/{'again' if kind == 'rebind-hop' else 'plain'}/{kind}{number}": outcome
                     for number in range(10) for kind, outcome in rebound.items()}
            good.replies["again"] = b"HTTP/1.1 302 X\r\nLocation: /plain/never\r\nContent-Length: 0\r\n\r\n"
        words = [sys.executable, "-m", "pipeline.cli", "download", url_table(folder / "u.parquet", list(plan)), folder / "out",
                 "--shard-size", "300", "--threads", "32", "--timeout", "1.2", "--retries", "0", "--processes", "2",
                 "--allow-address", "127.0.0.1"]
        if names:
            (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:5\n")
            words = ["unshare", "-rm", "sh", "-c", INSIDE, "-", folder / "resolv.conf", *words]
        code = ("import resource, subprocess, sys\ndone = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
                "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=900)
        exit_code, kib = map(int, done.stdout.split())
        assert exit_code == 0, done.stderr
        yield folder / "out", plan, good, private, names, kib / 1024


def _names(stack: ExitStack) -> Names | None:
    """A name server, where this system lets us have one and a name service of our own; names that rebind need it."""
    try:
        probe = subprocess.run(["unshare", "-rm", "mount", "--bind", "/dev/null", "/etc/resolv.conf"], capture_output=True)
        return stack.enter_context(running(Names())) if probe.returncode == 0 else None
    except OSError:
        return None


def test_every_url_ends_as_the_servers_planned(drill, capsys):
    folder, plan, _, _, names, _ = drill
    rows = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    found = {row["url"]: STORED if row["status"] == "success" else row["error_message"].partition(":")[0] for row in rows}
    assert len(rows) == len(plan) == URLS
    assert {url: (plan[url], found.get(url)) for url in plan if found.get(url) != plan[url]} == {}
    report = json.loads((folder / "download.json").read_text())
    assert {STORED: report["stored"], **report["failed"]} == Counter(plan.values())
    assert set(samples(folder)) == {url for url, outcome in plan.items() if outcome == STORED}
    with capsys.disabled():
        print(f"\n{URLS} hostile URLs: {report['stored']} stored, {len(report['failed'])} classes of failure; names rebind: "
              f"{bool(names)}")


def test_no_private_address_is_connected_to(drill):
    assert (drill[3].connections, drill[3].hits) == (0, Counter())


def test_each_url_is_asked_for_once_and_by_its_path_alone(drill):
    _, plan, good, _, _, _ = drill
    base = f"http://127.0.0.1:{good.server_address[1]}"
    asked = [url.removeprefix(base).partition("#")[0] for url in plan if url.startswith(base)]
    assert {path: good.hits[path] for path in asked if good.hits[path] != 1 and not path.startswith("/circle/")} == {}
    assert "/plain/never" not in good.hits
    assert not [path for path in good.hits if path == "/plain/0"], "a redirect that opted out was followed"


def test_a_worker_needs_bounded_memory(drill, capsys):
    with capsys.disabled():
        print(f"\npeak of a worker: {drill[5]:.0f} MiB")
    assert drill[5] < PEAK
