"""What a task needs of a set, what it is given, and what it finds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from evaluation.cache import Cache, Features
from evaluation.outcomes import Ranks
from evaluation.results import Measured
from evaluation.subject import Subject
from pipeline.evalsets import EvalSet


@dataclass(frozen=True)
class Plan:
    """What a measurement will depend on: data and prompts by hash, the variant by name, the splits it reads."""

    data_sha256: str
    prompts_sha256: str | None
    protocol: str
    splits: dict[str, EvalSet]
    prompts: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """One task on one set with one model."""

    subject: Subject
    plan: Plan
    cache: Cache
    seed: int
    scratch: Path  # where a task may keep what a later run of it goes on from

    def features(self, role: str) -> Features:
        """The embedded split of that role."""
        return self.cache.images(self.subject, self.plan.splits[role])


@dataclass(frozen=True)
class Finding:
    """Numbers, the outcome of every query, pictures for the report, what else is to be known, and a warning."""

    measured: list[Measured]
    ranks: Ranks
    examples: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    alarm: str | None = None


@dataclass(frozen=True)
class Pairs:
    """An embedded set: caption i is one of the captions of image `image_of_text_T[i]`."""

    image_ND: Tensor
    text_TD: Tensor
    captions: list[str]
    image_of_text_T: np.ndarray
