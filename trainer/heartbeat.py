"""Which process is gone: each says that it lives, watches the next one, and tells all when that falls silent.

A collective that misses a rank says at best that some connection broke, and with NCCL only after minutes.
"""

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

EVERY, SILENT, CONNECT = 1.0, 15.0, 60.0  # seconds
GONE = "gone"


class Heartbeat:
    """Beats in the rendezvous' store from a thread of its own; ends this process when another one is gone."""

    def __init__(self, rank: int, world: int):
        self._rank, self._next = rank, (rank + 1) % world
        self._store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                               timeout=timedelta(seconds=CONNECT))
        self._run = os.environ.get("TORCHELASTIC_RUN_ID", "") + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        self._over, self._said = threading.Event(), threading.Event()
        self.verdict = ""
        self._put(f"who{rank}", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
        self._put(f"beat{rank}", "0")
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._thread.start()

    def tell(self, reason: str) -> None:
        """This process ends because of `reason`: the others should say so too."""
        with suppress(RuntimeError):
            self._put(GONE, f"{self._get(f'who{self._rank}')} ended: {reason}")

    def close(self) -> None:
        """This process is done, which is no reason to worry."""
        self._over.set()
        self._thread.join()
        with suppress(RuntimeError):  # the process that held the store was done before
            self._put(f"beat{self._rank}", "done")

    def wait_for_verdict(self) -> str:
        """Who is gone, as soon as it is known; "" when nobody is."""
        if self._said.wait(SILENT + 3 * EVERY):
            time.sleep(3 * EVERY)  # this process may hold the store: the others should have read it
        return self.verdict

    def _live(self) -> None:
        verdict, beats = "", self._beats()
        while not verdict and not self._over.wait(EVERY):
            try:
                verdict = next(beats)
            except RuntimeError:
                verdict = "the rendezvous at {MASTER_ADDR}:{MASTER_PORT} is gone".format(**os.environ)
        if verdict:
            self._end(verdict)

    def _beats(self) -> Generator[str]:
        """Beat and look, once for each that is taken → the verdict, or "".

        Silence is counted in own beats: while all processes are suspended none of them is silent.
        """
        last, since = "", 0
        for count in itertools.count(1):
            self._put(f"beat{self._rank}", str(count))
            beat = self._get(f"beat{self._next}")
            if beat != last:
                last, since = beat, count
            if beat and beat != "done" and (count - since) * EVERY > SILENT:
                self._put(GONE, f"{self._get(f'who{self._next}')} has been silent for {SILENT:.0f} s")
            yield self._get(GONE)

    def _end(self, verdict: str) -> None:
        """Leave the main thread time to end by itself with the verdict; a collective may hold it for ever."""
        self.verdict = verdict
        self._said.set()
        if not self._over.wait(6 * EVERY):
            print(f"error: rank {self._rank} ends: {verdict}", file=sys.stderr, flush=True)
            os._exit(1)

    def _name(self, key: str) -> str:
        return f"uniclip/{self._run}/{key}"

    def _put(self, key: str, value: str) -> None:
        self._store.set(self._name(key), value)

    def _get(self, key: str) -> str:
        """"" where there is none yet."""
        return self._store.get(self._name(key)).decode() if self._store.check([self._name(key)]) else ""
