"""`uniclip-eval`: parse, call one function, print. Heavy imports live inside the commands."""

from pipeline.console import app as make_app
from pipeline.console import run

app = make_app("Zero-shot, retrieval and reports, with intervals and provenance.")


def main() -> None:
    """Entry point of `uniclip-eval`."""
    run(app)
