"""A run that is killed goes on as if never stopped; a run that cannot start says why in one line."""

import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import command
from short_runs import begin, launch, losses, on_ranks, overrides, run_until, trace, weights

from pipeline.console import InputError, WorkFailed
from pipeline.seals import open_json
from trainer import checkpoint
from trainer.config_file import load_config
from trainer.distributed import Ranks
from trainer.log import METRICS, cut_back
from trainer.orders import Orders
from trainer.train import resume, train
from trainer.training import restored, snapshot, start


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    begin(scenes, folder)
    return folder


def test_the_run_learns_and_leaves_what_it_should(finished):
    losses = [row[2] for row in trace(finished)]
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])
    kept = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert kept == ["000000000432", "000000000480", "latest"]
    names = {p.name for p in checkpoint.find(finished).iterdir()}
    assert names == {"model.safetensors", "optimizer.pt", "tokenizer.json", "config.toml", "state.json"}
    assert any((finished / "tensorboard").iterdir())


@pytest.mark.parametrize("executor", ["dali", "pillow"])
def test_killed_and_resumed_equals_never_stopped(scenes, tmp_path, executor):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = {"data.executor": executor}
    begin(scenes, whole, **more)
    words = ["run", "scenes-tiny", *(w for o in overrides(scenes, killed, **more) for w in ("--set", o))]
    assert run_until(launch(1, words), killed, 9)
    assert run_until(launch(1, ["resume", str(killed)]), killed, 18)
    done = command("uniclip-train", "resume", killed)
    assert done.returncode == 0, done.stderr
    assert trace(killed) == trace(whole)
    assert weights(killed) == weights(whole)


def test_a_torn_checkpoint_is_never_used(scenes, tmp_path, finished):
    """Stopped in the middle of writing a checkpoint: files are there, state.json is not, `latest` is the one before."""
    folder = tmp_path / "torn"
    begin(scenes, folder, **{"optim.samples": 96})
    config, training = restored(folder)
    torn = folder / "checkpoints" / "000000000144"
    torn.mkdir()
    (torn / checkpoint.WEIGHTS).write_bytes(b"half")
    assert training.cursor.samples_seen == 96
    longer = config.model_copy(update={"optim": config.optim.model_copy(update={"samples": 144})})
    train(longer, training)
    assert checkpoint.find(folder).name == "000000000144"
    checkpoint.read_state(checkpoint.find(folder))


def test_resuming_a_finished_run_changes_nothing(scenes, tmp_path):
    folder = tmp_path / "done"
    begin(scenes, folder, **{"optim.samples": 64})
    before = trace(folder), weights(folder)
    assert command("uniclip-train", "resume", folder).returncode == 0
    assert (trace(folder), weights(folder)) == before


def test_a_loaded_model_is_the_saved_one(finished):
    loaded, again = checkpoint.load_model(finished), checkpoint.load_model(checkpoint.find(finished))
    image, ids = torch.randn(3, 3, 24, 24), torch.from_numpy(loaded.tokenizer(["a red circle", "x", ""]))
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_image(image), again.model.encode_image(image))
        assert torch.equal(loaded.model.encode_text(ids), again.model.encode_text(ids))
    assert not loaded.model.training
    assert loaded.run == again.run == finished


def test_damage_is_named(scenes, tmp_path):
    folder = tmp_path / "damaged"
    begin(scenes, folder, **{"optim.samples": 32})
    file = checkpoint.find(folder) / checkpoint.WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    whole = folder / "checkpoints" / f"{0:012d}"
    with pytest.raises(InputError, match=f"does not match its sha256: use {whole}$"):
        checkpoint.load_model(folder)
    with pytest.raises(InputError, match="--folder .* is no URL"):
        resume(str(whole), tmp_path / "elsewhere")


def test_a_loss_that_is_not_finite_stops_before_the_update(scenes, tmp_path):
    folder = tmp_path / "nan"
    config = load_config("scenes-tiny", overrides(scenes, folder))
    training = start(config)
    with torch.no_grad():
        training.model.image_head.out.weight[0, 0] = float("nan")
    before = {name: p.clone() for name, p in training.model.named_parameters()}
    with pytest.raises(WorkFailed, match="not finite"):
        train(config, training)
    assert all(torch.equal(p, before[name], ) or name == "image_head.out.weight"
               for name, p in training.model.named_parameters())


def test_a_killed_rewrite_never_takes_the_latest_checkpoint_away(scenes, tmp_path, monkeypatch):
    """Resumed from an older checkpoint and stopped while writing one that `latest` named before."""
    folder = tmp_path / "back"
    begin(scenes, folder, **{"optim.samples": 144, "run.keep": 9})
    config, training = restored(folder / "checkpoints" / "000000000096")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, training)
    assert checkpoint.find(folder).name == "000000000096"
    checkpoint.load_model(folder)


