"""Every figure that only a GPU can show, with its target: `python -m tools.gpu_check`.

Each part runs in a process of its own with a time limit; what it measures is merged into benchmarks/h200.json, with a table
beside it and a page for each profile. Started again, the command passes over what this code has measured on this GPU.
Without a GPU it lists its parts. `--rehearse` runs their code on the CPU at toy sizes: before a GPU is there, and in tests.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch
import typer

from pipeline.files import replacing, write_json
from tools.gpu_parts import LACKING, MEASURED, PARTS, number

ROOT = Path(__file__).parent.parent
OUT = Path("benchmarks/h200.json")
REHEARSAL = "CPU, a rehearsal at toy sizes"
BASELINES = ("torch", "triton", "torchvision", "timm", "open_clip_torch", "nvidia-dali-cuda130", "pillow", "numpy")


def sources() -> str:
    """What tells this code from another, also where there is no repository."""
    files = sorted(path for package in ("pipeline", "trainer", "tools") for path in (ROOT / package).rglob("*")
                   if path.suffix in (".py", ".toml"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def commit() -> str:
    """Git's name for it, as far as there is one."""
    with suppress(OSError, subprocess.CalledProcessError):  # a copy without its repository, or without git
        words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return "no repository"


def versions() -> dict[str, str]:
    """Of everything that is measured or measured against."""
    found = {}
    for package in BASELINES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def measure(name: str, scratch: Path, device: str, seconds: float) -> dict:
    """A part's status and figures, from a process of its own: what one does to CUDA or to memory is not the next one's.

    A part that fails or runs out of time has its last line for a status; its children end with it.
    """
    answer, log = scratch / f"{name}.json", scratch / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, "-m", "tools.gpu_parts", name, scratch, device], cwd=ROOT, stdout=file,
                                   stderr=file, start_new_session=True)
        try:
            status = f"failed with exit status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            status = f"out of time after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if answer.is_file():
        return json.loads(answer.read_text(encoding="utf-8"))
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return {"status": f"{status}: {lines[-1].strip() if lines else 'it said nothing'}"}


def table(parts: dict[str, dict]) -> str:
    """Markdown: a line for each figure that has a target or is stated, whether it was measured or not."""
    lines = ["| part | what | figure | value | target | against | verdict | commit |", "|---|---|---|---:|---|---|---|---|"]
    for name, part in PARTS.items():
        record: dict = parts.get(name, {"status": "not measured"})
        status = f"not measured: {record['status']}" if lacks(record) else record["status"]
        for nth, target in enumerate(part.targets or (None,)):
            cells = ["", "", "", "", status]
            if target:
                value = record.get("figures", {}).get(target.figure)
                cells = [target.figure, "" if value is None else f"{number(value)} {target.unit}".rstrip(), str(target),
                         target.against, status if value is None else target.verdict(value, toy(record))]
            first = ["", ""] if nth else [name, part.about]
            lines.append(f"| {' | '.join([*first, *cells, record.get('commit', '')])} |")
    return "\n".join(lines) + "\n"


def toy(record: dict) -> bool:
    """Whether it is of a rehearsal, in which only exact targets hold."""
    return record.get("machine") == REHEARSAL


def lacks(record: dict) -> bool:
    """Whether a package was missing."""
    return record["status"].startswith(LACKING)


def good(name: str, record: dict) -> bool:
    """No failure, no target missed. A part that lacks a package was not asked."""
    return lacks(record) or record["status"] == MEASURED and all(
        target.verdict(record["figures"][target.figure], toy(record)) != "missed" for target in PARTS[name].targets)


def keep(out: Path, name: str, record: dict, page: str) -> dict[str, dict]:
    """Merge one part into what is there → all parts; its profile and the table go beside it."""
    kept = json.loads(out.read_text(encoding="utf-8"))["parts"] if out.is_file() else {}
    kept[name] = record
    write_json(out, {"parts": kept})
    machines = ", ".join(sorted({of["machine"] for of in kept.values()}))
    for path, text in ((out.with_suffix(".md"), f"{machines}\n\n{table(kept)}"),
                       (out.with_name(f"{out.stem}-{name}.md"), page)):
        if text:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return kept


def chosen(words: list[str]) -> list[str]:
    """Parts by name or by what comes before the dot; all of them by default."""
    for word in words:
        if not any(name == word or name.startswith(f"{word}.") for name in PARTS):
            raise typer.BadParameter(f"--part {word}: parts are {', '.join(PARTS)}")
    return [name for name in PARTS if not words or name in words or name.partition(".")[0] in words]


def main(
    part: Annotated[list[str] | None, typer.Option(help="Only this part, or all that begin so: train. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help=f"Where figures are merged, {OUT} by default.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what this code has measured, too.")] = False,
    minutes: Annotated[float, typer.Option(help="Time limit of a part.")] = 5,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="On the CPU at toy sizes; kept with --out only.")] = False,
) -> None:
    """Measure on this GPU; exit 1 when a part failed, ran out of time or missed a target."""
    names = chosen(part or [])
    if not rehearse and not torch.cuda.is_available():
        print(f"no CUDA device: nothing is measured. Parts, and what is asked of an H200:\n\n{table({})}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        out = out or (Path(scratch) / "rehearsal.json" if rehearse else OUT)
        device, machine = ("cpu", REHEARSAL) if rehearse else ("cuda", torch.cuda.get_device_name())
        known = json.loads(out.read_text(encoding="utf-8"))["parts"] if out.is_file() else {}
        same = {"sources": sources(), "machine": machine}
        about = same | {"commit": commit(), "cores": os.cpu_count(), "versions": versions(),
                        "command": shlex.join(["python", "-m", "tools.gpu_check", *sys.argv[1:]])}
        for name in names:
            before = known.get(name, {})
            if not again and before.get("status") == MEASURED and same.items() <= before.items():
                print(f"{name}: measured before", flush=True)
                continue
            begin = time.time()
            record = measure(name, Path(scratch), device, 60 * minutes)
            page = record.get("figures", {}).pop("markdown", "")
            record |= about | {"seconds": round(time.time() - begin, 1)}
            known = keep(out, name, record, page)
            print(f"{name}: {record['status']}, {record['seconds']:.0f} s", flush=True)
        print(f"\n{table(known)}")
        raise typer.Exit(not all(good(name, known[name]) for name in names))


if __name__ == "__main__":
    typer.run(main)
