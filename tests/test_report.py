"""The page about a run: self-contained, safe against captions, honest about what is missing, quiet in a browser."""

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import encoded, picture
from tiny import tiny_run

from evaluation import examples
from evaluation.curves import POINTS, loss_curve, read_metrics, temperature_curve
from evaluation.evaluate import Bench, evaluate
from evaluation.report import write
from evaluation.subject import checkpoint_subject
from pipeline.evalsets import write_evalset

CHROMIUM = Path("/usr/bin/chromium")
EVIL = '<script>alert("caption")</script> & <img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def bare(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(scenes, tmp_path_factory.mktemp("reported") / "run <1> & co")


@pytest.fixture(scope="module")
def reported(bare: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results file over two sets, one of which has hostile captions and a hostile name."""
    out = tmp_path_factory.mktemp("results") / "results.jsonl"
    hostile = out.parent / "<b>pairs"
    write_evalset(hostile, "test", [(encoded(picture(i)), [f"{EVIL} {i}", "red"]) for i in range(9)], "retrieval")
    for checkpoint, task, folder in ((bare, "retrieval", hostile), (bare, "zeroshot", scenes / "evalsets/colour"),
                                     (bare / "checkpoints/000000000032", "zeroshot", scenes / "evalsets/colour")):
        evaluate(task, Bench.of(checkpoint_subject(checkpoint, "cpu"), out), [folder])
    return out


@pytest.fixture(scope="module")
def page(bare: Path, reported: Path) -> Path:
    (bare / "views.png").write_bytes(encoded(picture(5), "PNG"))
    return write(bare, reported, reported.parent / "report.html")


class Elements(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, page: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_is_loaded_from_anywhere(page: Path) -> None:
    text, tags = page.read_text(), Elements(page).tags
    assert "http://" not in text and "https://" not in text and "@import" not in text
    addresses = [value for _, attributes in tags for name, value in attributes.items()
                 if name in {"src", "href", "xlink:href", "srcset", "action", "data"}]
    assert len(addresses) > 20 and all((value or "").startswith(("data:", "#")) for value in addresses)
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in tags}
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))


def test_captions_names_and_configuration_are_text(page: Path) -> None:
    elements = Elements(page)
    assert '<script>alert("caption")</script> & <img src=x onerror=alert(1)>' in elements.text
    assert "<b>pairs" in elements.text and "run <1> & co" in elements.text
    assert "b" not in {tag for tag, attributes in elements.tags if attributes} and "<b>pairs" not in page.read_text()
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)


def test_it_shows_every_number_of_the_latest_weights_and_the_earlier_ones_apart(page: Path, reported: Path) -> None:
    rows = [json.loads(line) for line in reported.read_text().splitlines()]
    text = Elements(page).text
    assert len(rows) == 6 + 3 + 3 and "Earlier weights of this run (3 numbers)" in text
    for row in rows:
        assert f"{100 * row['value']:.1f} %" in text and row["weights_sha256"][:12] in text
    assert rows[0]["data_sha256"] in text and rows[6]["prompts_sha256"] in text
    assert "12.5 %" in text  # chance of eight colours
    assert "image_to_text" not in text and "image → text R@10" in text
    assert "[model.image]" in text and rows[0]["transform"] in text


def test_examples_mark_right_and_wrong(page: Path, reported: Path) -> None:
    entry, = examples.read(reported)
    found = [f for query in entry["images"] + entry["captions"] for f in query["found"]]
    assert len(entry["images"]) == len(entry["captions"]) == 6
    assert {len(q["found"]) for q in entry["images"]} == {3} and {len(q["found"]) for q in entry["captions"]} == {5}
    text = page.read_text()
    assert text.count("✓") == sum(f["right"] for f in found) and text.count("✗") == sum(not f["right"] for f in found)
    for query in entry["images"]:  # two captions of nine are an image's own: three found hold none, or its own are told
        assert bool(query["own"]) == (not any(f["right"] for f in query["found"]))


def test_examples_of_a_set_are_replaced_and_those_of_others_kept(bare: Path, reported: Path, scenes: Path) -> None:
    before = examples.read(reported)
    entry = before[0] | {"dataset": "other"}
    for _ in range(2):
        examples.store(reported.with_name("again.jsonl"), entry)
        examples.store(reported.with_name("again.jsonl"), before[0])
    assert [e["dataset"] for e in examples.read(reported.with_name("again.jsonl"))] == ["other", "<b>pairs"]


def test_a_run_without_results_says_what_to_do(bare: Path, tmp_path: Path) -> None:
    page = write(bare, None, tmp_path / "page.html")
    assert "Nothing was measured yet: run uniclip-eval retrieval" in Elements(page).text
    assert list(tmp_path.iterdir()) == [page]


def test_curves_end_at_the_last_line_and_share_no_ids(tmp_path: Path) -> None:
    lines = [json.dumps({"samples": 10 * i, "loss": 1 / i, "temperature": [.07, .06, .05]}) + "\n"
             for i in range(1, 3 * POINTS + 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"samples": 99')  # a run that is still writing
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert len(metrics) == len(lines) and read_metrics(tmp_path / "none.jsonl") == []
    both = [draw(metrics) for draw in (loss_curve, temperature_curve)]
    ids = [re.findall(r'id="([^"]+)"', svg) for svg in both]
    assert not set(ids[0]) & set(ids[1]) and len(ids[0]) == len(set(ids[0]))
    for svg, own in zip(both, ids, strict=True):
        assert svg.startswith("<svg") and "currentColor" in svg and "xmlns" not in svg and "#010203" not in svg
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(own)
    assert both[0] == loss_curve(metrics) and "image–text" in both[1]


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium: make system installs it")
def test_a_browser_shows_it_without_errors(page: Path, tmp_path: Path) -> None:
    def shown(path: Path, name: str) -> str:
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path / name}", f"--screenshot={tmp_path / name}.png", "--window-size=390,2000",
             path.as_uri()], capture_output=True, text=True, timeout=100)
        return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    faulty = tmp_path / "faulty.html"
    faulty.write_text(page.read_text().replace("<main>", "<script>nothing.here</script><main>"))
    assert "nothing is not defined" in shown(faulty, "faulty")  # so that silence below means something
    assert shown(page, "page") == ""
    assert (tmp_path / "page.png").stat().st_size > 10_000