def test_of_a_run_that_went_back_the_newest_checkpoints_stay(scenes, tmp_path):
    """With its mirror; those that it left behind go with the first new one."""
    folder, mirror = tmp_path / "run", tmp_path / "mirror"
    begin(scenes, folder, **{"optim.samples": 240, "run.keep": 9, "run.mirror": f"file://{mirror}"})
    shutil.copytree(folder / "checkpoints" / "000000000240", folder / "checkpoints" / "best")
    shutil.copytree(folder / "checkpoints" / "best", mirror / "checkpoints" / "best")
    config, t = restored(folder / "checkpoints" / "000000000096", overrides=["run.keep=2", "run.save_every_samples=16"])
    shorter = config.model_copy(update={"optim": config.optim.model_copy(update={"samples": 128})})
    train(shorter, t)
    for place in (folder, mirror):
        kept = sorted(path.name for path in (place / "checkpoints").iterdir())
        assert kept == ["000000000112", "000000000128", "best", "latest"]
        assert checkpoint.read_state(checkpoint.find(place)).cursor.samples_seen == 128


def test_ranks_that_do_not_write_a_checkpoint_copy_nothing_for_it(finished):
    config, t = restored(finished)
    weights = sum(x.nbytes for x in t.model.state_dict().values())
    assert snapshot(config, t, 0.0).nbytes > 2.9 * weights  # and AdamW's two moments
    t.ranks = Ranks(1, 2, 16)
    assert snapshot(config, t, 0.0).nbytes == 0


def test_a_full_disk_is_one_clear_line_and_the_last_checkpoint_stays(scenes, tmp_path):
    folder = tmp_path / "full"
    words = [w for o in overrides(scenes, folder) for w in ("--set", o)]
    size = 2**19  # of one file, in bytes: less than the weights and more than the log
    done = command("uniclip-train", "run", "scenes-tiny", *words, preexec_fn=lambda: limit_files(size))
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path, but: int = 0) -> Path:
    """All that is free there, but for so many bytes."""
    rest = disk / "rest"
    free = os.statvfs(disk)
    rest.write_bytes(bytes(free.f_bavail * free.f_bsize - but))
    return rest


def test_a_full_disk_is_named_with_its_cure_also_by_the_log_and_the_first_checkpoint(scenes, small_disk):
    folder = small_disk / "run"
    rest = fill(small_disk, 2**17)
    with pytest.raises(WorkFailed, match=rf"{folder}/checkpoints/0+ could not be written \(.*No space left on device.*\): it "
                                         r"is the run's first; make room \(a checkpoint needs [\d.]+ MiB\), then give the"):
        begin(scenes, folder)
    rest.unlink()
    config = load_config("scenes-tiny", overrides(scenes, folder, **{"run.save_every_samples": 480, "run.keep": 1}))
    t = start(config)

    class Filling(Orders):
        @property
        def stop(self) -> bool:
            if t.cursor.samples_seen == 160 and not rest.exists():
                fill(small_disk)
            return False

        @stop.setter
        def stop(self, _: bool) -> None: ...

    with pytest.raises(WorkFailed, match=rf"{folder}/metrics.jsonl could not be written \(No space left on device\): the last "
                                         rf"checkpoint is whole; make room, then `uniclip-train resume {folder}`"):
        train(config, t, Filling())
    rest.unlink()
    resume(str(folder))
    assert [row[0] for row in trace(folder)] == list(range(1, 31))


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing past the limit is an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_batch_of_bad_images_ends_the_run_with_a_clear_line(scenes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes / "train", data)
    for tar in data.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    config = load_config("scenes-tiny", overrides(scenes, tmp_path / "run", **{"data.index": data}))
    with pytest.raises(WorkFailed, match="no image before 16 samples could be decoded, see .*bad_samples.jsonl"):
        train(config, start(config))


def test_a_run_goes_on_from_another_folder(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(scenes)
    begin(scenes, tmp_path / "run", **{"data.index": "train", "optim.samples": 32})
    monkeypatch.chdir(tmp_path)
    assert restored(tmp_path / "run")[1].cursor.samples_seen == 32


def test_two_processes_train_the_same_model_as_one(scenes, tmp_path, finished):
    """Also with each slice of the batch taken in three parts."""
    folder = tmp_path / "two"
    more = {"optim.accumulation": 3}
    on_ranks(2, ["run", "scenes-tiny", *(w for o in overrides(scenes, folder, **more) for w in ("--set", o))])
    assert losses(folder)[:20] == pytest.approx(losses(finished)[:20], rel=1e-4)


def test_a_run_goes_on_with_another_number_of_processes(scenes, tmp_path):
    """From one to three, which do not divide the batch: the next 15 losses are those of the undisturbed run."""
    folder = tmp_path / "one"
    begin(scenes, folder, **{"run.keep": 9})
    undisturbed = losses(folder)
    on_ranks(3, ["resume", str(folder / "checkpoints" / "000000000240")])
    assert losses(folder)[:15] == undisturbed[:15]
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-4)


