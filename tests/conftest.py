"""Shapes in signatures are checked under pytest; shared sets of real tars."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import install_import_hook
from PIL import Image

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, here and in what tests start: threads change the last bits

install_import_hook(["trainer.encoders", "trainer.heads", "trainer.model", "trainer.similarity"], "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption("--golden", action="store_true", help="write the golden files anew")


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    """A smooth random colour picture: differences between resizers and decoders are as on photographs."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    """The image's bytes in `format`."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def command(*words: str | Path, **options) -> subprocess.CompletedProcess:
    """Run one of our commands as a user does, in a process of its own."""
    program = Path(sys.executable).parent / str(words[0])
    return subprocess.run([program, *map(str, words[1:])], capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A demonstration set of 120 scenes as indexed tars: train/ (two shards and their index) and evalsets/."""
    folder = tmp_path_factory.mktemp("scenes") / "set"
    for words in (("scenes", folder, "--count", "120", "--held-out", "24", "--format", "wds"),
                  ("index", folder / "train")):
        done = command("uniclip-data", *words)
        assert done.returncode == 0, done.stderr
    return folder
