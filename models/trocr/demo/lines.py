"""Text lines with known texts, made from nothing but fonts and scikit-learn's scanned digits.

A line is first *ink*: an image of mode L that holds how much of each pixel is covered, 0…255, in the proportions of its
font.  `squeezed` brings it to the size that the network reads; `degrade.photograph` makes a picture of it.  Everything
follows from a seed.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.spec import Unusable

Item = TypeVar("Item")

HEIGHT, WIDTH = 64, 768  # pixels that the network reads, whatever the proportions of the line
LONGEST = 56  # characters of a line

# The most frequent characters of modern Chinese, most frequent first.
CHINESE = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家"
    "种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十"
    "民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯"
    "月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女"
    "变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基"
    "眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今"
)
CHINESE_PUNCTUATION = "，。、"
CHARACTERS = "".join(map(chr, range(0x20, 0x7F))) + CHINESE_PUNCTUATION + CHINESE

FREQUENT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its "
    "about than into them can only other time new some could these two may first then do any like my now over such "
    "our man me even most made after also did many off before must well back through years much where your way down "
    "should because long each just state those people too how little good world make very year still see own work men "
    "day get here old life both between being under three never know same last another while us might great go come "
    "since against right came take used himself few house use place during high without again home around small "
    "however found part school thought went say general once upon every left war does got united number hand course "
    "water until always away public something fact less put think almost enough far took head yet system better set "
    "told nothing night end why called didn't eyes find going look asked later knew point next program city business "
    "give group toward young let room word side social present several given order national possible rather second "
    "face per among form often important things looked early white large case big need four within felt children "
    "along saw best church least power light thing seemed family interest want members mind area others done turned "
    "although open country service certain kind problem began different door thus help sense means whole matter "
    "letter paper market quick brown fox jumps lazy dog invoice total amount page chapter figure table section street "
    "road north south east west monday tuesday wednesday thursday friday saturday sunday january february march april "
    "june july august september october november december price value image text line model layer network report "
    "result question answer example zero exit box six seven eight nine queue jazz quiz wizard oxygen rhythm journey "
    "equal square puzzle vivid waltz fjord glyph"
)
WORDS = FREQUENT.split()

# δ stands for a digit, Λ for a capital, λ for a small letter, ω for a word; all else is itself.
TEMPLATES = (
    "δδδδ-δδ-δδ", "δδ/δδ/δδδδ", "δδ.δδ.δδδδ", "δδ:δδ", "δδ:δδ:δδ", "$δ,δδδ.δδ", "$δδ.δδ", "δδ.δ%", "δδδ%", "-δ.δδδ",
    "+δδ δδδ δδδδδδδ", "(δδδ) δδδ-δδδδ", "ΛδΛδ-δδΛδ", "ΛΛ-δδδδ", "ΛΛΛ δδδδ", "δδδδδδδδ", "δδδ δδδ δδδ", "#δδδδδ",
    "No. δδδδ/δδ", "ω.ω@ω.com", "https://www.ω.org/ω", "ω_ω(ω, δ)", "ω[δ] = ω * δ;", "{ω: δ, ω: δδ}", "<ω>ω</ω>",
    "~/ω/ω.λλ", "λ^δ + λ^δ = λ^δ", "ω & ω", "δδ kg", "δ.δ mm", "[δδ]", "ω | ω", "`ω`", "\\ω{ω}", ">>> ω = ω.ω(ω)",
    "Λ. Λ. Ω", "ω=\"ω\"", "'ω'", "δ x δ", "ωωδδ", "Vol. δδ, pp. δδδ-δδδ", "ω?ω=δ", "!ω", "ω + ω < δδ", "ω @ $δ.δδ",
)  # fmt: skip

DIGIT_HEIGHT = 48  # pixels of a scanned digit in a line
HELD_OUT_DIGITS = 5  # every fifth scan is held out of training

# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """What lines are made of.

    latin    font files with all of printable ASCII
    chinese  font files with all of CHARACTERS; may be empty
    digits   scanned digits (n, 8, 8) uint8, 0…255 ink, and what they are (n,)
    """

    latin: Sequence[Path]
    chinese: Sequence[Path]
    digits: np.ndarray
    digit_labels: np.ndarray


def sources(fonts: Path, held_out: bool) -> Sources:
    """The sources for training, or those that training never sees, from a folder that `demo.fonts` has collected."""
    part = fonts / ("held_out" if held_out else "train")
    latin, chinese = (sorted((part / script).glob("*.[ot]tf")) for script in ("latin", "chinese"))
    if not latin:
        raise Unusable(f"{part / 'latin'} holds no fonts: run `python -m models.trocr.demo.fonts {fonts}` first")
    digits, labels = scanned_digits(held_out)
    return Sources(latin, chinese, digits, labels)


def scanned_digits(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's scans of handwritten digits (n, 8, 8) uint8, 0…255 ink, and their values (n,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % HELD_OUT_DIGITS == 0) == held_out
    return (data.images[chosen] * (255 / 16)).astype(np.uint8), data.target[chosen]


@lru_cache(maxsize=512)
def font_of(path: Path, size: int) -> ImageFont.FreeTypeFont:
    # Basic layout: the same on every machine, whether or not Pillow finds a shaping library.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


# ---------------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------------


def pick(random: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(random.integers(len(items)))]


def pseudo_word(random: np.random.Generator) -> str:
    """A pronounceable word that is in no dictionary: the network must read letters, not know words."""
    syllables = random.integers(1, 4)
    onsets, nuclei, codas = "bcdfghjklmnpqrstvwxyz", "aeiou", "bdgklmnprstxyz"
    return "".join(
        pick(random, onsets) + pick(random, nuclei) + (pick(random, codas) if random.random() < 0.4 else "")
        for _ in range(syllables)
    )


def word(random: np.random.Generator) -> str:
    return pick(random, WORDS) if random.random() < 0.6 else pseudo_word(random)


def decorated(random: np.random.Generator, text: str) -> str:
    """A word as it may stand in a sentence."""
    kind = random.random()
    if kind < 0.80:
        return text
    if kind < 0.86:
        return text + ","
    if kind < 0.88:
        return pick(random, ("({})", '"{}"', "'{}'", "[{}]", "*{}*", "{}'s")).format(text)
    if kind < 0.92:
        return text + pick(random, ";:!?") if kind < 0.90 else text + pick(random, "-/") + word(random)
    if kind < 0.96:
        return str(random.integers(10 ** random.integers(1, 5)))
    return text + "."


def sentence(random: np.random.Generator) -> str:
    case = random.choice(4, p=(0.55, 0.15, 0.2, 0.1))
    words = [decorated(random, word(random)) for _ in range(12)]
    if case == 0:
        return " ".join(words)
    if case == 1:
        return " ".join(words).upper()
    if case == 2:
        return " ".join(words).capitalize()
    return " ".join(text.capitalize() for text in words)


def templated(random: np.random.Generator) -> str:
    """Dates, amounts, addresses, code."""
    made = {
        "δ": lambda: pick(random, string.digits),
        "Λ": lambda: pick(random, string.ascii_uppercase),
        "λ": lambda: pick(random, string.ascii_lowercase),
        "ω": lambda: word(random),
        "Ω": lambda: word(random).capitalize(),
    }
    chosen = [pick(random, TEMPLATES) for _ in range(6)]
    return " ".join("".join(made[c]() if c in made else c for c in template) for template in chosen)


def random_characters(random: np.random.Generator) -> str:
    """Any printable characters, in groups."""
    printable = string.ascii_letters + string.digits + string.punctuation
    return " ".join("".join(pick(random, printable) for _ in range(random.integers(2, 9))) for _ in range(20))


def chinese(random: np.random.Generator) -> str:
    """Chinese characters, frequent ones more often, with punctuation, sometimes with numbers and Latin words."""
    weights = 1 / (np.arange(len(CHINESE)) + 100)
    drawn = "".join(np.array(list(CHINESE))[random.choice(len(CHINESE), 40, p=weights / weights.sum())])
    foreign = random.random() < 0.3
    text, rest = "", drawn
    while rest:
        count = random.integers(2, 10)
        text += rest[:count] + pick(random, "，，，。、")
        rest = rest[count:]
        if foreign and random.random() < 0.5:
            text = text[:-1] + (str(random.integers(10000)) if random.random() < 0.6 else word(random))
    return text


def random_text(random: np.random.Generator, with_chinese: bool) -> tuple[str, bool]:
    """A text of up to LONGEST characters, and whether it is Chinese."""
    kinds: tuple[Callable[[np.random.Generator], str], ...] = (sentence, templated, random_characters, chinese)
    shares = np.array((0.5, 0.17, 0.05, 0.28 * with_chinese))
    kind = kinds[random.choice(len(kinds), p=shares / shares.sum())]
    is_chinese = kind is chinese
    longest = LONGEST // 2 if is_chinese else LONGEST  # a Chinese character is about twice as wide
    length = int(random.triangular(2, 0.6 * longest, longest + 1))
    text = ""
    while not text:  # the cut may leave nothing but a space
        text = kind(random)[:length].strip()
    return text, is_chinese


# ---------------------------------------------------------------------------------------------------------------------
# Ink
# ---------------------------------------------------------------------------------------------------------------------


def printed_line(random: np.random.Generator, source: Sources) -> tuple[Image.Image, str]:
    """A text in a random font, as ink in its own proportions."""
    text, is_chinese = random_text(random, len(source.chinese) > 0)
    if is_chinese or (source.chinese and random.random() < 0.05):
        path = pick(random, source.chinese)
    else:
        path = pick(random, source.latin)
    size = 2 * round(np.exp(random.uniform(np.log(8), np.log(28))))  # 16…56 pixels; even, for the sake of the cache
    return printed(random, text, font_of(path, size)), text


def printed(random: np.random.Generator, text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """`text` with random spacing, margins, underline and remains of the lines above and below."""
    size = font.size
    tracking = random.uniform(-0.03, 0.25) * size if random.random() < 0.15 else 0.0
    gap = random.uniform(0, 1.2) * size if random.random() < 0.2 else 0.0  # justified text widens the spaces
    stroke = int(size > 30 and random.random() < 0.05)

    # (x, what is drawn there): whole words keep their kerning
    pieces = list(text) if tracking else [piece for part in text.split(" ") for piece in (part, " ")][:-1]
    placed, x = [], 0.0
    for piece in pieces:
        placed.append((x, piece))
        x += font.getlength(piece) + tracking + gap * (piece == " ")

    ascent, descent = font.getmetrics()
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    if random.random() < 0.6:
        top, bottom = min(top, -0.8 * ascent), max(bottom, 0.8 * descent)  # room for all letters, there or not
    above, below, before, after = random.uniform((0.03, 0.03, 0.1, 0.1), (0.35, 0.35, 0.8, 0.8)) * size
    if x < 10 * size and random.random() < 0.25:
        before, after = random.uniform(0, 0.6, 2) * x + before  # a short text in a wide box
    base, start = above - top, before - min(left, 0)
    ink = Image.new("L", (int(start + max(x, right) + after) + 1, int(base + bottom + below) + 1))
    draw = ImageDraw.Draw(ink)

    for offset, piece in placed:
        draw.text((start + offset, base), piece, 255, font, anchor="ls", stroke_width=stroke)
    if random.random() < 0.25:
        pitch = random.uniform(1.05, 1.4) * (ascent + descent)
        neighbour = "".join(random.permutation(list(text)))
        for direction in (-1, 1):
            draw.text((start, base + direction * pitch), neighbour, 255, font, anchor="ls")
    if random.random() < 0.04:
        y = base + random.uniform(0.12, 0.3) * size
        draw.line((start, y, start + x, y), 255, max(1, round(size / 24)))
    return ink


def digit_line(random: np.random.Generator, source: Sources) -> tuple[Image.Image, str]:
    """Scanned handwritten digits in a row, in groups."""
    groups = random.integers(3, 8, random.integers(1, 5))
    slant = random.uniform(-0.15, 0.35)
    gap = random.uniform(-0.05, 0.2) * DIGIT_HEIGHT
    ink = Image.new("L", (DIGIT_HEIGHT * (sum(groups) + len(groups) + 2), 2 * DIGIT_HEIGHT))
    text, x = "", random.uniform(0.2, 0.8) * DIGIT_HEIGHT
    for count in groups:
        for index in random.integers(len(source.digits), size=count):
            digit, width = written(random, source.digits[index], slant)
            middle = x + width / 2, DIGIT_HEIGHT * (1 + random.normal(0, 0.03))
            ink.paste(255, (round(middle[0] - digit.width / 2), round(middle[1] - digit.height / 2)), digit)
            x += width + gap + random.normal(0, 0.02) * DIGIT_HEIGHT
            text += str(source.digit_labels[index])
        x += random.uniform(0.5, 0.9) * DIGIT_HEIGHT
        text += " "
    above, below, after = random.uniform((0.08, 0.08, -0.4), (0.35, 0.35, 0.1)) * DIGIT_HEIGHT
    return ink.crop(
        (0, round(DIGIT_HEIGHT / 2 - above), round(x + after), round(DIGIT_HEIGHT * 1.5 + below))
    ), text.strip()


def written(random: np.random.Generator, scan: np.ndarray, slant: float) -> tuple[Image.Image, float]:
    """One scan (8, 8), enlarged, a little turned, sheared and stretched, and the width of its ink in pixels."""
    columns = np.flatnonzero(scan.max(axis=0) > 40)
    scale_y = DIGIT_HEIGHT * random.uniform(0.85, 1.05) / 8  # pixels for each of the scan's
    scale_x = scale_y * random.uniform(0.8, 1.1)
    shear, turn = slant + random.normal(0, 0.08), random.normal(0, 0.06)
    middle = (columns[0] + columns[-1] + 1) / 2
    width = (columns[-1] + 1 - columns[0]) * scale_x
    size = round(width + (2 + 8 * abs(shear)) * scale_x), round(9 * scale_y)  # room for what is sheared and turned
    # pixels of the result → of the scan: what is in the middle stays there
    matrix = np.array([[1, shear], [turn, 1]]) / (scale_x, scale_y)
    offset = (middle, 4) - matrix @ (size[0] / 2, size[1] / 2)
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    image = Image.fromarray(scan).transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    white, black = random.uniform((20, 120), (70, 220))
    return image.point([int(np.clip((value - white) / (black - white), 0, 1) * 255) for value in range(256)]), width


def squeezed(ink: Image.Image) -> np.ndarray:
    """Ink of any proportions → (HEIGHT, WIDTH) uint8."""
    return np.asarray(ink.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))


def line(random: np.random.Generator, source: Sources, written_share: float = 0.12) -> tuple[Image.Image, str]:
    """A printed line, or with the probability `written_share` one of handwritten digits."""
    return (digit_line if random.random() < written_share else printed_line)(random, source)


def chunk(
    source: Sources, seed: tuple[int, ...], count: int, written_share: float = 0.12
) -> tuple[np.ndarray, list[str]]:
    """`count` squeezed lines (count, HEIGHT, WIDTH) uint8 with their texts: always the same for the same seed."""
    random = np.random.default_rng(seed)
    made = [line(random, source, written_share) for _ in range(count)]
    return np.stack([squeezed(ink) for ink, _ in made]), [text for _, text in made]