def test_resume_takes_what_leaves_the_result_as_it_is(scenes, tmp_path, finished):
    folder, moved, mirror = tmp_path / "run", tmp_path / "moved", tmp_path / "mirror"
    begin(scenes, folder, **{"run.keep": 9})
    half = folder / "checkpoints" / "000000000240"
    shutil.copytree(scenes / "train", moved)
    more = {"data.index": moved, "run.mirror": f"file://{mirror}", "run.save_every_samples": 96, "run.recompute": "true",
            "eval.every_samples": 480, "eval.held_out": moved, "optim.batch_size": 16, "model.image.size": 24}  # two as before
    done = command("uniclip-train", "resume", half, *(f"--set={key}={value}" for key, value in more.items()))
    assert done.returncode == 0, done.stderr
    assert [row for row in (folder / "metrics.jsonl").read_text().splitlines() if "held_out_loss" in row]
    rows = [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "step" in row]
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in rows] == [row[:1] + row[2:4] for row in trace(finished)]
    assert weights(folder) == weights(mirror) == weights(finished)
    assert load_config(str(folder / "config.toml")).data.index == moved
    assert checkpoint.load_config_of(half).run.save_every_samples == 96  # as after a kill before the next checkpoint
    assert checkpoint.load_model(half).config.data.index == scenes / "train"
    with pytest.raises(InputError, match="already holds a run"):
        restored(half, overrides=[f"run.mirror=file://{mirror}/../mirror"])
    manifest = moved / "manifest.json"
    manifest.write_text(json.dumps(open_json(manifest.read_bytes()) | {"fingerprint": "another"}))
    with pytest.raises(InputError, match="the data stream's 'index' was"):
        restored(half)


@pytest.mark.parametrize("override", ["optim.lr=1", "optim.samples=960", "run.folder=x", "data.weak.flip_p=1", "model.dim=8"])
def test_resume_refuses_what_would_make_another_run(finished, override):
    with pytest.raises(InputError) as told:
        resume(str(finished), overrides=[override])
    key = override.partition("=")[0]
    assert f"--set {override}: with another {key} it would be another run" in str(told.value)
    assert f"`uniclip-train run {finished}/config.toml --set {override} --set run.folder=…` starts one" in str(told.value)
    with pytest.raises(InputError, match="unknown key; did you mean run.mirror"):
        resume(str(finished), overrides=["run.mirorr=x"])


WRONG = [
    (["run", "nowhere.toml"], 2, "neither a TOML file nor a preset"),
    (["run", "scenes-tny"], 2, "did you mean scenes-tiny?"),
    (["run", "scenes-tiny", "--set", "optim.lrate=1"], 2, "did you mean optim.lr_scale or optim.lr?"),
    (["run", "scenes-tiny", "--set", "data.index=nowhere"], 2, "nowhere"),
    (["run", "scenes-tiny", "--set", "run.device=cuda:7"], 2, "no CUDA device"),
    (["run", "scenes-tiny", "--set", "model.image.arch=resnet50"], 2, "[model] cannot be built"),
    (["run", "scenes-tiny", "--set", "model.image.heads=5"], 2, "[model] cannot be built"),
    (["run", "scenes-tiny", "--set", "run.folder=/proc/nowhere/run"], 2, "/proc/nowhere"),
    (["resume", "nowhere"], 2, "holds no checkpoint"),
]


@pytest.mark.parametrize("words, code, message", WRONG, ids=lambda x: str(x)[:30])
def test_wrong_input_is_one_clear_line(scenes, tmp_path, words, code, message):
    if torch.cuda.is_available() and "run.device=cuda:7" in words:
        pytest.skip("there is a CUDA device")
    if not any("data.index" in word for word in words) and words[0] == "run":
        own = ["--set", f"data.index={scenes / 'train'}", "--set", f"run.folder={tmp_path}/run"]
        words = ["run", words[1], *own, *words[2:]]
    done = command("uniclip-train", *words)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_is_not_started_over_another(scenes, finished):
    done = command("uniclip-train", "run", "scenes-tiny", *(w for o in overrides(scenes, finished) for w in ("--set", o)))
    assert done.returncode == 2
    assert "already holds a run: go on with `uniclip-train resume" in done.stderr


def test_other_data_on_resume_is_refused(scenes, tmp_path):
    folder = tmp_path / "moved"
    begin(scenes, folder, **{"optim.samples": 32})
    config, training = restored(folder)
    state = checkpoint.read_state(checkpoint.find(folder))
    other = open_json((checkpoint.find(folder) / "state.json").read_bytes())
    other["cursor"]["index"] = "another"
    (checkpoint.find(folder) / "state.json").write_text(json.dumps(other))
    assert state.cursor == training.cursor
    done = command("uniclip-train", "resume", folder)
    assert done.returncode == 2
    assert "the data stream's 'index' was another" in done.stderr


def test_a_log_that_a_power_cut_damaged_is_cut_back_to_its_whole_lines(tmp_path):
    (tmp_path / METRICS).write_bytes(b'{"samples": 16}\n\0\0\xff\n{"samples": 32}\n{"samples": 48}\n{"sampl')
    cut_back(tmp_path / METRICS, 32)
    assert (tmp_path / METRICS).read_text() == '{"samples": 16}\n{"samples": 32}\n'
