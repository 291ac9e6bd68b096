"""Every task on every set under a folder; what is finished is kept, so that it can be stopped and begun again."""

from pathlib import Path

from evaluation.catalogue import identify
from evaluation.evaluate import TASKS, Bench, perform, planned
from evaluation.prompts import OWN
from evaluation.results import Row
from evaluation.task import Plan
from pipeline.console import InputError, WorkFailed, existing, say
from pipeline.evalsets import is_evalset, open_evalset, splits_of

IMAGENET_TEMPLATES = ("imagenet-7", "imagenet-80")


def find_sets(root: Path) -> list[Path]:
    """Folders under `root` (or itself) that hold an evaluation set with a test split, in the order of their names."""
    existing(root, "folder of evaluation sets")
    folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir() and not path.name.startswith("."))]
    found = [path for path in folders if is_evalset(path)]
    if not found:
        raise InputError(f"{root} holds no evaluation set: `uniclip-eval data list` says which are known, "
                         "`uniclip-eval data convert` makes them")
    return found


def suite(bench: Bench, root: Path, split: str = "test") -> tuple[list[Row], list[str]]:
    """The rows of all that can be measured under `root`, and what could not be, in words."""
    rows, left = [], []
    for folder in find_sets(root):
        for task, templates in _tasks(folder, split, left):
            plan = _planned(task, folder, split, templates, left)
            try:
                rows += perform(task, bench, plan) if plan else []
            except (InputError, WorkFailed) as error:  # one broken set must not cost the others
                left.append(f"{folder.name}, {task}: {error}")
    for line in left:
        say(f"not measured: {line}")
    return rows, left


def _tasks(folder: Path, split: str, left: list[str]) -> list[tuple[str, str]]:
    """Tasks for a set, with the templates of each."""
    if split not in splits_of(folder):
        left.append(f"{folder.name}: no split {split!r}")
        return []
    kind = open_evalset(folder, split).kind
    both = IMAGENET_TEMPLATES if identify(folder.name) == "imagenet1k" else (OWN,)
    return [(name, templates) for name, task in TASKS.items() if task.kind == kind
            for templates in (both if name == "zeroshot" else (OWN,))]


def _planned(task: str, folder: Path, split: str, templates: str, left: list[str]) -> Plan | None:
    try:
        return planned(task, folder, split, templates)
    except InputError as error:
        left.append(f"{folder.name}, {task}: {error}")
        return None
