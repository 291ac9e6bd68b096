"""Nothing of ours goes out unasked: every command runs for real, watched from inside (Python) and from outside (strace)."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, encoded, picture
from short_runs import TINY
from test_architecture import ALL
from webserver import serving

from pipeline.evalsets import write_evalset
from trainer import checkpoint
from trainer.training import restored, snapshot

IDENTITY = "[0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]"
SETTINGS = " ".join(f"--set {key}={value}" for key, value in (TINY | {"optim.samples": 64, "run.folder": "run"}).items())
STEPS = f"""
uniclip-data scenes scenes --count 120 --held-out 24 --format wds
uniclip-data index scenes/train
uniclip-data urls table list.csv urls.parquet
uniclip-data urls cc3m cc3m.tsv cc3m.parquet --expect 2
uniclip-data urls cc12m cc12m.tsv cc12m.parquet --expect 2
uniclip-data urls yfcc15m-v2 v2.json v2.parquet --expect 2
uniclip-data urls yfcc15m-v1 v1.tsv v1.parquet --metadata metadata --expect 1
uniclip-data download urls.parquet shards --allow-address 127.0.0.1 --processes 1 --retries 0 --robots
uniclip-data retry shards --processes 1
uniclip-data index shards
uniclip-data verify shards
uniclip-data merge merged shards scenes/train=0.5
uniclip-data stats shards
uniclip-data duplicates shards
uniclip-data overlap shards overlap.parquet scenes/evalsets/retrieval
uniclip-data filter shards small.parquet --keep side>=8
uniclip-data forget shards http://example.com/a.jpg --rewrite
uniclip-data card shards card.md
uniclip-data peek shards peek.html
uniclip-data views scenes/train views.png --size 32
uniclip-data replay scenes/train view.png --sample-id SAMPLE --vector IDENTITY
uniclip-data bench scenes/train --samples 8 --rounds 1 --size 32
uniclip-data doctor .
uniclip-train presets
uniclip-train check scenes-tiny {SETTINGS} --set data.index=scenes/train
uniclip-train run scenes-tiny {SETTINGS} --set data.index=scenes/train --set eval.every_samples=64 --set eval.sets=["scenes/evalsets/colour"]
uniclip-train resume poisoned
uniclip-train replay poisoned/failures/000000000064
uniclip-train export run model --onnx
uniclip-eval zeroshot run scenes/evalsets/colour
uniclip-eval retrieval model scenes/evalsets/retrieval --out model.jsonl
uniclip-eval knn run things
uniclip-eval probe run things
uniclip-eval finetune run things --epochs 1
uniclip-eval suite run scenes/evalsets
uniclip-eval compare run run
uniclip-eval report run
uniclip-eval clip-benchmark eval --pretrained run --dataset wds/c --dataset_root scenes/evalsets/colour --no_amp --num_workers 0 --output c.json
uniclip-eval data list
uniclip-eval data retrieval shards pairs
uniclip-eval data check scenes/evalsets/colour
uniclip-eval data convert food101 food food-set
uniclip-eval data torchvision Food101 food food-too
uniclip-eval zeroshot --open-clip RN50 scenes/evalsets/colour --weights no-weights.pt
""".strip().splitlines()  # noqa: E501
MAY_END = {"uniclip-data doctor": (0, 1), "uniclip-eval data check": (0, 1), "uniclip-train check": (0, 1),
           "uniclip-eval zeroshot --open-clip": (2,)}
STRACE = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "signal=none", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-A",
          "-o"]
ADDRESS = re.compile(r'sin6?_port=htons\((\d+)\).*?"([\da-fA-F.:]+)"')


COVERED = {one for one in ALL if any(step.split()[:len(one)] == list(one) for step in STEPS)}


def test_every_command_is_among_the_watched():
    assert set(ALL) == COVERED


def written(world: Path, port_url) -> None:
    """What the commands are given, as small as they take it."""
    (world / "list.csv").write_text("url,caption\n" + "".join(f"{port_url(f'/{i}.jpg')},picture {i}\n" for i in range(30)))
    (world / "cc3m.tsv").write_text("one\thttp://h/1\ntwo\thttp://h/2\n")
    (world / "cc12m.tsv").write_text("http://h/1\tone\nhttp://h/2\ttwo\n")
    (world / "v2.json").write_text("".join(json.dumps({"caption": "a", "filename": "a", "url": f"http://h/{i}"}) + "\n"
                                           for i in range(2)))
    (world / "v1.tsv").write_text("1\t22\th22\n")
    cells = ["1", "22", "h22", *["x"] * 5, "title", "words", *["x"] * 6, "http://h/22.jpg", *["x"] * 7, "0"]
    (world / "metadata").write_text("\t".join(cells) + "\n")
    for split, ids in (("train", ("waffles/1", "pizza/2", "pizza/3")), ("test", ("waffles/4", "pizza/5"))):
        meta = world / "food" / "food-101" / "meta"
        meta.mkdir(parents=True, exist_ok=True)
        (meta / f"{split}.txt").write_text("\n".join(ids) + "\n")
        (meta / f"{split}.json").write_text(json.dumps({name: [one for one in ids if one.startswith(name)]
                                                        for name in ("waffles", "pizza")}))
        for one in ids:
            image = world / "food" / "food-101" / "images" / f"{one}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(encoded(picture(int(one[-1]))))
    for split, count in (("train", 40), ("test", 10)):
        things = [(encoded(picture(i)), i % 2) for i in range(count)]
        write_evalset(world / "things", split, things, "classification", ["one", "other"], ["{c}"])
    torch.save({"state_dict": {}}, world / "no-weights.pt")


def poison(world: Path) -> None:
    """A copy of the run that goes on into steps whose loss is not finite."""
    shutil.copytree(world / "run", world / "poisoned")
    config, t = restored(world / "poisoned", "cpu")
    torch.nn.init.constant_(t.model.text.token.weight, torch.inf)
    longer = config.model_copy(update={"optim": config.optim.model_copy(update={"samples": 80})})
    checkpoint.save(world / "poisoned", snapshot(longer, t, 0.0), 9)


def sample(world: Path) -> str:
    from pipeline.index import Index

    return str(Index.open(world / "scenes" / "train").columns([0])["sample_id"][0])


def from_outside(trace: Path) -> list[str]:
    """Addresses beyond this machine in what strace noted; port 53 is a look-up wherever the resolver is."""
    found = ADDRESS.findall(trace.read_text(errors="replace")) if trace.exists() else []
    return [f"{address} port {port}" for port, address in found
            if port == "53" or not (address.startswith("127.") or address in ("::1", "0.0.0.0", "::", "::ffff:127.0.0.1"))]


def can_trace() -> bool:
    return shutil.which("strace") is not None and subprocess.run([*STRACE, os.devnull, "true"]).returncode == 0


@pytest.mark.slow
def test_no_command_looks_anybody_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra `onnx`: pip install 'uniclip[onnx]'")
    pytest.importorskip("clip_benchmark", reason="needs the extra `bridge`: pip install 'uniclip[bridge]'")
    log, trace, outside = tmp_path / "look-ups", tmp_path / "trace", can_trace()
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "UNICLIP_SHARED")}
    environment = kept | {"PYTHONPATH": f"{ROOT / 'tests' / 'no_network'}:{ROOT}", "LOOK_UPS": str(log), "HOME": str(tmp_path),
                          "OMP_NUM_THREADS": "1"}
    sick = (503, {}, b"come back later")
    with serving() as site:
        site.pages = {f"/{i}.jpg": encoded(picture(i)) if i else sick for i in range(30)} | {"/robots.txt": b""}
        written(tmp_path, site.url)
        for step in STEPS:
            if step.startswith("uniclip-train resume"):
                poison(tmp_path)
            given = {"SAMPLE": lambda: sample(tmp_path), "IDENTITY": lambda: IDENTITY}
            program, *words = (given.get(word, lambda word=word: word)() for word in step.split())
            watched = [*STRACE, trace] if outside else []
            done = subprocess.run([*watched, Path(sys.executable).parent / program, *words], cwd=tmp_path, env=environment,
                                  capture_output=True, text=True, timeout=600)
            ends = next((codes for start, codes in MAY_END.items() if step.startswith(start)), (0,))
            assert done.returncode in ends, f"{step}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
            asked = log.read_text() if log.exists() else ""
            assert (asked, from_outside(trace)) == ("", []), step
    with capsys.disabled():
        print(f"\nevery command without network: {len(STEPS)} runs of {len(COVERED)} commands, 0 look-ups "
              f"({'Python and strace' if outside else 'Python alone: strace is not installed'})")


def test_the_watch_sees_a_look_up_from_python_and_from_native_code(tmp_path: Path) -> None:
    code = "import socket\ntry: socket.create_connection(('example.invalid', 80))\nexcept OSError as error: print(error)"
    native = "import ctypes; ctypes.CDLL(None).getaddrinfo(b'example.invalid', None, None, ctypes.byref(ctypes.c_void_p()))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "no_network"), "LOOK_UPS": str(tmp_path / "log")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "no network in this test" in done.stdout
    assert (tmp_path / "log").read_text().startswith("getaddrinfo 'example.invalid'")
    if can_trace():
        subprocess.run([*STRACE, tmp_path / "trace", sys.executable, "-c", native], env=environment, timeout=60)
        assert from_outside(tmp_path / "trace")
