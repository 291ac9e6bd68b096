"""A mirror may be a stranger's: nothing is written but in the folder that the user named."""

import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from short_runs import begin, trace

from pipeline.console import InputError
from trainer import checkpoint
from trainer.config_file import load_config
from trainer.mirror import Mirror
from trainer.train import resume


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]


@pytest.fixture(scope="module")
def theirs(scenes, tmp_path_factory):
    """A run's folder as a web server hands it out → (folder, URL)."""
    folder = tmp_path_factory.mktemp("theirs") / "run"
    begin(scenes, folder, **{"optim.samples": 32, "run.wandb": ""})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("latest", ["../../../evil", "/etc", "..", "000000000032/../../..", "٣٢", "x" * 900, "32\n33"])
def test_a_latest_that_is_no_number_is_refused_and_nothing_written(theirs, tmp_path, latest):
    folder, url = theirs
    pointer = folder / "checkpoints" / "latest"
    whole = pointer.read_text()
    (folder / "evil").mkdir(exist_ok=True)
    (folder / "evil" / "state.json").write_text("{}")
    try:
        pointer.write_text(latest)
        with pytest.raises(InputError, match=f"{url}/checkpoints/latest holds .* a checkpoint's name is a number"):
            resume(url, tmp_path / "deep" / "er" / "run")
        with pytest.raises(InputError, match=f"{pointer} holds .* a checkpoint's name is a number"):
            checkpoint.find(folder)
    finally:
        pointer.write_text(whole)
    assert everything(tmp_path) == set()


def test_a_fetched_run_writes_to_its_folder_alone(theirs, tmp_path, capsys):
    """Whatever its configuration says: another mirror, a cache, a wandb project; and whatever lies beside its files."""
    folder, url = theirs
    config = load_config(str(folder / "config.toml"))
    (state,) = (folder / "checkpoints").glob("*32/state.json")
    saved = state.parent / "config.toml"
    before = saved.read_text(), state.read_text()
    run = {"folder": tmp_path / "chosen", "mirror": f"file://{tmp_path}/mirror", "wandb": "x"}
    hostile = config.model_copy(update={
        "run": config.run.model_copy(update=run),
        "data": config.data.model_copy(update={"cache": tmp_path / "cache"})})
    saved.write_text(hostile.to_toml())
    told = json.loads(state.read_text())
    told.pop("crc32", None)
    told["hashes"]["config.toml"] = checkpoint.sha256_of(saved)
    state.write_text(json.dumps(told))
    (state.parent / "extra.sh").write_text("echo")
    try:
        with pytest.raises(InputError, match=re.escape(f"resume {url} fetches the run: say where to with --folder")):
            resume(url)
        resume(url, tmp_path / "here")
    finally:
        saved.write_text(before[0])
        state.write_text(before[1])
        (state.parent / "extra.sh").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert not list(tmp_path.rglob("extra.sh"))
    assert trace(tmp_path / "here") == trace(folder)
    out = capsys.readouterr().out
    assert all(word in out for word in (f"run.mirror=file://{tmp_path}/mirror", "run.wandb=x", f"data.cache={tmp_path}/cache"))
    here = load_config(str(tmp_path / "here" / "config.toml"))
    assert (here.run.folder, here.run.mirror, here.run.wandb, here.data.cache) == (tmp_path / "here", "", "", None)


def test_a_folder_that_holds_something_else_is_refused(scenes, theirs, tmp_path):
    _, url = theirs
    photos, other = tmp_path / "photos", tmp_path / "other"
    photos.mkdir()
    (photos / "a.jpg").write_text("x")
    begin(scenes, other, **{"optim.samples": 32, "run.seed": 5})
    for place in (photos, other):
        held = everything(place)
        with pytest.raises(InputError, match=f"--folder {place} holds something else than the run at {url}"):
            resume(url, place)
        assert everything(place) == held
    again = tmp_path / "again"
    Mirror(url).fetch(again)
    (again / "checkpoints" / "latest").unlink()  # as a fetch that was killed leaves it
    Mirror(url).fetch(again)
    assert checkpoint.read_state(checkpoint.find(again)).cursor.samples_seen == 32


def test_a_fetch_that_is_stopped_tears_no_checkpoint_that_is_here_already(theirs, tmp_path, monkeypatch):
    _, url = theirs
    again, mirror = tmp_path / "again", Mirror(url)
    mirror.fetch(again)
    latest = checkpoint.find(again)

    def stopped(source: str, target: str) -> None:
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mirror._fs, "get_file", stopped)
        mirror.fetch(again)
    assert checkpoint.read_state(latest).cursor.samples_seen == 32
    (latest / "model.safetensors").write_bytes(b"half")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mirror._fs, "get_file", stopped)
        mirror.fetch(again)
    assert not (latest / "state.json").exists(), "a torn checkpoint passes for one"
    mirror.fetch(again)
    assert checkpoint.read_state(latest).cursor.samples_seen == 32
