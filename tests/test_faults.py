"""A sick machine is not a bad image: what runs out ends the work in words, and no sample is blamed for it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, encoded, picture
from PIL import Image
from shards import write_set

from pipeline.console import WorkFailed  # noqa: F401, for LIMITED
from pipeline.execution import Guarded
from pipeline.images import Undecodable
from pipeline.index import Index
from pipeline.ledger import Ledger
from pipeline.loader import Loader
from pipeline.reader import Place
from pipeline.recipe import Cursor, Recipe
from pipeline.sampling import WEAK
from pipeline.stream import Stream
from pipeline.views import DaliExecutor


def loader(folder: Path, executor: str, batch: int) -> Loader:
    index, recipe = Index.open(folder), Recipe((WEAK,), 16, executor, 2)
    cursor = Cursor(5, 0, index.fingerprint, recipe.fingerprint())
    return Loader(index, lambda c: np.zeros((len(c), 4), np.int64), recipe, cursor, batch, ledger=Ledger(None, 1.0),
                  place=Place())


LIMITED = """
import resource, sys
sys.path.insert(0, "tests")
from test_faults import *
small, big = (Path(word) for word in sys.argv[1:])
loader(small, "dali", 4).batch_at(0)
stream, files = loader(small, "pillow", 60), resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, files[1]))
try:
    print("valid:", stream.batch_at(0).valid.tolist())
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_NOFILE, files)
stream = loader(big, "dali", 4)
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)
try:
    print("valid:", stream.batch_at(0).valid.tolist())
except WorkFailed as error:
    print(error)
"""


def test_what_runs_out_is_said_and_no_image_is_blamed(tmp_path):
    """Open files, then memory, in a process whose limits are its own."""
    small, big = (write_set(tmp_path / name, [(encoded(image), {"caption": f"{n}"}) for n, image in enumerate(images)], 1)
                  for name, images in (("small", map(picture, range(60))),
                                       ("big", (Image.new("RGB", (4000, 5000 + n)) for n in range(4)))))
    done = subprocess.run([sys.executable, "-c", LIMITED, small, big], capture_output=True, text=True, cwd=ROOT, timeout=60)
    files, memory = done.stdout.splitlines()
    assert "Too many open files" in files
    assert "no memory left for the views of 4 images" in memory


@pytest.mark.parametrize("fault", [TypeError("ours"), MemoryError()])
def test_our_own_errors_end_the_index_and_the_stream_road(fault, tmp_path, monkeypatch):
    write_set(tmp_path, [(encoded(picture(n)), {"caption": f"{n}"}) for n in range(4)])

    def broken(*_: object) -> None:
        raise fault

    monkeypatch.setattr("pipeline.loader.fit", broken)
    with pytest.raises(type(fault)):
        next(iter(loader(tmp_path, "pillow", 4)))
    monkeypatch.setattr("pipeline.stream.parsed", broken)
    stream = Stream.open(str(tmp_path / "00000.tar"), np.empty(0, np.int64))
    with pytest.raises(type(fault)):
        next(iter(stream.loader(lambda c: np.zeros((len(c), 4), np.int64), Recipe((WEAK,), 16, "pillow", 1),
                                Cursor(5, 0, "", ""), 4, ledger=Ledger(None, 1.0))))


def test_a_repair_is_said_once_and_counted(capsys):
    """Noise in a JPEG's body, which only the decoder finds; other errors of DALI are nobody's image."""
    whole = encoded(picture(1))
    noisy = whole[:300] + bytes(len(whole) - 302) + whole[-2:]
    vectors, guarded = np.zeros((2, 1, 11), np.float32), Guarded(DaliExecutor(16, 1))
    vectors[:, :, 2:4] = 1
    for _ in range(12):
        _, bad = guarded([whole, noisy[:400] + whole[-2:]], vectors, np.arange(2))
        assert list(bad) == [1]
    assert guarded.repaired.count == 12
    lines = [line for line in capsys.readouterr().err.splitlines() if "decoded a second time" in line]
    assert len(lines) == 2 and "10 times so far" in lines[1]
    with pytest.raises(Exception) as caught:
        guarded([whole], vectors[:, :, :5], np.arange(1))
    assert not isinstance(caught.value, Undecodable)
    guarded.close()
