"""What 8, 64 or 512 GPUs make of a configuration: batch, step time, days, GPU-hours, and what limits them.

    python -m tools.scale vit-b16 --price 3.5
    python -m tools.scale vit-b32 --gpus 16 --set optim.samples=1_000_000_000 --machine ours.toml --json
    python -m tools.scale --validate

A model, not a measurement: docs/scaling.md has its equations and what it leaves out. Figures that tools.gpu_check measured
take the place of assumed constants; the output says which is which.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from pipeline.console import InputError, WorkFailed, say
from tools.scale_machine import Known, given, measured
from tools.scale_model import Choice, Prediction, Work, choose
from trainer.config import Config
from trainer.config_file import load_config

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of backend)

MEASURED = Path("benchmarks/h200.json")
MAX_BATCH = 32_768  # beyond it learning, not hardware, is what limits


def configuration(source: str, settings: list[str]) -> Config:
    """As the trainer reads it, in bf16: no other precision is modelled."""
    return load_config(source, [*settings, "run.precision=bf16"])


def known_of(config: str, measured_in: Path | None, machine: Path | None) -> Known:
    """Assumed constants, then measured ones, then given ones."""
    known, path = Known(), measured_in or MEASURED
    if measured_in or path.is_file():
        known = known.with_(*measured(path, Path(config).stem))
    return known.with_(*given(machine)) if machine else known


def row(choice: Choice, samples: int, price: float) -> dict[str, Any]:
    """All that is known of one number of GPUs."""
    best = choice.best
    days = samples / best.rate / 86_400
    hours = days * 24 * best.ranks
    return {"gpus": best.ranks, "batch": best.batch, "least_batch": choice.least, "refused_batch": choice.refused,
            "samples_per_second": best.rate, "step_seconds": best.step, "terms": best.terms, "beside": best.beside,
            "mfu": best.mfu, "memory_bytes": best.memory, "days": days, "gpu_hours": hours,
            "cost": hours * price if price else None, "limits": best.limits[:2]} | _data(best)


def _data(best: Prediction) -> dict[str, float]:
    """What the data side must deliver."""
    return {"samples_per_second_and_gpu": best.rate / best.ranks,
            "decoder_load": best.beside["decoding"] / best.step, "storage_load": best.beside["storage"] / best.step}


def table(rows: list[dict[str, Any]]) -> str:
    """A column for each number of GPUs."""
    def line(name: str, cells: list[str]) -> str:
        return f"{name:28}" + "".join(f"{cell:>16}" for cell in cells)

    lines = [line("GPUs", [f"{one['gpus']:,}" for one in rows]),
             line("global batch", [f"{one['batch']:,}" for one in rows]),
             line("  as good from", [f"{one['least_batch']:,}" for one in rows]),
             line("  memory refuses", [f"{one['refused_batch']:,}" if one["refused_batch"] else "–" for one in rows]),
             line("memory of a GPU, GiB", [f"{one['memory_bytes'] / 2**30:,.0f}" for one in rows]),
             line("samples/s", [f"{one['samples_per_second']:,.0f}" for one in rows]),
             line("step, ms", [f"{1e3 * one['step_seconds']:,.1f}" for one in rows])]
    lines += [line(f"  {term}", [f"{1e3 * one['terms'][term]:,.1f}" for one in rows]) for term in rows[0]["terms"]]
    lines += [line("MFU", [f"{one['mfu']:.1%}" for one in rows]),
              line("samples/s of a GPU", [f"{one['samples_per_second_and_gpu']:,.0f}" for one in rows]),
              line("  of the decoder's rate", [f"{one['decoder_load']:.0%}" for one in rows]),
              line("  of the storage's rate", [f"{one['storage_load']:.0%}" for one in rows]),
              line("days", [f"{one['days']:,.1f}" if one["days"] >= 10 else f"{one['days']:.2g}" for one in rows]),
              line("GPU-hours", [f"{one['gpu_hours']:,.0f}" for one in rows])]
    if rows[0]["cost"] is not None:
        lines.append(line("cost", [f"{one['cost']:,.0f}" for one in rows]))
    return "\n".join([*lines, line("first bottleneck", [one["limits"][0] for one in rows]),
                      line("then", [one["limits"][1] for one in rows])])


def constants(known: Known) -> str:
    """A line for each, and what it rests on."""
    return "\n".join(f"{one['constant']:18}{one['value']:>12.4g} {one['unit']:10} {one['is']:9} {one['from']}"
                     for one in known.rows())


def _length(days: float) -> str:
    """For people."""
    minutes = days * 1440
    return f"{days:,.1f} days" if days >= 2 else f"{minutes / 60:.1f} h" if minutes >= 120 else f"{minutes:.0f} min"


def plot(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Shares of a step's terms, and days, over the number of GPUs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    names, below = [f"{one['gpus']:,}" for one in rows], [0.0] * len(rows)
    for term in rows[0]["terms"]:
        heights = [100 * one["terms"][term] / one["step_seconds"] for one in rows]
        if max(heights) >= 0.1:
            left.bar(names, heights, bottom=below, label=term, width=0.6)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    for name, one in zip(names, rows, strict=True):
        left.annotate(f"{1e3 * one['step_seconds']:,.0f} ms for {one['batch']:,}\nMFU {one['mfu']:.0%}", (name, 101),
                      ha="center", va="bottom", fontsize=8)
    left.set(xlabel="GPUs", ylabel="% of a step", title=f"{title}: a step", ylim=(0, 116))
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=len(rows[0]["terms"]))
    counts, days = [one["gpus"] for one in rows], [one["days"] for one in rows]
    right.loglog(counts, [days[0] * counts[0] / count for count in counts], "--", color="gray", label="if nothing were lost")
    right.loglog(counts, days, marker="o", label="modelled")
    for count, one in zip(counts, rows, strict=True):
        right.annotate(f"{_length(one['days'])}\n{one['gpu_hours']:,.0f} GPU-hours", (count, one["days"]), fontsize=8,
                       xytext=(6, 4), textcoords="offset points")
    right.set_xticks(counts, names)
    right.minorticks_off()
    right.margins(x=0.35, y=0.2)
    right.set(xlabel="GPUs", ylabel="days", title="the whole run")
    right.grid(alpha=0.3)
    right.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    config: Annotated[str, typer.Argument(help="A preset's name or a TOML file.")] = "vit-b32",
    gpus: Annotated[list[int], typer.Option(min=1, help="How many; repeatable.")] = [8, 64, 512],  # noqa: B006
    settings: Annotated[list[str], typer.Option("--set", metavar="A.B=VALUE", help="Override one value.")] = [],  # noqa: B006
    samples: Annotated[int, typer.Option(min=0, help="Length of the run; optim.samples unless given.")] = 0,
    price: Annotated[float, typer.Option(min=0, help="Of a GPU-hour.")] = 0.0,
    batch: Annotated[int, typer.Option(min=0, help="Global batch; the best one unless given.")] = 0,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch that is looked at.")] = MAX_BATCH,
    measured_in: Annotated[Path | None, typer.Option("--measured", help=f"Figures of tools.gpu_check; {MEASURED} if there.")]
    = None,
    machine: Annotated[Path | None, typer.Option(help="TOML file of constants that take the place of all others.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", metavar="PATH.png", help="Draw the steps and the days.")] = None,
    validate: Annotated[bool, typer.Option("--validate", help="Predict and measure 1, 2, 4 processes on this CPU.")] = False,
) -> None:
    """Model a run on W GPUs; or hold the model against 1, 2 and 4 processes on this CPU."""
    try:
        if validate:
            from tools.scale_validate import report
            say(report())
            return
        wanted, known = configuration(config, settings), known_of(config, measured_in, machine)
        work, length = Work(wanted), samples or wanted.optim.samples
        rows = [row(choose(work, known.machine, count, max_batch, batch), length, price) for count in sorted(set(gpus))]
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except WorkFailed as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    if picture:
        plot(Path(config).stem, rows, picture)
    if as_json:
        print(json.dumps({"config": config, "samples": length, "gpus": rows, "constants": known.rows()}, indent=1))
        return
    print(f"{config}, {length:,} samples, bf16; modelled, not measured\n\n{table(rows)}\n\n"
          f"{constants(known)}")


if __name__ == "__main__":
    typer.run(main)
