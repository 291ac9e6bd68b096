"""URL list → shards → views with their augmentation vectors."""

from importlib.util import find_spec as _find_spec

if (_found := _find_spec("dataclasses")) and "site-packages" in (_found.origin or ""):  # else a riddle far from its cause
    raise ImportError(f"{_found.origin} hides Python's own dataclasses: unset PYTHONPATH, or pip uninstall dataclasses")
