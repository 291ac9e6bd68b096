"""A run of a few steps on the demonstration set, for tests of what comes after training."""

from pathlib import Path

from trainer.config_file import load_config
from trainer.train import train
from trainer.training import start


def tiny_run(scenes: Path, folder: Path, samples: int = 48) -> Path:
    """Train a very small model on `scenes`/train for a few steps → the run folder."""
    config = load_config("scenes-tiny", [
        f"data.index={scenes / 'train'}", f"run.folder={folder}", "data.executor=pillow", f"optim.samples={samples}",
        "optim.batch_size=16", "optim.warmup_samples=0", "run.save_every_samples=32", "run.log_every=1",
        "model.image.depth=1", "model.text.depth=1", "model.dim=32", "run.keep=9"])
    train(config, start(config))
    return folder
