"""Text lines with known texts: rendered ones, lines of a photographed page, the demo's own, and the user's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, List, Mapping

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from models.chain import replacing
from models.labels import naming, read_labels
from models.spec import Sample, StoredSample, Unusable
from models.trocr.images import read

# (font that matplotlib ships, text)
RENDERED = (
    ("DejaVuSans.ttf", "The quick brown fox jumps over the lazy dog."),
    ("DejaVuSerif.ttf", "Invoice No. 2024-0817"),
    ("DejaVuSansMono.ttf", "for (int i = 0; i < n; ++i)"),
    ("DejaVuSans-Oblique.ttf", "Please reply by 14 March."),
    ("DejaVuSerif-Bold.ttf", "CHAPTER TWELVE"),
    ("STIXGeneral.ttf", "It was the best of times, it was the worst of times,"),
    ("STIXGeneralItalic.ttf", "with kind regards, Eleanor"),
    ("DejaVuSansMono-Oblique.ttf", "Total: $1,234.56"),
)
DEMO = Path(__file__).parent / "demo/samples"  # other fonts, Chinese and digits written by hand, photographed
FONT_SIZE = 48  # pixels
MARGIN = 12  # pixels

# Boxes (left, top, right, bottom) of the lines of skimage.data.page(), cut where a row holds least ink: the page is
# curved, so some boxes overlap.  The texts were read off the crops.
PAGE = (
    ((0, 11, 300, 35), "Region-based segmentation"),
    ((0, 47, 384, 66), "Let us first determine markers of the coins and the"),
    ((0, 65, 384, 84), "background. These markers are pixels that we can label"),
    ((0, 83, 384, 104), "unambiguously as either object or background. Here,"),
    ((0, 101, 384, 122), "the markers are found at the two extreme parts of the"),
    ((0, 118, 180, 139), "histogram of grey values:"),
)


def samples(settings: Mapping[str, Any]) -> List[Sample]:
    """All lines, as RGB images with their texts; the demo's own are for the demo, which knows their characters."""
    import skimage.data

    page = Image.fromarray(skimage.data.page()).convert("RGB")
    made = [Sample(f"rendered-{i}", rendered(text, font), text) for i, (font, text) in enumerate(RENDERED, 1)]
    made += [Sample(f"page-{i}", page.crop(box), text) for i, (box, text) in enumerate(PAGE, 1)]
    if settings.get("demo"):
        rows = read_labels(DEMO / "labels.tsv", "text")
        made += [Sample(f"demo-{Path(name).stem}", read(DEMO / name, settings), text) for _, name, text in rows]
    return made


def write_samples(settings: Mapping[str, Any], folder: Path) -> None:
    """Stores the samples as PNG files, with a labels.tsv that `labelled` reads."""
    made = samples(settings)
    for sample in made:
        with replacing(folder / f"{sample.name}.png") as temporary:
            sample.item.save(temporary)
    with replacing(folder / "labels.tsv") as temporary:
        temporary.write_text("".join(f"{s.name}.png\t{s.truth}\n" for s in made), encoding="utf-8")


def rendered(text: str, font_name: str) -> Image.Image:
    """Black text on white."""
    import matplotlib

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", font_name)), FONT_SIZE)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    image = Image.new("RGB", (right - left + 2 * MARGIN, bottom - top + 2 * MARGIN), "white")
    ImageDraw.Draw(image).text((MARGIN - left, MARGIN - top), text, fill="black", font=font)
    return image


def labelled(settings: Mapping[str, Any], folder: Path, labels_file: Path) -> List[StoredSample]:
    """The images in `folder` that the labels file names, with their texts; all have been read once.

    Its lines are `image<TAB>text` or {"image": file, "text": text}; file names are relative to `folder`.  Raises
    Unusable naming the first line that does not fit, or whose image cannot be read.
    """
    found = []
    lines = list(read_labels(labels_file, "text"))
    for where, name, text in tqdm(lines, desc="reading", unit="image", disable=None, leave=False):
        path = folder / name
        if not path.is_file():
            raise Unusable(f"{where}: there is no image {path}")
        with naming(where):
            read(path, settings)
        found.append(StoredSample(name, partial(read, path, settings), partial(str, text)))
    if not found:
        raise Unusable(f"labels file {labels_file} names no image: its lines must be `image<TAB>text` or JSON")
    return found
