"""What is drawn from each sample, who executes it, and the state of a data stream that follows from both."""

import hashlib
import importlib.util
import json
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch

from pipeline.console import InputError
from pipeline.replay import PillowExecutor
from pipeline.sampling import ViewKind
from pipeline.schema import SCHEMA_VERSION
from pipeline.wording import Wording

Views = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]


class Executor(Protocol):
    """Encoded images (B), vectors (B, V, 11), ids (B,) → V views (B, 3, S, S), vectors, ids on the executor's device."""

    def __call__(self, encoded: list[bytes], vector_BVA: np.ndarray, sample_id_B: np.ndarray) -> Views: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """What is drawn from each sample: kinds of views, output size in pixels, executor and its threads (0 = all cores).

    wording: makes more texts of the caption; None for the caption alone.
    """

    kinds: tuple[ViewKind, ...]
    size: int
    executor: str = "auto"
    threads: int = 0
    wording: Wording | None = None

    def fingerprint(self, **chosen: object) -> str:
        """Hash of everything that changes what a sample becomes (not who executes it), and of what chooses the samples.

        chosen: weights of sources, digest of skip lists; what is empty does not count.
        """
        drawn = {"kinds": [asdict(kind) for kind in self.kinds], "size": self.size,
                 **({"wording": self.wording.digest} if self.wording else {}),
                 **{name: value for name, value in chosen.items() if value}}
        return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cursor:
    """The whole state of a data stream. Equal cursors give equal streams, at any number of ranks."""

    seed: int
    samples_seen: int
    index: str
    data: str
    schema: int = SCHEMA_VERSION

    def refuse_other(self, saved: "Cursor") -> None:
        """Raise InputError that names the field in which a saved stream differs from this one."""
        for name in ("schema", "seed", "index", "data"):
            mine, theirs = getattr(self, name), getattr(saved, name)
            if mine != theirs:
                raise InputError(f"cannot resume: the data stream's {name!r} was {theirs} and is now {mine}; "
                                 "use the index and [data] settings of the run, or start a new run")


def make_executor(recipe: Recipe, device: str) -> Executor:
    """DALI wherever it is installed (on the GPU when `device` is one), Pillow elsewhere or when asked for.

    Raises InputError when DALI is wanted, or needed for CUDA, and missing.
    """
    dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    threads = recipe.threads or None
    if recipe.executor == "pillow" or (recipe.executor == "auto" and not dali and device == "cpu"):
        return PillowExecutor(recipe.size, threads)
    if not dali:
        raise InputError(f"executor {recipe.executor!r} on {device} needs DALI: pip install nvidia-dali-cuda130, "
                         "or set data.executor = \"pillow\" to run the views on the CPU")
    from pipeline.views import DaliExecutor

    return DaliExecutor(recipe.size, threads, None if device == "cpu" else torch.device(device).index or 0)
