"""Names for what the sources of the program say, so that a later run can tell whether it is made by the same ones."""

import functools
from pathlib import Path

import rlhf
from rlhf.core.files import digest

PACKAGES = ("rlhf", "reward", "policy", "ds_configs")
"""Those that decide on the results of stages."""
_SOURCES = (".py", ".json", ".jinja")


@functools.cache
def package_digest(package: str) -> str | None:
    """A name for the sources of a package that is installed beside this one; ``None`` if there is no such folder."""
    root = Path(rlhf.__file__).resolve().parents[1].joinpath(*package.split("."))
    if not root.is_dir():
        return None
    files = sorted(path for path in root.rglob("*") if path.suffix in _SOURCES)
    return digest(*(part for file in files for part in (str(file.relative_to(root)), file.read_bytes())))
