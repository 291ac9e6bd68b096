"""`make demo`: the whole road on one machine, each command shown as a user would type it.

Interrupted, it goes on where it stopped. `python -m tools.demo OUT --scenes 2000 --samples 20000` is a smaller one.
"""

import shlex
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import typer

BIN = Path(sys.executable).parent


class Quiet(SimpleHTTPRequestHandler):
    """Python's own file server without a line per request."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Does not complain of clients that leave early."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Report what is not the client's doing."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # pyright: ignore[reportArgumentType]


def serve(folder: Path, port: int) -> Server:
    """Serve `folder` on 127.0.0.1 from a thread."""
    try:
        server = Server(("127.0.0.1", port), partial(Quiet, directory=str(folder)))
    except OSError as error:
        sys.exit(f"error: port {port} of 127.0.0.1 is taken ({error.strerror}): choose another with `make demo PORT=8378`")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def show(command: str) -> None:
    """Print the command, run it, stop the demonstration when it fails."""
    print(f"\n$ {command}", flush=True)
    program, *words = shlex.split(command)
    done = subprocess.run([BIN / program, *words])
    if done.returncode:
        sys.exit(done.returncode)


def data(out: Path, scenes: int, held_out: int, port: int) -> None:
    """Draw, serve, download, index."""
    server = serve(out / "scenes" / "train", port)
    if not (out / "scenes").is_dir():
        show(f"uniclip-data scenes {out}/scenes --count {scenes} --held-out {held_out}")
    print(f"\n(serving {out}/scenes/train at http://127.0.0.1:{port}/)", flush=True)
    if not (out / "urls.parquet").is_file():
        show(f"uniclip-data urls table {out}/scenes/train/captions.tsv {out}/urls.parquet --url-column image "
             f"--caption-column caption --url-prefix http://127.0.0.1:{port}/")
    show(f"uniclip-data download {out}/urls.parquet {out}/shards --image-size 64 --allow-address 127.0.0.1")
    server.shutdown()
    show(f"uniclip-data index {out}/shards")


def training(out: Path, samples: int | None) -> None:
    """Train, or go on training."""
    if (out / "run" / "checkpoints" / "latest").is_file():
        show(f"uniclip-train resume {out}/run")
        return
    shorter = f" --set optim.samples={samples}" if samples else ""
    show(f"uniclip-train run scenes-tiny --set data.index={out}/shards --set run.folder={out}/run{shorter}")


def results(out: Path) -> None:
    """Evaluate on scenes that training has not seen, and report."""
    sets = f"{out}/scenes/evalsets"
    show(f"uniclip-data views {out}/shards {out}/run/views.png --config {out}/run/config.toml")
    show(f"uniclip-eval retrieval {out}/run {sets}/retrieval")
    show(f"uniclip-eval zeroshot {out}/run {sets}/colour {sets}/shape {sets}/relation")
    show(f"uniclip-eval report {out}/run")


def main(
    out: Annotated[Path, typer.Argument(help="Folder for everything.")] = Path("demo"),
    scenes: Annotated[int, typer.Option(help="Training scenes to draw.")] = 20_000,
    held_out: Annotated[int, typer.Option(help="Scenes in each evaluation set.")] = 1_000,
    samples: Annotated[int | None, typer.Option(help="Samples to train for; the preset's own when not given.")] = None,
    port: Annotated[int, typer.Option(help="Port of the file server on 127.0.0.1.")] = 8377,
) -> None:
    """Scenes → HTTP → shards → index → training → evaluation → report."""
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    data(out, scenes, held_out, port)
    training(out, samples)
    results(out)
    print(f"\nfrom scenes to report in {(time.monotonic() - begin) / 60:.1f} minutes; open {out}/run/report.html")


if __name__ == "__main__":
    typer.run(main)
