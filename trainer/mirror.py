"""A run's copy behind an fsspec URL: whole checkpoints, and the log as far as they go."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import fsspec

from pipeline.console import InputError, WorkFailed, say
from trainer.config import Config
from trainer.config_file import load_config

STATE, CONFIG, LATEST, LOGS = "state.json", "config.toml", "latest", ("metrics.jsonl", "bad_samples.jsonl")


def superseded(names: Iterable[str], newest: str, keep: int) -> list[str]:
    """Of the names of checkpoints those that make way for `newest`.

    The `keep` newest stay; later ones are of a line that the run has left by going back to an older checkpoint.
    """
    before = sorted(name for name in names if name < newest)
    return before[:max(len(before) - keep + 1, 0)] + [name for name in names if name > newest]


class Mirror:
    """RUN/checkpoints and the logs at `url`. `state.json` of a checkpoint goes last, then `latest`: objects are put whole."""

    def __init__(self, url: str):
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise InputError(f"run.mirror = {url}: {error}") from None
        self.url, self._root = url, root.rstrip("/")

    def copy(self, folder: Path, keep: int) -> None:
        """A finished checkpoint of this machine → its copy; the `keep` newest stay. Raises WorkFailed."""
        run, target = folder.parent.parent, f"{self._root}/checkpoints/{folder.name}"
        try:
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

    def refuse_another(self) -> None:
        """For a run at its beginning. Raises InputError when a run's copy is there."""
        if self._fs.exists(f"{self._root}/checkpoints/{LATEST}"):
            raise InputError(f"run.mirror = {self.url} already holds a run: go on with `uniclip-train resume {self.url}`, or "
                             "choose another with --set run.mirror=…")

    def config(self) -> Config:
        """The configuration of the run whose copy this is. Raises InputError."""
        with tempfile.NamedTemporaryFile(suffix=".toml") as file:
            Path(file.name).write_bytes(self._fs.cat_file(f"{self._root}/checkpoints/{self._latest()}/{CONFIG}"))
            return load_config(file.name)

    def _latest(self) -> str:
        pointer = f"{self._root}/checkpoints/{LATEST}"
        self._fs.invalidate_cache()
        if not self._fs.exists(pointer):
            raise InputError(f"{self.url} holds no checkpoint (no checkpoints/{LATEST}): give what run.mirror named")
        return self._fs.cat_file(pointer).decode()

    def fetch(self, run: Path) -> None:
        """The latest copied checkpoint and the logs → the folder `run`, which may hold older ones. Raises InputError."""
        name, here = self._latest(), run / "checkpoints" / LATEST
        if here.is_file() and here.read_text() > name:
            raise InputError(f"{run} stands at {here.read_text()} samples, {self.url} only at {name}: go on with "
                             f"`uniclip-train resume {run}`, or give another --folder")
        folder = run / "checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        source = f"{self._root}/checkpoints/{name}"
        for path in sorted(self._fs.ls(source, detail=False), key=lambda path: path.endswith(STATE)):
            self._fs.get_file(path, str(folder / path.rpartition("/")[2]))
        for log in LOGS:
            if self._fs.exists(f"{self._root}/{log}"):
                self._fs.get_file(f"{self._root}/{log}", str(run / log))
        shutil.copyfile(folder / CONFIG, run / CONFIG)
        here.write_text(name)
        say(f"fetched {self.url}, checkpoint {name}, to {run}")

    def _names(self) -> list[str]:
        self._fs.invalidate_cache()
        entries = self._fs.ls(f"{self._root}/checkpoints", detail=True)
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
