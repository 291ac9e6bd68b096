"""A run's copy behind an fsspec URL: whole checkpoints, and the log as far as they go."""

import re
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from pipeline.console import InputError, WorkFailed, say
from pipeline.files import replacing, sha256_of
from pipeline.seals import open_json
from trainer.config import Config
from trainer.config_file import as_changed, load_config

STATE, CONFIG, LATEST, LOGS = "state.json", "config.toml", "latest", ("metrics.jsonl", "bad_samples.jsonl")
FILES = (CONFIG, "model.safetensors", "average.safetensors", "optimizer.pt", "tokenizer.json", STATE)  # of a checkpoint
_WRITES = (("run", "mirror"), ("run", "wandb"), ("data", "cache"))  # where a run may write besides its folder


def is_name(name: str) -> bool:
    """Whether a checkpoint can be called so: a number, and never a path to somewhere else."""
    return re.fullmatch(r"[0-9]{1,18}", name) is not None


def named(latest: str, place: str) -> str:
    """The checkpoint that a `latest` names. Raises InputError when it names none: a stranger may have written it."""
    if is_name(name := latest.strip()):
        return name
    raise InputError(f"{place} holds {latest[:60]!r}, and a checkpoint's name is a number: it is damaged, or no run of ours; "
                     "give one checkpoint's folder, or another copy of the run")


def superseded(names: Iterable[str], newest: str, keep: int) -> list[str]:
    """Of the names of checkpoints those that make way for `newest`.

    The `keep` newest stay; later ones are of a line that the run has left by going back to an older checkpoint. What is
    not named as a checkpoint, somebody else has put there: it stays.
    """
    ours = sorted(filter(is_name, names))
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
        earlier = [other for other in self._names() if is_name(other) and other < name
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
                latest = self._fs.cat_file(f"{self._root}/checkpoints/{LATEST}").decode()
            except (FileNotFoundError, NotADirectoryError):
                return ""
            return latest and named(latest, f"{self.url}/checkpoints/{LATEST}")

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
        """The latest copied checkpoint and the logs → the folder `run`, which may hold older ones of the same run.

        Raises InputError, also for a folder that holds anything else.
        """
        theirs, name = self.config(), self._latest()
        with self._reading():
            own, here = self._refuse_foreign(run, theirs), run / "checkpoints" / LATEST
            if here.is_file() and (at := named(here.read_text(encoding="utf-8", errors="replace"), str(here))) > name:
                raise InputError(f"{run} stands at {at} samples, {self.url} only at {name}: go on with "
                                 f"`uniclip-train resume {run}`, or give another --folder")
            with replacing(run / CONFIG) as temporary:
                temporary.write_text(self._tamed(theirs, own, run).to_toml(), encoding="utf-8")
            self._fetch(run, name)
            with replacing(here) as temporary:
                temporary.write_text(name, encoding="utf-8")
        say(f"fetched {self.url}, checkpoint {name}, to {run}")

    def _refuse_foreign(self, run: Path, theirs: Config) -> Config | None:
        """The configuration of the same run in this folder, None where the folder is empty. Raises InputError otherwise."""
        if not run.is_dir() or all(path.name.startswith(".") for path in run.iterdir()):
            return None
        own = load_config(str(run / CONFIG)) if (run / CONFIG).is_file() else None
        if own is None or _alike(as_changed(own, theirs), run) != _alike(theirs, run):
            raise InputError(f"--folder {run} holds something else than the run at {self.url}: give a new folder")
        return own

    def _tamed(self, theirs: Config, own: Config | None, run: Path) -> Config:
        """Their configuration for this folder. It writes there, back to this URL, and where `own` did: nowhere else."""
        kept: dict[str, dict[str, Any]] = {"run": {"folder": run}, "data": {}}
        left = []
        for section, name in _WRITES:
            value = getattr(getattr(theirs, section), name)
            before = getattr(getattr(own, section), name) if own else type(getattr(theirs, section)).model_fields[name].default
            if value != before and str(value).rstrip("/") != self.url.rstrip("/"):
                kept[section][name] = before
                left.append(f"--set {section}.{name}={value}")
        if left:
            say(f"the run writes to {run} only, not where the configuration at {self.url} says; to have that too: "
                + " ".join(left))
        return theirs.model_copy(update={section: getattr(theirs, section).model_copy(update=values)
                                         for section, values in kept.items()})

    def _fetch(self, run: Path, name: str) -> None:
        source, folder = f"{self._root}/checkpoints/{name}", run / "checkpoints" / name
        if not _holds(folder, self._fs.cat_file(f"{source}/{STATE}")):  # else a kill would tear what is whole
            (folder / STATE).unlink(missing_ok=True)  # it is the last to come: without it the folder is no checkpoint
            self._fetch_files(source, folder)
        for log in LOGS:
            if self._fs.exists(f"{self._root}/{log}"):
                self._fs.get_file(f"{self._root}/{log}", str(run / log))

    def _fetch_files(self, source: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        there = {path.rpartition("/")[2] for path in self._fs.ls(source, detail=False)}
        for file in FILES:
            if file in there:
                self._fs.get_file(f"{source}/{file}", str(folder / file))

    def _names(self) -> list[str]:
        self._fs.invalidate_cache()
        entries = self._fs.ls(f"{self._root}/checkpoints", detail=True)
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]


def _holds(folder: Path, state: bytes) -> bool:
    """Whether the checkpoint with this state.json is here, and whole."""
    try:
        return (folder / STATE).read_bytes() == state and all(sha256_of(folder / name) == digest for name, digest
                                                              in open_json(state)["hashes"].items())
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, AttributeError, RecursionError):
        return False


def _alike(config: Config, folder: Path) -> Config:
    """As if the run were in this folder."""
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": folder})})
