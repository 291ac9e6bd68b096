"""A run's copy behind an fsspec URL: whole checkpoints, and the log as far as they go."""

import shutil
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import fsspec

from pipeline.console import InputError, WorkFailed, say
from pipeline.files import replacing
from trainer.config import Config
from trainer.config_file import load_config

STATE, CONFIG, LATEST, LOGS = "state.json", "config.toml", "latest", ("metrics.jsonl", "bad_samples.jsonl")


def superseded(names: Iterable[str], newest: str, keep: int) -> list[str]:
    """Of the names of checkpoints those that make way for `newest`.

    The `keep` newest stay; later ones are of a line that the run has left by going back to an older checkpoint. What is
    not named as a checkpoint, somebody else has put there: it stays.
    """
    ours = sorted(name for name in names if name.isdigit())
    before = [name for name in ours if name < newest]
    return before[:max(len(before) - keep + 1, 0)] + [name for name in ours if name > newest]


class Mirror:
    """RUN/checkpoints and the logs at `url`. `state.json` of a checkpoint goes last, then `latest`: objects are put whole."""

    def __init__(self, url: str):
        self.url = url
        with self._reading():
            self._fs, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")

    def copy(self, folder: Path, keep: int) -> None:
        """A finished checkpoint of this machine → its copy; the `keep` newest stay. Raises WorkFailed."""
        run, target = folder.parent.parent, f"{self._root}/checkpoints/{folder.name}"
        try:
            self._leave(folder.name, target)
            self._fs.makedirs(target, exist_ok=True)
            for path in sorted(folder.iterdir(), key=lambda path: path.name == STATE):
                self._fs.put_file(str(path), f"{target}/{path.name}")
            for name in LOGS:
                if (run / name).is_file():
                    self._fs.put_file(str(run / name), f"{self._root}/{name}")
            self._fs.pipe_file(f"{self._root}/checkpoints/{LATEST}", folder.name.encode())
            for old in superseded(self._names(), folder.name, keep):
                self._fs.rm(f"{self._root}/checkpoints/{old}", recursive=True)
        except Exception as error:  # each filesystem raises its own
            raise WorkFailed(f"run.mirror {self.url} did not take {folder.name} ({error}); the checkpoint in {folder} is "
                             "whole") from error

    def _leave(self, name: str, target: str) -> None:
        """Where the line that the run has left has a copy of this number, `latest` names an earlier one, then it goes."""
        if not self._fs.exists(target):
            return
        earlier = [other for other in self._names() if other.isdigit() and other < name
                   and self._fs.exists(f"{self._root}/checkpoints/{other}/{STATE}")]
        if self.newest() >= name and earlier:
            self._fs.pipe_file(f"{self._root}/checkpoints/{LATEST}", max(earlier).encode())
        self._fs.rm(target, recursive=True)

    @contextmanager
    def _reading(self) -> Generator[None]:
        """What goes wrong in here is an InputError that names the URL."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # each filesystem raises its own
            raise InputError(f"run.mirror {self.url} cannot be read ({type(error).__name__}: {error}): check the URL, its "
                             "server and its keys, and whether there is room here") from error

    def newest(self) -> str:
        """The name of the newest copied checkpoint, "" where there is none. Raises InputError."""
        with self._reading():
            self._fs.invalidate_cache()
            try:
                return self._fs.cat_file(f"{self._root}/checkpoints/{LATEST}").decode()
            except (FileNotFoundError, NotADirectoryError):
                return ""

    def refuse_another(self) -> None:
        """For a run at its beginning. Raises InputError when a run's copy is there."""
        if self.newest():
            raise InputError(f"run.mirror = {self.url} already holds a run: go on with `uniclip-train resume {self.url}`, or "
                             "choose another with --set run.mirror=…")

    def config(self) -> Config:
        """The configuration of the run whose copy this is. Raises InputError."""
        with tempfile.NamedTemporaryFile(suffix=".toml") as file, self._reading():
            Path(file.name).write_bytes(self._fs.cat_file(f"{self._root}/checkpoints/{self._latest()}/{CONFIG}"))
            return load_config(file.name)

    def _latest(self) -> str:
        if name := self.newest():
            return name
        raise InputError(f"{self.url} holds no checkpoint (no checkpoints/{LATEST}): give what run.mirror named")

    def fetch(self, run: Path) -> None:
        """The latest copied checkpoint and the logs → the folder `run`, which may hold older ones. Raises InputError."""
        with self._reading():
            self._fetch(run, self._latest())

    def _fetch(self, run: Path, name: str) -> None:
        here, folder = run / "checkpoints" / LATEST, run / "checkpoints" / name
        if here.is_file() and (stands := here.read_text(encoding="utf-8")) > name:
            raise InputError(f"{run} stands at {stands} samples, {self.url} only at {name}: go on with "
                             f"`uniclip-train resume {run}`, or give another --folder")
        folder.mkdir(parents=True, exist_ok=True)
        source = f"{self._root}/checkpoints/{name}"
        for path in sorted(self._fs.ls(source, detail=False), key=lambda path: path.endswith(STATE)):
            self._fs.get_file(path, str(folder / path.rpartition("/")[2]))
        for log in LOGS:
            if self._fs.exists(f"{self._root}/{log}"):
                self._fs.get_file(f"{self._root}/{log}", str(run / log))
        shutil.copyfile(folder / CONFIG, run / CONFIG)
        with replacing(here) as temporary:
            temporary.write_text(name, encoding="utf-8")
        say(f"fetched {self.url}, checkpoint {name}, to {run}")

    def _names(self) -> list[str]:
        self._fs.invalidate_cache()
        entries = self._fs.ls(f"{self._root}/checkpoints", detail=True)
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
