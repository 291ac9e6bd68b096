"""What software made a file or a number."""

import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("uniclip", "torch", "timm", "webdataset", "pillow", "numpy")


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide a number, and the commit when this is a checkout."""
    found = {name: version(name) for name in PACKAGES}
    root = Path(__file__).parent.parent
    if (root / ".git").exists():
        git = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
                             capture_output=True, text=True, check=False)
        found["commit"] = git.stdout.strip() or "unknown"
    return found
