"""What every command shares: wrong usage is one plain line and exit code 2, help ends with an example, --version."""

import os
from importlib.metadata import version

import pyarrow.parquet as pq
import pytest
from conftest import command, encoded, picture
from shards import write_set
from test_architecture import PROGRAMS

WRONG = {
    ("uniclip-data", "nosuch"): "no such command 'nosuch': see uniclip-data --help",
    ("uniclip-data", "urls", "nosuch"): "no such command 'nosuch': see uniclip-data urls --help",
    ("uniclip-data", "peek", "shards"): "missing argument 'OUT.html': see uniclip-data peek --help",
    ("uniclip-data", "stats", "a", "b"): "got unexpected extra argument(s) (b): see uniclip-data stats --help",
    ("uniclip-train", "--nosuch"): "no such option: --nosuch: see uniclip-train --help",
    ("uniclip-eval", "suite", "--nosuch"): "no such option: --nosuch (Possible options: --out): see uniclip-eval suite --help",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_wrong_usage_is_one_line_and_exit_code_2(words):
    done = command(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {WRONG[words]}\n")


def test_a_wrong_value_names_its_option():
    done = command("uniclip-data", "peek", "shards", "out.html", "--count", "0")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "'--count'" in done.stderr
    assert done.stderr.endswith("see uniclip-data peek --help\n")


@pytest.mark.parametrize("words", [*((name,) for name in PROGRAMS), ("uniclip-data", "urls"), ("uniclip-eval", "data")],
                         ids=" ".join)
def test_help_of_a_group_ends_with_an_example(words):
    done = command(*words, "--help", env={"PATH": "/usr/bin:/bin", "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].strip().startswith(f"Example: {' '.join(words)}")
    assert command(*words).returncode == 2


@pytest.mark.parametrize("program", PROGRAMS)
def test_version(program):
    done = command(program, "--version")
    assert (done.returncode, done.stdout) == (0, f"uniclip {version('uniclip')}\n")


@pytest.mark.parametrize(("words", "says"), [
    (("stats", "s3://bucket/set"), "s3://bucket/set: only `download` writes to a URL: give a path of this machine"),
    (("index", "memory://set"), "memory://set: only"), (("retry", "gs://a/b"), "gs://a/b: only"),
    (("merge", "out", "s3://a/b=2"), "s3://a/b: only"),
    (("urls", "table", "a.csv", "s3://a/u.parquet"), "s3://a/u.parquet: only"),
    (("urls", "table", "folder.csv", "u.parquet"), "folder.csv: Is a directory: give another path"),
    (("urls", "table", "none.csv", "u.parquet"), "none.csv does not exist: give its path, seen from /"),
    (("card", "a", "a.png"), "a.png is where the card's picture goes"), (("doctor", "file"), "file is a file: give the folder"),
])
def test_a_wrong_path_is_one_line_and_exit_code_2(tmp_path, words, says):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    if words[0] == "card":
        write_set(tmp_path / "a", [(encoded(picture(0)), {"caption": "a"})])
    done = command("uniclip-data", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert says in done.stderr
    assert not (tmp_path / "s3:").exists()


OLD = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # ASCII: what Latin-1 cannot do, it cannot do either


@pytest.mark.parametrize("words", [("uniclip-data", "urls", "--help"), ("uniclip-train", "presets")], ids=" ".join)
def test_an_old_locale_spells_out_what_it_has_no_letters_for(words):
    done, modern = (command(*words, env=os.environ | more) for more in (OLD, {"PYTHONIOENCODING": "utf-8"}))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert done.stdout.split()[:3] == modern.stdout.split()[:3]


def test_in_an_old_locale_texts_are_read_and_written_as_utf_8(tmp_path):
    (tmp_path / "a.tsv").write_text("url\tcaption\nhttp://h/1\tgrüne Wälder → 森\nhttp://h/2\n", encoding="utf-8")
    done = command("uniclip-data", "urls", "table", "a.tsv", "u.parquet", cwd=tmp_path, env=os.environ | OLD)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "u.parquet")["captions"].to_pylist() == [["grüne Wälder → 森"]]
