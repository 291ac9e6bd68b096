"""Tasks on sets: what is finished is skipped, what is new becomes rows."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from evaluation import examples, outcomes, probe, retrieval, zeroshot
from evaluation.cache import Cache
from evaluation.prompts import OWN
from evaluation.results import Provenance, Row, append_rows, read_rows
from evaluation.subject import Subject
from evaluation.task import Finding, Job, Plan
from pipeline.console import InputError, say
from pipeline.evalsets import CLASSIFICATION, RETRIEVAL, EvalSet, open_evalset
from pipeline.versions import versions
from trainer.distributed import ALONE, Ranks

SEED = 0  # of the bootstrap, of held-out images and of the choice of examples
RESULTS, FEATURES = "results.jsonl", "features"


@dataclass(frozen=True)
class Task:
    """The kind of set it is for; what it will depend on, checked before anything is computed; the measurement."""

    kind: str
    plan: Callable[[EvalSet, Path, str], Plan]
    measure: Callable[[Job], Finding]
    texts: Callable[[Job], list[str]] = lambda job: []  # that it will embed


TASKS = {
    "zeroshot": Task(CLASSIFICATION, zeroshot.plan, zeroshot.measure, zeroshot.texts),
    "retrieval": Task(RETRIEVAL, retrieval.plan, retrieval.measure, retrieval.texts),
    "probe": Task(CLASSIFICATION, probe.plan_linear, probe.measure_linear),
    "knn": Task(CLASSIFICATION, probe.plan_neighbours, probe.measure_neighbours),
}


@dataclass(frozen=True)
class Bench:
    """A model with the file its results go to, the cache of its features, and the ranks that compute these together."""

    subject: Subject
    out: Path
    cache: Cache
    ranks: Ranks = ALONE

    @classmethod
    def of(cls, subject: Subject, out: Path | None = None, cache: Path | None = None, ranks: Ranks = ALONE) -> "Bench":
        """Results in the run's folder and features beside the results, unless told otherwise."""
        out = out or subject.home / RESULTS
        return cls(subject, out, Cache(cache or out.parent / FEATURES), ranks)


def evaluate(task: str, bench: Bench, folders: Sequence[Path], split: str = "test", templates: str = OWN) -> list[Row]:
    """Measure what the results file does not hold yet → the rows of these sets.

    Raises InputError for a wrong set before anything is measured, WorkFailed for an unreadable image.
    """
    plans = [planned(task, folder, split, templates) for folder in folders]
    return [row for plan in plans for row in perform(task, bench, plan)]


def planned(task: str, folder: Path, split: str, templates: str = OWN) -> Plan:
    """What a task on a set will depend on. Raises InputError for a set of another kind or a wrong layout."""
    evalset = open_evalset(folder, split)
    if evalset.kind != TASKS[task].kind:
        other = next(name for name, known in TASKS.items() if known.kind == evalset.kind)
        raise InputError(f"evaluation set {folder} is of kind {evalset.kind}: use `uniclip-eval {other}`")
    return TASKS[task].plan(evalset, folder, templates)


def perform(task: str, bench: Bench, plan: Plan) -> list[Row]:
    """The rows of one task on one set, measured unless the results file has them."""
    return record(task, bench, plan, TASKS[task].measure, lambda job: _embed(TASKS[task], job, bench.ranks))


def _embed(task: Task, job: Job, ranks: Ranks) -> None:
    """Compute the features the task will ask for, on all ranks together."""
    for evalset in job.plan.splits.values():
        job.cache.images(job.subject, evalset, ranks)
    if texts := task.texts(job):
        job.cache.texts(job.subject, texts, ranks)


def record(task: str, bench: Bench, plan: Plan, measure: Callable[[Job], Finding],
           prepare: Callable[[Job], None] = lambda job: None) -> list[Row]:
    """The rows the results file has for this model, plan and task; else those of `measure`, then stored.

    All ranks prepare, the first one measures and stores; the others return no new rows.
    """
    evalset, subject = plan.splits["test"], bench.subject
    provenance = Provenance(evalset.name, evalset.split, task, subject.weights_sha256, plan.data_sha256,
                            plan.prompts_sha256, subject.transform, plan.protocol)
    first = bench.ranks.rank == 0
    with bench.ranks.agreeing():
        finished = [row for row in read_rows(bench.out) if provenance.fits(row)] if first else []
    if bench.ranks.any(bool(finished))[0]:
        if first:
            say(f"{evalset.name} ({evalset.split}), {task}: finished on {finished[0].get('created')}, skipped")
        return finished
    key = hashlib.sha256(json.dumps(asdict(provenance)).encode()).hexdigest()[:32]
    begin, job = time.perf_counter(), Job(subject, plan, bench.cache, SEED, bench.out.parent / task / key)
    if bench.ranks.world > 1:
        prepare(job)
    rows: list[Row] = []
    with bench.ranks.agreeing():
        if first:
            found = _noted(measure(job), evalset.note)
            rows = _store(bench, provenance, found, key, time.perf_counter() - begin)
    return rows


def _noted(found: Finding, note: str) -> Finding:
    notes = "; ".join(filter(None, (note, found.details.get("note"))))
    return replace(found, details=found.details | {"note": notes}) if notes else found


def _store(bench: Bench, provenance: Provenance, found: Finding, key: str, seconds: float) -> list[Row]:
    """Rows go last and in one write, so that a set is either finished or not begun."""
    kept = bench.out.with_suffix(".outcomes") / f"{key}.npz"
    common = {"outcomes": f"{kept.parent.name}/{kept.name}", "details": found.details, "alarm": found.alarm,
              "versions": versions(), "seed": SEED, "checkpoint": bench.subject.name, "seconds": round(seconds, 2),
              "created": datetime.now(UTC).isoformat(timespec="seconds")}
    rows = [asdict(provenance) | asdict(number) | common for number in found.measured]
    outcomes.store(kept, found.ranks)
    if found.examples:
        examples.store(bench.out, {name: rows[0][name] for name in ("dataset", "split", "weights_sha256")} | found.examples)
    append_rows(bench.out, rows)
    return rows
