"""`doctor`: is this machine fit for the work? What was found, whether that is good, and the cure where it is not."""

import importlib.util
import os
import platform
import queue
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from pipeline.processes import cores

_BYTES_OF_URL = 30_000  # of a 256-pixel JPEG with its text, as img2dataset has published (1 M images ≈ 30 GB)
_OPEN_FILES = 4096
_RESIZES_GOOD = 150  # of 1024×768 → 256 pixels a second and core, below which images are resized slower than decoded
_DISK_GOOD = 100  # MB/s
_PILLOW = 13  # the first release whose decoders have no known hole
_PATIENCE = 5.0  # seconds with a resolver


@dataclass(frozen=True)
class Finding:
    """One line of the table. good: None where it only informs."""

    what: str
    found: str
    good: bool | None = None
    cure: str = ""


def _python() -> Finding:
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Finding("Python", f"{platform.python_version()} on {platform.system()}, {cores()} cores", good,
                   "" if good else "use Python 3.11 or 3.12")


def _torch() -> Finding:
    """In a process of its own: importing it takes seconds and may take a GPU."""
    code = ("import torch; n = torch.cuda.device_count(); "
            "print(torch.__version__, torch.version.cuda, n, torch.cuda.get_device_name(0) if n else '', sep='|')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return Finding("torch", (done.stderr.strip().splitlines() or ["import fails"])[-1], False, "pip install torch")
    release, cuda, count, name = done.stdout.strip().split("|")
    driver = shutil.which("nvidia-smi") is not None
    if driver and not int(count):
        return Finding("torch", f"{release}, sees no GPU though nvidia-smi is here", False,
                       f"install a driver for CUDA {cuda}, or a torch for your driver")
    return Finding("torch", f"{release}, " + (f"{count} × {name}" if int(count) else "no GPU: everything runs on the CPU"),
                   True if int(count) else None)


def _dali() -> Finding:
    found = next((found for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if (found := _version(name))), "")
    return Finding("DALI", found or "not installed: views are made with Pillow", True if found else None)


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:
        return ""


def resize_rate(seconds: float = 0.3) -> float:
    """1024×768 → 341×256, bicubic, per second on one core."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8))
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        image.resize((341, 256), Image.Resampling.BICUBIC)
        count += 1
    return count / (time.perf_counter() - began)


def _pillow() -> Finding:
    rate, simd = resize_rate(), "post" in PIL.__version__
    kind = "Pillow-SIMD" if simd else "Pillow"
    found = f"{kind} {PIL.__version__}, {rate:,.0f} resizes/s on a core"
    if int(PIL.__version__.partition(".")[0]) < _PILLOW:
        cure = f"only for pictures you trust: Pillow {_PILLOW} closed holes in its decoders"
        return Finding("Pillow", found, None if simd else False, cure + ("" if simd else f": pip install 'pillow>={_PILLOW}'"))
    good = rate >= _RESIZES_GOOD
    return Finding("Pillow", found, good, "" if good else "the cores are busy or slow; `make simd` installs Pillow-SIMD, "
                   "6 × as fast, for pictures you trust")


def _dataclasses() -> Finding:
    there = _version("dataclasses")
    found = f"back-port {there} is installed (img2dataset asks for it)" if there else "Python's own"
    return Finding("dataclasses", found, None,
                   "harmless here; with site-packages on PYTHONPATH, or after pip --target, it hides Python's own module and "
                   "nothing starts: unset PYTHONPATH, or pip uninstall dataclasses" if there else "")


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    good = soft >= _OPEN_FILES or soft == resource.RLIM_INFINITY
    return Finding("open files", f"{soft:,} of at most {hard:,}", good, "" if good else f"ulimit -n {min(hard, 65536)}")


def _resolver() -> Finding:
    path = Path("/etc/resolv.conf")
    servers = [line.split()[1] for line in path.read_text(encoding="utf-8").splitlines()
               if line.startswith("nameserver") and len(line.split()) > 1] if path.exists() else []
    if not servers:
        return Finding("DNS resolver", "none in /etc/resolv.conf", False, "name one there; for millions of URLs run a local "
                       "one such as knot-resolver")
    local = any(server.startswith("127.") or server == "::1" for server in servers)
    return Finding("DNS resolver", ", ".join(servers) + (", on this machine" if local else ", elsewhere"), local or None,
                   "" if local else "for millions of hosts a resolver on this machine (knot-resolver) loses fewer URLs")


def _lookup(host: str) -> Finding:
    """Of a name that the user gives: nothing leaves this machine unasked. In a daemon thread, for the system's own patience
    with a dead resolver is long, and nothing ends it."""
    if not host:
        return Finding("DNS answers", "not tried", None, "say --host NAME to look a public name up")
    answer: queue.SimpleQueue[OSError | UnicodeError | None] = queue.SimpleQueue()
    began = time.perf_counter()
    threading.Thread(target=lambda: answer.put(_unresolved(host)), daemon=True).start()
    try:
        error = answer.get(timeout=_PATIENCE)
    except queue.Empty:
        error = TimeoutError(f"no answer in {_PATIENCE:.0f} s")
    if error:
        return Finding("DNS answers", f"{host}: {error}", False, "check the name, the network and /etc/resolv.conf")
    return Finding("DNS answers", f"{host} in {1000 * (time.perf_counter() - began):.0f} ms", True)


def _unresolved(host: str) -> OSError | UnicodeError | None:
    """Why a name has no address."""
    try:
        socket.getaddrinfo(host, 80)
    except (OSError, UnicodeError) as error:
        return error


def disk_rate(folder: Path, megabytes: int = 64) -> float:
    """MB/s of writing a file and waiting until the disk has it."""
    data = os.urandom(1_000_000)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(megabytes):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return megabytes / (time.perf_counter() - began)


def _speed(folder: Path) -> Finding:
    try:
        rate = disk_rate(folder)
    except OSError as error:
        return Finding("disk speed", str(error), False, f"make {folder} writable, or choose another folder")
    return Finding("disk speed", f"{rate:,.0f} MB/s written to {folder}", rate >= _DISK_GOOD,
                   "" if rate >= _DISK_GOOD else "use a local SSD for shards, not a network folder")


def _space(folder: Path, urls: int, image_size: int) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:,.0f} GB free in {folder}"
    if not urls:
        return Finding("disk space", found, None, "say --urls to learn whether it is enough")
    needed = int(urls * _BYTES_OF_URL * (image_size / 256) ** 2)
    good = needed < 0.9 * free
    cure = "" if good else f"free {(needed / 0.9 - free) / 1e9:,.0f} GB, or a smaller --image-size"
    return Finding("disk space", f"{found}, {urls:,} URLs need about {needed / 1e9:,.1f} GB", good, cure)


def _extra(name: str, module: str, why: str) -> Finding:
    there = importlib.util.find_spec(module) is not None
    return Finding(name, _version(module) or "installed" if there else "not installed", None,
                   "" if there else f"pip install 'uniclip[{name.lower()}]' {why}")


def examine(folder: Path, urls: int = 0, image_size: int = 256, host: str = "") -> Iterator[Finding]:
    """Every finding, as it is made."""
    checks: list[Callable[[], Finding]] = [
        _python, _dataclasses, _torch, _dali, _pillow, _files, _resolver, lambda: _lookup(host), lambda: _speed(folder),
        lambda: _space(folder, urls, image_size),
        lambda: _extra("Ray", "ray", "for --distributor ray"), lambda: _extra("Spark", "pyspark", "for --distributor spark")]
    for check in checks:
        yield check()
