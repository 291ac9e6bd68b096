"""`uniclip-data urls …`: tables of URLs and captions → urls.parquet."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import app as make_app
from pipeline.console import err, on_this_machine, say

if TYPE_CHECKING:
    from pipeline.sources import Tally

urls = make_app("Write urls.parquet, the table that `download` reads.",
                "uniclip-data urls table captions.csv urls.parquet --url-column image_url --caption-column text")
Out = Annotated[Path, typer.Argument(metavar="OUT.parquet", callback=on_this_machine, help="The URL table to write.")]
Expect = Annotated[int | None, typer.Option(min=0, help="Rows the list must have; 0: any. [the published number]")]


def _tell(tally: "Tally", out: Path) -> None:
    for line in tally.lines():
        say(line)
    if tally.refused:
        say(f"refused rows are listed in {out.with_suffix('.refused.jsonl')}")


def _published(name: str, file: Path, out: Path, expect: int | None) -> None:
    from pipeline.published import write_published

    _tell(write_published(name, file, out, expect), out)


@urls.command()
def table(
    file: Annotated[Path, typer.Argument(help="Table with a header: .csv, .tsv (no quoting), .jsonl or .parquet.")],
    out: Out,
    url_column: Annotated[str, typer.Option(help="Column with the URL, or with a path for --url-prefix.")] = "url",
    caption_column: Annotated[list[str] | None, typer.Option(help="Repeat to keep several. [caption]")] = None,
    url_prefix: Annotated[str, typer.Option(help="Put before each path, which is percent-quoted.")] = "",
    where: Annotated[list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only these rows.")] = None,
    source: Annotated[str, typer.Option(help="Name of the source. [the file's name]")] = "",
    expect: Annotated[int, typer.Option(min=0, help="Refuse a table with another number of rows. [any]")] = 0,
) -> None:
    """Any table of URLs and captions → urls.parquet; equal URLs become one row with all captions.

    Example: `uniclip-data urls table captions.tsv urls.parquet --url-column image --where split=train
    --url-prefix http://127.0.0.1:8000/`
    """
    from pipeline.choice import Choice, condition
    from pipeline.sources import first_url, write_urls

    conditions = tuple(condition(text) for text in where or ())
    choice = Choice(url_column, tuple(caption_column or ["caption"]), url_prefix, conditions, source,
                    (expect,) if expect else ())
    _tell(write_urls(file, out, choice), out)
    if (url := first_url(out)) and ":" not in url:
        err.print(f"warning: {url} is no URL: is --url-prefix missing?", style="yellow", markup=False)


@urls.command()
def cc3m(
    file: Annotated[Path, typer.Argument(help="Train_GCC-training.tsv or Validation_GCC-1.1.0-Validation.tsv.")],
    out: Out, expect: Expect = None,
) -> None:
    """Conceptual Captions 3M: caption ⇥ URL, no header, no quoting.

    Example: `uniclip-data urls cc3m Train_GCC-training.tsv cc3m.parquet`
    """
    _published("cc3m", file, out, expect)


@urls.command()
def cc12m(
    file: Annotated[Path, typer.Argument(help="cc12m.tsv.")],
    out: Out, expect: Expect = None,
) -> None:
    """Conceptual 12M: URL ⇥ caption, no header, no quoting.

    Example: `uniclip-data urls cc12m cc12m.tsv cc12m.parquet`
    """
    _published("cc12m", file, out, expect)


@urls.command("yfcc15m-v2")
def yfcc15m_v2(
    file: Annotated[Path, typer.Argument(help="yfcc15m_clean_open_data.json.")],
    out: Out, expect: Expect = None,
) -> None:
    """DeCLIP's YFCC15M: JSON lines with caption, filename, url.

    Example: `uniclip-data urls yfcc15m-v2 yfcc15m_clean_open_data.json yfcc15m.parquet`
    """
    _published("yfcc15m-v2", file, out, expect)


@urls.command("yfcc15m-v1")
def yfcc15m_v1(
    file: Annotated[Path, typer.Argument(help="OpenAI's yfcc100m_subset_data.tsv, also as .bz2.")],
    out: Out,
    metadata: Annotated[list[Path], typer.Option(help="yfcc100m_dataset, also as .bz2; repeat for its ten parts.")],
    expect: Expect = None,
) -> None:
    """OpenAI's YFCC15M: its list of photo ids joined with YFCC100M's metadata; titles and descriptions are captions.

    Example: `uniclip-data urls yfcc15m-v1 yfcc100m_subset_data.tsv yfcc15m.parquet --metadata yfcc100m_dataset`
    """
    from pipeline.published import write_yfcc15m_v1

    _tell(write_yfcc15m_v1(file, tuple(metadata), out, expect), out)
