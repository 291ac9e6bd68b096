"""What the design promises about the tree: imports run one way, --help is light, every command shows an example."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command

MAY_IMPORT = {"pipeline": set(), "trainer": {"pipeline"}, "evaluation": {"pipeline", "trainer"},
              "tools": {"pipeline", "trainer", "evaluation"}}
PROGRAMS = {"uniclip-data": "pipeline.cli", "uniclip-train": "trainer.cli", "uniclip-eval": "evaluation.cli"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_never_run_uphill(package):
    for path in (ROOT / package).rglob("*.py"):
        ours = {name.split(".")[0] for name in imported(path)} & set(MAY_IMPORT)
        assert ours <= MAY_IMPORT[package] | {package}, path


def test_one_file_knows_dali_and_only_the_download_knows_img2dataset():
    users = {name: {path.name for path in (ROOT / "pipeline").glob("*.py") if any(
        used == name or used.startswith(name + ".") for used in imported(path))} for name in ("nvidia", "img2dataset")}
    assert users["nvidia"] == {"views.py"}
    assert users["img2dataset"] <= {"download.py", "fetch.py", "workers.py"}


def without_encoding(path: Path) -> list[str]:
    """The calls that read or write text in whatever encoding the locale has."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            modes = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            opens_text = node.func.attr == "open" and modes and set(modes[0]) <= set("rwax+t")
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            if (opens_text or node.func.attr in ("read_text", "write_text")) and not named:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


@pytest.mark.parametrize("package", ["pipeline", "trainer", "evaluation"])
def test_texts_are_utf_8_whatever_the_locale(package):
    assert [place for path in (ROOT / package).rglob("*.py") for place in without_encoding(path)] == []


def commands(program: str) -> list[list[str]]:
    """Every command of a program, sub-commands included."""
    import importlib

    import typer

    def walk(group, words):
        for name, one in sorted(group.commands.items()):
            yield from walk(one, [*words, name]) if hasattr(one, "commands") else [[*words, name]]

    return list(walk(typer.main.get_command(importlib.import_module(PROGRAMS[program]).app), []))


ALL = [(program, *words) for program in PROGRAMS for words in commands(program)]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_shows_an_example(words):
    done = command(*words, "--help")
    assert done.returncode == 0, done.stderr
    assert "Example" in done.stdout
    assert " ".join(words[:2]) in done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_neither_torch_nor_dali(program):
    code = (f"import sys; sys.argv = ['{program}', '--help']\n"
            f"from {PROGRAMS[program]} import main\n"
            "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
            "heavy = {'torch', 'nvidia.dali', 'timm', 'img2dataset', 'cv2', 'matplotlib'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
