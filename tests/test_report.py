"""The page about a run: self-contained, safe against captions, honest about what is missing, quiet in a browser."""

import csv
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import encoded, picture
from tiny import tiny_run

from evaluation import examples, paper
from evaluation.curves import POINTS, loss_curve, read_metrics, temperature_curve
from evaluation.evaluate import Bench, evaluate
from evaluation.report import write
from evaluation.subject import checkpoint_subject
from pipeline.console import InputError
from pipeline.evalsets import write_evalset
from pipeline.seals import open_json

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
    entry = next(entry for entry in examples.read(reported) if "images" in entry)
    queries = entry["images"] + entry["best"] + entry["worst"]
    found = [f for query in queries + entry["captions"] for f in query["found"]]
    assert len(entry["images"]) == len(entry["captions"]) == 6
    assert {len(q["found"]) for q in entry["images"]} == {3} and {len(q["found"]) for q in entry["captions"]} == {5}
    text = page.read_text()
    assert text.count("✓") == sum(f["right"] for f in found) and text.count("✗") == sum(not f["right"] for f in found)
    for query in queries:  # two captions of nine are an image's own: three found hold none, or its own are told
        assert bool(query["own"]) == (not any(f["right"] for f in query["found"]))
    assert all(query["found"][0]["right"] for query in entry["best"])
    assert not any(query["found"][0]["right"] for query in entry["worst"])


def test_the_surest_right_and_wrong_answers_are_shown(page: Path, reported: Path) -> None:
    entry = next(e for e in reversed(examples.read(reported)) if "classes" in e and e["weights_sha256"] in page.read_text())
    classes = entry["classes"]
    assert all(answer["said"] == answer["label"] for answer in classes["best"])
    assert classes["worst"] and all(answer["said"] != answer["label"] for answer in classes["worst"])
    assert "Surest answers in colour" in Elements(page).text and classes["worst"][0]["picture"] in page.read_text()


def test_examples_of_a_set_are_replaced_and_those_of_others_kept(bare: Path, reported: Path, scenes: Path) -> None:
    before = examples.read(reported)
    entry = before[0] | {"dataset": "other"}
    for _ in range(2):
        examples.store(reported.with_name("again.jsonl"), entry)
        examples.store(reported.with_name("again.jsonl"), before[0])
    assert [e["dataset"] for e in examples.read(reported.with_name("again.jsonl"))] == ["other", before[0]["dataset"]]


def test_a_run_without_results_says_what_to_do(bare: Path, tmp_path: Path) -> None:
    page = write(bare, None, tmp_path / "page.html")
    assert "Nothing was measured yet: run uniclip-eval retrieval" in Elements(page).text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.csv", "page.html", "page.md"]


def catalogued(reported: Path, out: Path) -> Path:
    """A results file as if the model had been measured on all of table 1 and on Flickr30k."""
    base = open_json(reported.read_bytes().splitlines()[6])
    rows = [base | {"dataset": name, "task": task, "value": 0.4 + number / 100, "interval": [0.3, 0.6],
                    "alarm": "likely cause: X" if (name, task) == ("flowers102", "zeroshot") else None}
            for task in ("zeroshot", "probe") for number, name in enumerate(paper.published()["datasets"])]
    rows += [base | {"dataset": "flickr30k", "task": "retrieval", "metric": f"{direction}_recall@{k}", "value": k / 20}
             for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_the_papers_tables_stand_beside_ours(bare: Path, reported: Path, tmp_path: Path) -> None:
    page = write(bare, catalogued(reported, tmp_path / "r.jsonl"), tmp_path / "page.html")
    text = " ".join(Elements(page).text.split())
    assert "Table 1, zero-shot" in text and "Table 1, linear probe" in text and "Table 3, zero-shot retrieval" in text
    assert "Table 2" not in text  # nothing of ours belongs there
    assert "Our inference, not the paper's word" in text and "likely cause: X" in text
    ours = re.search(r"this model ((?:[\d.–]+ ){13})", text)
    values = [40.0 + i for i in range(11)]
    assert ours
    assert [float(v) for v in ours[1].split()] == [*values, 45.0, 45.0]  # Flowers is their very middle
    clip = re.search(r"CLIP ViT-B/32 YFCC15M ((?:[\d.]+ ){13})", text)
    assert clip and clip[1].split()[-2:] == ["27.5", "29.6"]  # the first as printed in the paper
    assert "5.0 25.0 50.0 – – –" in text and "DeCLIP ResNet-50 Open30M – –" in text
    with (tmp_path / "page.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 28 and rows[3]["dataset"] == "sun397" and float(rows[3]["value"]) == 0.4 + 3 / 100
    markdown = (tmp_path / "page.md").read_text()
    assert "| this model | 40.0 | 41.0 |" in markdown and "## Table 3" in markdown
    assert "**flowers102**: likely cause: X" in markdown


def test_markdown_shows_names_as_text(page: Path) -> None:
    assert "<b>pairs" not in page.with_suffix(".md").read_text() and "\\<b\\>pairs" in page.with_suffix(".md").read_text()


def test_curves_end_at_the_last_line_and_share_no_ids(tmp_path: Path) -> None:
    speed = {"samples_per_second": 9.0, "data_wait": 0.1}
    lines = [json.dumps({"samples": 10 * i, "loss": 1 / i, "temperature": [.07, .06, .05], **speed}) + "\n"
             for i in range(1, 3 * POINTS + 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"samples": 99')  # a run that is still writing
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert len(metrics) == len(lines) and read_metrics(tmp_path / "none.jsonl") == []
    torn = tmp_path / "old.jsonl"  # of a version without checksums, a bit flipped in a name
    torn.write_text(lines[0].replace("temperature", "temperatuse") + lines[1])
    with pytest.raises(InputError, match="line 1 is damaged .*'temperature'"):
        read_metrics(torn)
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
