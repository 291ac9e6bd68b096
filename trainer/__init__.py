"""Batch → embeddings → loss → checkpoint; `load` opens what came out."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.embedder import Embedder


def load(source: str | Path, device: str = "cpu") -> "Embedder":
    """A trained model, ready for pictures and texts: an export or run folder, a checkpoint, or hf://ORG/NAME[@REVISION].

    Raises InputError when there is none or it is damaged.
    """
    from trainer.embedder import Embedder  # torch is imported by those who use it

    return Embedder(source, device)
