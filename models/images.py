"""Opening image files, in several threads at once."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

from PIL import Image

FILTERS = threading.Lock()  # of warnings: they are not a thread's own


def opened(path: Path) -> Image.Image:
    """The image in a file, whose pixels have not been read yet; raises what Pillow only warns of, that it has more than
    a picture can have."""
    with FILTERS, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path)
