"""`uniclip-data`: parse, call one function, print. Heavy imports live inside the commands."""

from pipeline.console import app as make_app
from pipeline.console import run

app = make_app("URL list → WebDataset shards → index, and what can be seen of them.")


def main() -> None:
    """Entry point of `uniclip-data`."""
    run(app)
