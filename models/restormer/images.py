"""Reading and writing pictures: 8 and 16 bit, gray or colour, with or without alpha, and dual-pixel pairs.

Pillow decodes; OpenCV reads and writes 16-bit colour, which Pillow cannot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image, ImageOps

from models.chain import replacing
from models.images import opened
from models.spec import ResultWriter, Unusable

DEFAULT_OUT = Path("build/restormer/restored")
WRITERS = 4  # threads, and pictures that wait for them


@dataclass(frozen=True)
class Picture:
    """Pixels (H, W, C) as float32 in 0…1, C = 1, 3 or, for a dual-pixel pair, 6; and what the file is to keep.

    `alpha` is (H, W, 1) in the file's own integer type, or None.
    """

    pixels: np.ndarray
    depth: int = 8
    alpha: Optional[np.ndarray] = None
    icc_profile: Optional[bytes] = None


def read(path: Path, settings: Mapping[str, Any]) -> Picture:
    """Reads a picture; for a dual-pixel network, `<stem>_l` together with its companion `<stem>_r`."""
    picture = read_file(path)
    if not settings["dual_pixel"]:
        return picture
    companion = dual_pixel_companion(path)
    if companion is None:
        raise Unusable(f"{path}: a dual-pixel network needs pairs of files named <stem>_l and <stem>_r")
    right = read_file(companion)
    if picture.pixels.shape != right.pixels.shape or picture.pixels.shape[2] != 3:
        raise Unusable(f"{path} and {companion} are not two colour pictures of one size")
    return replace(picture, pixels=np.concatenate([picture.pixels, right.pixels], axis=2))


def dual_pixel_companion(path: Path) -> Optional[Path]:
    """The right picture that belongs to a left one, if it is there."""
    companion = path.with_name(f"{path.stem[:-1]}r{path.suffix}")
    return companion if path.stem.endswith("_l") and companion.is_file() else None


def is_input(path: Path, settings: Mapping[str, Any]) -> bool:
    """In a folder for a dual-pixel network, only the left pictures are inputs."""
    return not settings["dual_pixel"] or path.stem.endswith("_l")


def read_file(path: Path) -> Picture:
    """Decodes one file; raises Unusable when it is unreadable, truncated or too large to be a picture."""
    try:
        with opened(path) as stored:
            stored.load()
            image = ImageOps.exif_transpose(stored)
            sixteen_bit = is_sixteen_bit(stored, path)
            icc_profile = stored.info.get("icc_profile")
    except Exception as problem:  # Pillow's decoders raise whatever they stumble over
        reason = "no such file" if not path.exists() else "not an image, or a damaged one"
        raise Unusable(f"{path}: {reason}") from problem
    values = read_sixteen_bit(path) if sixteen_bit else np.asarray(eight_bit(image))
    values = values.reshape(*values.shape[:2], -1)
    alpha = None
    if values.shape[2] in (2, 4):
        values, alpha = values[:, :, :-1], values[:, :, -1:]
    pixels = values.astype(np.float32) / np.iinfo(values.dtype).max
    return Picture(pixels, 16 if sixteen_bit else 8, alpha, icc_profile)


def eight_bit(image: Image.Image) -> Image.Image:
    """One of the modes L, LA, RGB and RGBA, whichever holds the image without loss."""
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if image.mode == "1":
        return image.convert("L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def is_sixteen_bit(image: Image.Image, path: Path) -> bool:
    """Pillow's mode tells this for gray files only: for colour, PNG's header and TIFF's BitsPerSample do."""
    if image.mode.startswith("I"):
        return True
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24] == 16
    if image.format == "TIFF":
        bits_per_sample = 258
        return 16 in image.tag_v2.get(bits_per_sample, ())  # type: ignore[attr-defined]
    return False


def opencv() -> Any:
    try:
        import cv2
    except ImportError as problem:
        raise Unusable("16-bit pictures need OpenCV: pip install opencv-python-headless") from problem
    return cv2


def read_sixteen_bit(path: Path) -> np.ndarray:
    """(H, W) or (H, W, C) as uint16, colour order RGB(A)."""
    cv2 = opencv()
    values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        raise Unusable(f"{path}: this 16-bit format is not supported")
    return in_opencv_order(values) if values.ndim == 3 else values


def in_opencv_order(values: np.ndarray) -> np.ndarray:
    """RGB(A) ↔ BGR(A)."""
    return values[:, :, [2, 1, 0, 3][: values.shape[2]]]


def encode(picture: Picture, restored: np.ndarray, path: Path) -> None:
    """Writes a restored image (H, W, C) as PNG with the depth, alpha and profile of the picture it came from."""
    dtype = np.uint16 if picture.depth == 16 else np.uint8
    values = np.rint(restored.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)
    if picture.alpha is not None:
        values = np.concatenate([values, picture.alpha], axis=2)
    if picture.depth == 16:
        cv2 = opencv()
        if values.shape[2] == 2:  # no gray with alpha in OpenCV
            values = values[:, :, [0, 0, 0, 1]]
        cv2.imencode(".png", in_opencv_order(values) if values.shape[2] > 1 else values)[1].tofile(path)
    else:
        image = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)
        image.save(path, format="PNG", icc_profile=picture.icc_profile)


class PictureWriter:
    """Writes `<out>/<stem>.png`, in threads: compressing a picture can take longer than restoring it.  Says so in the
    order of the inputs, and refuses to let two of them write the same file."""

    def __init__(self, out: Path, pool: ThreadPoolExecutor) -> None:
        self.out, self.pool = out, pool
        self.written: dict[Path, Path] = {}
        self.begun: deque[tuple[str, Future[None]]] = deque()

    def write(self, path: Path, item: Picture, result: np.ndarray) -> None:
        target = self.out / f"{path.stem}.png"
        if target in self.written:
            raise Unusable(f"{path} and {self.written[target]} would both become {target}: restore them separately")
        self.written[target] = path
        self.begun.append((f"{path} → {target}", self.pool.submit(store, item, result, target)))
        self.finish(WRITERS)

    def finish(self, but: int = 0) -> None:
        """Waits until no more than so many pictures are being written; raises why one could not be."""
        while len(self.begun) > but or (self.begun and self.begun[0][1].done()):
            line, stored = self.begun.popleft()
            stored.result()
            print(line)


def store(picture: Picture, restored: np.ndarray, target: Path) -> None:
    with replacing(target) as temporary:
        encode(picture, restored, temporary)


@contextmanager
def writer(out: Optional[Path]) -> Iterator[ResultWriter]:
    """Pictures are written to the folder `out`, or to DEFAULT_OUT."""
    folder = out or DEFAULT_OUT
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(WRITERS) as pool:
        made = PictureWriter(folder, pool)
        try:
            yield made
        finally:
            made.finish()
