"""A download ends honestly: trouble of this machine is no fault of a URL, and is told with its cure and without a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import command, encoded, picture
from test_download import HERE, samples, url_table
from webserver import serving

from pipeline import workers
from pipeline.console import WorkFailed, what_failed
from pipeline.download import Options, download
from pipeline.ledger import Ledger
from trainer.config import RunConfig
from trainer.log import LEDGER, METRICS, Log

COUNT = 60
WORDS = ("--threads", "8", "--processes", "1", "--shard-size", "20", "--allow-address", "127.0.0.1")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of 60 pictures of 50 kB that are there at once, and the site that has them."""
    with serving() as site:
        site.pages.update({f"/{number}.jpg": encoded(picture(number, 400, 400), quality=98) for number in range(COUNT)})
        yield url_table(tmp_path_factory.mktemp("ends") / "u.parquet", [site.url(f"/{number}.jpg") for number in range(COUNT)])


def python(code: str, *words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120)


def test_a_worker_imports_no_torch_and_hides_it_from_nobody():
    done = python("import sys\nfrom pathlib import Path\nimport pipeline.workers\n"
                  "assert not {'torch', 'wandb', 'ray'} & set(sys.modules), sys.modules.keys()\n"
                  "peak = int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) // 1024\n"
                  "assert peak < 300, peak\n"
                  "import torch, wandb, webdataset, img2dataset\n"
                  "assert issubclass(webdataset.WebDataset, torch.utils.data.IterableDataset)\nassert wandb.init")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tries", [1, 3])
def test_ctrl_c_once_and_again_without_a_traceback(tmp_path, tries):
    with serving() as site:
        site.pages["/slow"] = lambda handler: time.sleep(2)
        slow = url_table(tmp_path / "u.parquet", [site.url(f"/slow?{number}") for number in range(COUNT)])
        site.pages.update({f"/slow?{number}": site.pages["/slow"] for number in range(COUNT)})
        words = [Path(sys.executable).parent / "uniclip-data", "download", slow, tmp_path / "out", *WORDS]
        running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        while not site.hits:
            time.sleep(0.02)
        for _ in range(tries):
            os.killpg(running.pid, signal.SIGINT)
            time.sleep(0.1)
        told = running.communicate(timeout=30)[1]
    assert running.returncode in {130, -signal.SIGINT}
    assert "stopped" in told
    assert "Traceback" not in told
    assert "Exception" not in told


def test_a_closed_stdout_ends_no_work(scenes, tmp_path):
    index = scenes / "train" / "index.arrow"
    index.unlink()
    running = subprocess.Popen([Path(sys.executable).parent / "uniclip-data", "index", scenes / "train"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.stdout.close()
    assert (running.stderr.read(), running.wait()) == ("", 0)
    assert index.exists()


@pytest.mark.skipif(subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
                    reason="needs a system that lets its users mount a small disk of their own")
@pytest.mark.parametrize("size", ["8k", "60k", "600k"])
def test_a_full_disk_is_named_with_its_cure(table, tmp_path, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = 'mount -t tmpfs -o size=$1 none "$2" && shift 2 && exec "$@"'
    words = [sys.executable, "-m", "pipeline.cli", "download", table, disk / "out", *WORDS]
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mounted, "-", size, disk, *words], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {disk}/out"), done.stderr
    assert last.endswith(": the disk is full: free some space there (`df -h` shows it), then run the same command again")
    assert "Traceback" not in done.stderr


def test_metrics_and_bad_samples_name_their_file_on_a_full_disk(tmp_path):
    full = Path("/dev/full")  # of any size: each write into it finds no room
    run = RunConfig(folder=tmp_path, save_every_samples=8)
    for name in (METRICS, LEDGER):
        (tmp_path / name).symlink_to(full)
    for path, write in ((tmp_path / METRICS, lambda: Log(run, 9, 0).evaluated({"samples": 1})),
                        (tmp_path / LEDGER, lambda: Ledger(tmp_path / LEDGER).count(1, [{"samples": 1}]))):
        with pytest.raises((OSError, WorkFailed)) as caught:
            write()
        told = what_failed(caught.value)
        assert told.startswith(str(path)) and ("the disk is full: free some space there" in told or "make room, then" in told)


def test_too_few_open_files_are_called_so(table, tmp_path):
    words = [sys.executable, "-m", "pipeline.cli", "download", table, tmp_path / "out", "--threads", "9"]
    done = subprocess.run(["bash", "-c", 'ulimit -n 32; exec "$@"', "-", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: 32 open files are allowed here (`ulimit -Hn`), 9 threads need 33: "
                                                 "allow more, or use fewer --threads\n")
    more = [sys.executable, "-m", "pipeline.cli", "download", table, tmp_path / "out", *WORDS]
    done = subprocess.run(["bash", "-c", 'ulimit -Sn 25; exec "$@"', "-", *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # only the soft limit was low
    assert len(samples(tmp_path / "out")) == COUNT


def test_files_that_run_out_in_the_middle_cost_no_row(table, tmp_path):
    code = ("import os, sys\nfrom pathlib import Path\nimport pipeline.workers\n"
            "from pipeline.download import Options, download\noptions = Options(threads=8, distributor='inline', "
            "allow_address=('127.0.0.1',))\n"
            "held = []\nwhile True:\n    try: held.append(os.dup(0))\n    except OSError: break\n"
            "for one in held[:int(sys.argv[3])]: os.close(one)\n"
            "download(Path(sys.argv[1]), Path(sys.argv[2]), options)")
    for left in (4, 8, 11, 14):
        done = subprocess.run(["bash", "-c", 'ulimit -n 64; exec "$@"', "-", sys.executable, "-c", code, table,
                               tmp_path / "out", str(left)], capture_output=True, text=True)
        assert done.returncode == 0 or "too many open files: allow more" in done.stderr, done.stderr
    assert command("uniclip-data", "download", table, tmp_path / "out", "--threads", "8", "--allow-address",
                   "127.0.0.1").returncode == 0
    assert len(samples(tmp_path / "out")) == COUNT


def test_want_of_memory_is_not_a_broken_image(table, tmp_path, monkeypatch):
    def full(data):
        raise MemoryError

    options = Options(distributor="inline", shard_size=20, threads=8, allow_address=HERE)
    with monkeypatch.context() as patched:
        patched.setattr(workers, "plain_bytes", full)
        with pytest.raises(WorkFailed, match="out of memory: use fewer --processes or --threads"):
            download(table, tmp_path / "out", options)
    assert download(table, tmp_path / "out", options).stored == COUNT
