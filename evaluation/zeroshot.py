"""Zero-shot classification: an image belongs to the class whose prompts it is nearest to. N images, C classes."""

from collections import Counter
from pathlib import Path

import numpy as np

from evaluation import alarm, examples
from evaluation.catalogue import mean_per_class_is_main
from evaluation.outcomes import Ranks, measured
from evaluation.prompts import chosen, class_embeddings, described, prompts_sha256
from evaluation.results import Measured
from evaluation.task import Finding, Job, Plan
from pipeline.evalsets import EvalSet, rendered, require_prompts
from trainer.metrics import nearest, ranks


def plan(evalset: EvalSet, folder: Path, templates: str) -> Plan:
    """Raises InputError when the set has no class names or prompts."""
    prompts = chosen(templates, evalset)
    require_prompts(evalset, folder, prompts)
    return Plan(evalset.manifest_sha256, prompts_sha256(evalset.classnames, prompts), described(templates, prompts),
                {"test": evalset}, prompts)


def texts(job: Job) -> list[str]:
    """All prompts."""
    return rendered(job.plan.splits["test"].classnames, job.plan.prompts)


def measure(job: Job) -> Finding:
    """Accuracy, accuracy@5 where there are more classes than that, mean per-class recall; and the alarm."""
    evalset, features = job.plan.splits["test"], job.features("test")
    class_CD = class_embeddings(lambda texts: job.cache.texts(job.subject, texts), evalset.classnames, job.plan.prompts)
    label_N, classes = features.label_N, len(class_CD)
    found: Ranks = {"class": (ranks(features.z_ND, class_CD, label_N, np.arange(classes)), label_N)}
    said_N = nearest(features.z_ND, class_CD, 1)[:, 0]
    return Finding(scores(found, classes, job.seed, mean_per_class_is_main(evalset.name)), found,
                   examples.of_classes(features.z_ND, class_CD, label_N, said_N, evalset),
                   _of_shared_names(evalset), alarm.permuted(label_N, said_N, evalset.classnames))


def _of_shared_names(evalset: EvalSet) -> dict[str, str]:
    """A word of warning where prompts cannot tell classes apart: all their images are ties, which count as wrong."""
    twice = [name for name, labels in Counter(name.casefold() for name in evalset.classnames).items() if labels > 1]
    return {"note": f"several classes share a name ({', '.join(twice[:3])}), and their images all count as wrong: give these "
                    "classes names of their own in classnames.txt"} if twice else {}


def scores(found: Ranks, classes: int, seed: int, main_is_mean: bool) -> list[Measured]:
    """The metrics from the rank of each image's own class."""
    shares = [("accuracy", 1), *([("accuracy@5", 5)] if classes > 5 else [])]
    return [*(measured(name, found, k / classes, k == 1 and not main_is_mean, seed) for name, k in shares),
            measured("mean_per_class_recall", found, 1 / classes, main_is_mean, seed)]
