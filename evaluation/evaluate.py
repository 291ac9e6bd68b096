"""One task on several sets: what is finished is skipped, what is new becomes rows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from evaluation import examples, retrieval, zeroshot
from evaluation.embed import pick_device, transform_name
from evaluation.prompts import prompts_sha256
from evaluation.results import Measured, Provenance, Row, append_rows, read_rows, versions
from pipeline.console import InputError, say
from pipeline.evalsets import CLASSIFICATION, RETRIEVAL, EvalSet, open_evalset
from trainer.checkpoint import Loaded, load_model

SEED = 0  # of the bootstrap and of the choice of examples
RESULTS = "results.jsonl"


def _measure_retrieval(loaded: Loaded, evalset: EvalSet) -> tuple[list[Measured], dict]:
    pairs = retrieval.embed_pairs(loaded, evalset)
    return retrieval.measure(pairs, SEED), examples.collect(pairs, evalset, SEED)


def _measure_zeroshot(loaded: Loaded, evalset: EvalSet) -> tuple[list[Measured], dict]:
    return zeroshot.measure(loaded, evalset, SEED), {}


@dataclass(frozen=True)
class Task:
    """What a task needs of a set, and how it is measured → numbers, and examples for the report if it has any."""

    kind: str
    check: Callable[[EvalSet], None]
    prompts: Callable[[EvalSet], str | None]
    measure: Callable[[Loaded, EvalSet], tuple[list[Measured], dict]]


TASKS = {
    "retrieval": Task(RETRIEVAL, lambda evalset: None, lambda evalset: None, _measure_retrieval),
    "zeroshot": Task(CLASSIFICATION, zeroshot.check,
                     lambda evalset: prompts_sha256(evalset.classnames, evalset.templates), _measure_zeroshot),
}


def evaluate(task: str, checkpoint: Path, folders: Sequence[Path], split: str, device: str,
             out: Path | None) -> tuple[Path, list[Row]]:
    """Measure what `out` (RUN/results.jsonl when None) does not hold yet → its path and the rows of these sets.

    Raises InputError for a wrong set or checkpoint before anything is measured, WorkFailed for an unreadable image.
    """
    evalsets = [_open(task, folder, split) for folder in folders]
    loaded = load_model(checkpoint, pick_device(device))
    out = out or loaded.run / RESULTS
    rows = []
    for evalset in evalsets:
        provenance = Provenance(evalset.name, split, task, loaded.weights_sha256, evalset.manifest_sha256,
                                TASKS[task].prompts(evalset), transform_name(loaded.image_size))
        finished = [row for row in read_rows(out) if provenance.fits(row)]
        if finished:
            say(f"{evalset.name} ({split}): finished on {finished[0].get('created')}, skipped")
        rows += finished or _measure(task, loaded, evalset, provenance, out)
    return out, rows


def _open(task: str, folder: Path, split: str) -> EvalSet:
    evalset = open_evalset(folder, split)
    if evalset.kind != TASKS[task].kind:
        other = next(name for name, known in TASKS.items() if known.kind == evalset.kind)
        raise InputError(f"evaluation set {folder} is of kind {evalset.kind}: use `uniclip-eval {other}`")
    TASKS[task].check(evalset)
    return evalset


def _measure(task: str, loaded: Loaded, evalset: EvalSet, provenance: Provenance, out: Path) -> list[Row]:
    """Measure one set and store its rows together, so that a set is either finished or not begun."""
    begin = time.perf_counter()
    measured, shown = TASKS[task].measure(loaded, evalset)
    common = {"versions": versions(), "seed": SEED, "checkpoint": loaded.folder.name,
              "seconds": round(time.perf_counter() - begin, 2),
              "created": datetime.now(UTC).isoformat(timespec="seconds")}
    rows = [asdict(provenance) | asdict(number) | common for number in measured]
    if shown:
        examples.store(out, {name: rows[0][name] for name in ("dataset", "split", "weights_sha256")} | shown)
    append_rows(out, rows)
    return rows
