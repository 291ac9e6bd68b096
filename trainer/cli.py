"""`uniclip-train`: parse, call one function, print. Heavy imports live inside the commands."""

from pipeline.console import app as make_app
from pipeline.console import run

app = make_app("Train UniCLIP and the systems it is compared with.")


def main() -> None:
    """Entry point of `uniclip-train`."""
    run(app)
