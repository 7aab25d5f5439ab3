"""Figures of matplotlib as files."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.core.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figure(path: Path, figure: "Figure", **options: Any) -> None:
    """Replace ``path`` by a picture in one step, in the format of its suffix; ``options`` are those of savefig."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix("."), **options)
    write_bytes(path, picture.getbuffer())
