"""Collects the fonts that the demo's lines are printed in: freely licensed ones, out of Debian's packages.

Usage: python -m models.trocr.demo.fonts FOLDER

downloads the packages with apt-get (some 340 MB, on Debian 12, as any user; nothing is installed), cuts the fonts down
to the demo's characters and leaves in FOLDER, a few MB:

    {train,held_out}/{latin,chinese}/*.ttf, *.otf    the cut fonts
    licences/PACKAGE.txt                             each package's copyright file
    packages.json                                    {part of the data: {package: "version, licence"}}

The held-out fonts are of other families than those for training, and derived from none of these.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont
from tqdm import tqdm

from models.chain import run_script
from models.spec import Unusable
from models.trocr.demo.lines import CHARACTERS

# part of the data → package → patterns of font files in it; `file:n` is the n-th font of a collection, here the one
# with the shapes of mainland China
FONTS = {
    "train/latin": {
        "fonts-agave": "agave-r-*",
        "fonts-anonymous-pro": "Anonymous?Pro.ttf Anonymous?Pro?B.ttf",
        "fonts-arapey": "Arapey-Regular.otf",
        "fonts-averia-sans-gwf": "AveriaSansGWF-Regular.ttf",
        "fonts-averia-serif-gwf": "AveriaSerifGWF-Regular.ttf AveriaSerifGWF-Italic.ttf",
        "fonts-b612": "B612-*.otf",
        "fonts-breip": "Breip.ttf",
        "fonts-cabin": "Cabin-Regular.otf Cabin-Bold.otf Cabin-Italic.otf",
        "fonts-cantarell": "Cantarell-Regular.otf Cantarell-Bold.otf Cantarell-Light.otf",
        "fonts-cardo": "Cardo104s.ttf Cardoi99.ttf",
        "fonts-century-catalogue": "Century-Catalogue.ttf",
        "fonts-comfortaa": "Comfortaa-Regular.ttf",
        "fonts-crosextra-caladea": "Caladea-*.ttf",
        "fonts-crosextra-carlito": "Carlito-*.ttf",
        "fonts-dejavu-core": "DejaVuS*.ttf",
        "fonts-dejavu-extra": "DejaVuSans-Oblique.ttf DejaVuSansCondensed.ttf DejaVuSerif-Italic.ttf",
        "fonts-dkg-handwriting": "dkg.ttf",
        "fonts-dosis": "Dosis-Book.otf Dosis-Bold.otf",
        "fonts-fantasque-sans": "Normal/OTF/FantasqueSansMono-Regular.otf",
        "fonts-firacode": "FiraCode-Regular.ttf FiraCode-Bold.ttf",
        "fonts-go": "Go-Regular.ttf Go-Bold.ttf Go-Italic.ttf Go-Mono.ttf",
        "fonts-hack": "Hack-Regular.ttf Hack-Italic.ttf",
        "fonts-inconsolata": "Inconsolata.otf",
        "fonts-inter": "Inter-Regular.otf Inter-Bold.otf Inter-Italic.otf Inter-Light.otf",
        "fonts-jetbrains-mono": "JetBrainsMono-Regular.ttf JetBrainsMono-Bold.ttf",
        "fonts-jura": "Jura-Regular.otf",
        "fonts-karla": "Karla-Regular.otf Karla-Bold.otf Karla-Italic.otf",
        "fonts-lato": "Lato-Regular.ttf Lato-Bold.ttf Lato-Italic.ttf Lato-Light.ttf Lato-Black.ttf",
        "fonts-league-mono": "LeagueMono-Regular.otf LeagueMono-CondensedBold.otf",
        "fonts-liberation2": "Liberation*.ttf",
        "fonts-linuxlibertine": "LinLibertine_R.otf LinLibertine_RB.otf LinLibertine_RI.otf LinBiolinum_R.otf",
        "fonts-lmodern": "lmroman10-regular.otf lmroman10-*ic.otf lmsans10-regular.otf lmmono10-regular.otf",
        "fonts-manrope": "Manrope-Regular.ttf Manrope-Bold.ttf",
        "fonts-noto-mono": "NotoSansMono-*.ttf",
        "fonts-ocr-b": "OCRB.otf",
        "fonts-oldstandard": "OldStandard-*.ttf",
        "fonts-open-sans": "OpenSans-Regular.ttf OpenSans-*old.ttf OpenSans-*talic.ttf OpenSans-Light.ttf",
        "fonts-oxygen": "Oxygen-Sans.ttf OxygenMono-Regular.ttf",
        "fonts-play": "truetype/play/Play-Regular.ttf",
        "fonts-quattrocento": "Quattrocento-Regular.otf",
        "fonts-quicksand": "Quicksand-Regular.ttf Quicksand-Bold.ttf",
        "fonts-roboto-slab": "RobotoSlab-Regular.otf RobotoSlab-Bold.otf RobotoSlab-Light.otf",
        "fonts-roboto-unhinted": "Roboto-Regular.ttf Roboto-Bold.ttf Roboto-*Italic.ttf RobotoCondensed-Regular.ttf",
        "fonts-rufscript": "Rufscript010.ttf",
        "fonts-sil-andika": "Andika-*.ttf",
        "fonts-sil-charis": "CharisSIL-*.ttf",
        "fonts-sjfonts": "SteveHand.ttf",
        "fonts-stix": "STIX-*.otf",
        "fonts-tiresias": "tiresias_infofont.ttf tiresias_pcfont.ttf",
        "fonts-tuffy": "tuffy_regular.ttf tuffy_bold.ttf",
        "fonts-urw-base35": "C059-*.otf NimbusMono*.otf NimbusRoman-*.otf NimbusSans*.otf P052-*.otf URWBookman-*.otf",
        "fonts-yanone-kaffeesatz": "YanoneKaffeesatz-Regular.otf YanoneKaffeesatz-Bold.otf",
    },
    "train/chinese": {
        "fonts-arphic-ukai": "ukai.ttc:0",
        "fonts-arphic-uming": "uming.ttc:0",
        "fonts-lxgw-wenkai": "LXGWWenKai-*.ttf",
        "fonts-noto-cjk": "NotoS*CJK-*.ttc:2",
        "fonts-noto-cjk-extra": "NotoS*CJK-Light.ttc:2 NotoS*CJK-Black.ttc:2",
        "fonts-smiley-sans": "SmileySans-Oblique.ttf",
        "fonts-wqy-microhei": "wqy-microhei.ttc:0",  # drawn independently of Zen Hei
    },
    "held_out/latin": {
        "fonts-clear-sans": "ClearSans-Regular.ttf ClearSans-Bold.ttf ClearSans-Italic.ttf",
        "fonts-comic-neue": "ComicNeue-Regular.otf ComicNeue-Bold.otf",
        "fonts-courier-prime": "Courier?Prime.otf Courier?Prime?Bold.otf Courier?Prime?Italic.otf",
        "fonts-paratype": "PTS[57]*.ttf PTF[57]*.ttf",  # PT Sans and PT Serif
        "fonts-sil-gentium-basic": "GenBas*.ttf",
    },
    "held_out/chinese": {"fonts-wqy-zenhei": "wqy-zenhei.ttc:0"},
}

# Licences that the package's copyright file does not name in a field of its own.
LICENCES = {
    "fonts-arphic-ukai": "Arphic Public License",
    "fonts-arphic-uming": "Arphic Public License",
    "fonts-century-catalogue": "OFL-1.0",
    "fonts-jura": "GPL-3+ or OFL-1.1",
    "fonts-lmodern": "GUST Font License",
    "fonts-oldstandard": "OFL-1.0",
    "fonts-sjfonts": "GPL-2+ with font exception",
}


def unpacked(package: str, folder: Path) -> str:
    """Downloads a package, unpacks it into `folder` and returns its version."""
    with tempfile.TemporaryDirectory() as download:
        subprocess.run(["apt-get", "-qq", "download", package], cwd=download, check=True, stderr=subprocess.DEVNULL)
        (archive,) = Path(download).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        shown = subprocess.run(["dpkg-deb", "-f", archive, "Version"], check=True, capture_output=True, text=True)
    return shown.stdout.strip()


def cut(file: Path, number: int, characters: str, folder: Path) -> None:
    """Stores a font in `folder` with no more than `characters`; one that lacks any of them is refused."""
    options = subset.Options(layout_features=[], legacy_kern=True, hinting=False, notdef_outline=True)
    options.drop_tables += ["MATH", "FFTM", "meta", "Silf", "Glat", "Gloc", "Sill", "Feat"]
    with TTFont(file, fontNumber=number) as font:
        lacking = [character for character in characters if ord(character) not in font.getBestCmap()]
        if lacking:
            raise Unusable(f"{file.name} lacks {''.join(lacking)}")
        subsetter = subset.Subsetter(options)
        subsetter.populate(text=characters)
        subsetter.subset(font)
        suffix = ".otf" if font.sfntVersion == "OTTO" else ".ttf"
        font.save(folder / f"{file.stem.replace(' ', '')}{suffix}")


def collect(part: str, package: str, patterns: str, folder: Path) -> str:
    """Puts the fonts of one package into its part of `folder` and returns the package's version and licence."""
    target = folder / part
    target.mkdir(parents=True, exist_ok=True)
    characters = CHARACTERS if part.endswith("chinese") else CHARACTERS[: CHARACTERS.index("~") + 1]
    with tempfile.TemporaryDirectory() as temporary:
        version = unpacked(package, Path(temporary))
        for pattern in patterns.split():
            pattern, _, number = pattern.partition(":")
            files = sorted(file for file in Path(temporary).rglob(pattern) if file.is_file())
            if not files:
                raise Unusable(f"{package} {version} holds no {pattern}")
            for file in files:
                cut(file, int(number or -1), characters, target)
        copyright_file = folder / "licences" / f"{package}.txt"
        copyright_file.parent.mkdir(exist_ok=True)
        shutil.copy(Path(temporary, "usr/share/doc", package, "copyright"), copyright_file)
    named = re.search(r"^License: *(\S.*?) *$", copyright_file.read_text(encoding="utf-8"), re.MULTILINE)
    return f"{version}, {LICENCES.get(package) or (named[1] if named else 'see its copyright file')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it reports each table that it drops
    versions: dict[str, dict[str, str]] = {part: {} for part in FONTS}
    jobs = [(part, package, patterns) for part, packages in FONTS.items() for package, patterns in packages.items()]
    for part, package, patterns in tqdm(jobs, unit="package"):
        versions[part][package] = collect(part, package, patterns, folder)
    (folder / "packages.json").write_text(json.dumps(versions, indent=1))
    return 0


if __name__ == "__main__":
    run_script(main)
