"""Known illnesses of such runs, read off the numbers in the log; each is told once."""

import statistics
from collections import deque

from trainer.similarity import TEMPERATURE_FLOOR

HISTORY, FAR = 50, 8  # logged steps; mean absolute deviations
WAITS = 5  # logged steps
LATE = 0.2  # of the run: from here on a loss at chance, or embeddings all alike, are an illness


class Hints:
    """`samples`: length of the run."""

    def __init__(self, samples: int):
        self._samples, self._told = samples, set()
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._waits: deque[float] = deque(maxlen=WAITS)

    def of(self, m: dict) -> list[str]:
        """What one logged step's numbers give away that was not said before."""
        found = {name: text for name, text in self._found(m).items() if name not in self._told}
        self._told |= found.keys() - {"spike"}
        return list(found.values())

    def _found(self, m: dict) -> dict[str, str]:
        late, found = m["samples"] > LATE * self._samples, {}
        self._waits.append(m["data_wait"])
        if len(self._waits) == WAITS and (waits := statistics.fmean(self._waits)) > 0.2:
            found["data"] = (f"waits for data {waits:.0%} of the time: see `uniclip-data bench`, raise data.threads, "
                             "or keep the shards on a faster disk")
        if late and m["loss"] > m["floor_loss"] + 0.95 * (m["chance_loss"] - m["floor_loss"]):
            found["chance"] = (f"loss {m['loss']:.3f} is what random embeddings get ({m['chance_loss']:.3f}): nothing is "
                               "learnt; try a lower optim.lr, a longer warm-up, and `uniclip-train check`")
        for name in ("image", "text"):
            if late and m.get(f"effective_rank_{name}", 9.0) < 2:
                found[f"collapse {name}"] = (f"{name} embeddings have collapsed to one direction (effective rank "
                                             f"{m[f'effective_rank_{name}']:.1f}): lower optim.lr")
        if min(m["temperature"]) <= TEMPERATURE_FLOOR * 1.001:
            found["temperature"] = f"a temperature is at its floor of {TEMPERATURE_FLOOR}: logits no longer sharpen"
        if m["duplicates"] > 0.05:
            found["duplicates"] = (f"{m['duplicates']:.0%} of the batch has a twin in it: run `uniclip-data duplicates` and "
                                   "filter, or lower optim.batch_size")
        if spike := self._spike(m["loss"]):
            found["spike"] = spike
        return found

    def _spike(self, loss: float) -> str:
        history = list(self._losses)
        self._losses.append(loss)
        if len(history) < HISTORY // 2:
            return ""
        middle = statistics.median(history)
        spread = statistics.fmean(abs(x - middle) for x in history)
        return (f"loss {loss:.3f} is a spike: {middle:.3f} ± {spread:.3f} before" if loss > middle + FAR * spread else "")
