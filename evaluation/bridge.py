"""Other harnesses on our checkpoints: CLIP_benchmark as it is, with our loader put beside its own at run time."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

from pipeline.console import InputError

MODEL_TYPE = "uniclip"
VERSION = "1.6.2"


def load(model_name: str, pretrained: str, cache_dir: str | None = None, device: str = "cpu"):
    """(model, transform, tokenizer) of a run, checkpoint or export folder, as CLIP_benchmark's loaders return them."""
    import torch

    from trainer.embedder import transform_to
    from trainer.export import open_model

    loaded = open_model(pretrained, device)
    return loaded.model, transform_to(loaded.image_size), lambda texts: torch.from_numpy(loaded.tokenizer(texts))


@contextlib.contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, ["clip_benchmark", *words]
    try:
        yield
    finally:
        sys.argv = before


def clip_benchmark(words: list[str]) -> None:
    """Run CLIP_benchmark's own command line on `words`; --model_type and --model are ours unless given.

    Raises InputError when it is not installed.
    """
    if importlib.util.find_spec("clip_benchmark") is None:
        raise InputError(f"CLIP_benchmark is not installed: pip install clip_benchmark=={VERSION} requests")
    models: Any = importlib.import_module("clip_benchmark.models")
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    if words[:1] == ["eval"] and "--model_type" not in words:
        words = [*words, "--model_type", MODEL_TYPE, *(() if "--model" in words else ("--model", MODEL_TYPE))]
    with _arguments(words):
        importlib.import_module("clip_benchmark.cli").main()
