"""Collects freely licensed photographs from packages of Debian 12 and of Python, as JPEG files for train.py.

python -m models.restormer.demo.photographs build/photos build/photos-held-out

`apt-get`, `dpkg-deb` and `pip` fetch the exact packages listed in SOURCES, which is also the table of licences.  Most
pictures are reduced at least by half, which removes what compression, demosaicing and the lens have left: networks
learn sharpness from sharp pictures only.  Files are named after their package and their path in it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from models.chain import run_script
from models.spec import Unusable

LONGEST_SIDE = 1600  # pixels, at most


@dataclass(frozen=True)
class Source:
    """Photographs of one package.

    pictures  glob patterns of their paths in the unpacked package, or in the Qt resource bundles (.rcc) in it
    reduce    the least factor that both sides are divided by; 1 for pictures that are sharp as they are
    held_out  the whole package serves evaluation and never training
    """

    package: str
    version: str
    licence: str
    pictures: tuple[str, ...]
    reduce: int = 2
    python: bool = False
    held_out: bool = False

    def file_name(self, path: Path) -> str:
        """The name under which the picture at `path` in the package is stored: the end of its path, joined by «-»."""
        return "-".join([self.package, *path.with_suffix("").parts[-4:]]) + ".jpg"


SOURCES = (
    Source(
        "gcompris-qt-data",
        "3.1-2",
        "public domain, CC BY, CC BY-SA, GFDL; where no licence is named, the package's GPL-3+",
        (
            "**/erase/resource/*.webp",
            "**/explore_farm_animals/resource/animals/*.webp",
            "**/explore_monuments/resource/*/*.webp",
            "**/explore_world_animals/resource/animals/*.webp",
        ),
    ),
    Source(
        "lomiri-wallpapers-16.04",
        "20.04.0-2",
        "CC BY 4.0, CC BY-SA 4.0, CC0",
        (
            "**/Bridge_by_*.jpg",
            "**/Dragonfly_by_*.jpg",
            "**/Picture_*_by_freespace.jpg",
            "**/Wine_by_*.jpg",
            "**/aitzgorri_by_*.jpg",
            "**/free_by_*.jpg",
            "**/friends_by_*.jpg",
            "**/greentock_by_*.jpg",
            "**/life_by_*.jpg",
            "**/picosdeeuropa_by_*.jpg",
            "**/seeding_by_*.jpg",
            "**/sunset_by_*.jpg",
        ),
    ),
    Source("lomiri-wallpapers-20.04", "20.04.0-2", "CC BY-SA 3.0", ("**/Kleiber_by_*.jpg",)),
    Source(
        "mate-backgrounds",
        "1.26.0-1",
        "GPL-2+",
        (
            "**/abstract/Elephants_3840x2160.jpg",
            "**/nature/Aqua.jpg",
            "**/nature/Blinds.jpg",
            "**/nature/Dune.jpg",
            "**/nature/FreshFlower.jpg",
            "**/nature/G*.jpg",
            "**/nature/LadyBird.jpg",
            "**/nature/RainDrops.jpg",
            "**/nature/TwoWings.jpg",
            "**/nature/Wood.jpg",
            "**/nature/YellowFlower.jpg",
        ),
    ),
    Source(
        "plasma-workspace-wallpapers",
        "4:5.27.5-2",
        "LGPL-3 (each wallpaper's metadata)",
        (
            "**/BytheWater/contents/images/2560x1600.jpg",
            "**/ColdRipple/contents/images/2560x1600.jpg",
            "**/ColorfulCups/contents/images/2560x1600.jpg",
            "**/EveningGlow/contents/images/2560x1600.jpg",
            "**/FallenLeaf/contents/images/2560x1600.jpg",
            "**/Grey/contents/images/2560x1600.jpg",
            "**/Kite/contents/images/2560x1600.jpg",
            "**/OneStandsOut/contents/images/2560x1600.jpg",
            "**/Path/contents/images/2560x1600.jpg",
        ),
    ),
    Source(
        "scikit-image",
        "0.26.0",
        "CC0 and public domain (docstrings of skimage.data)",
        (
            "skimage/data/brick.png",
            "skimage/data/camera.png",
            "skimage/data/coins.png",
            "skimage/data/grass.png",
            "skimage/data/gravel.png",
            "skimage/data/hubble_deep_field.jpg",
            "skimage/data/rocket.jpg",
        ),
        reduce=1,
        python=True,
    ),
    Source(
        "palapeli-data",
        "4:22.12.3-1",
        "public domain, GFDL (each puzzle's .desktop file)",
        ("**/palapeli/collection/*.jpg",),
        held_out=True,
    ),
    Source("puzzle-jigsaw", "1.0.2+git20201007.527c529+dfsg-4+b1", "CC0", ("**/cat-*.jpg",), held_out=True),
    Source(
        "scikit-learn",
        "1.7.2",
        "CC BY 2.0 (sklearn/datasets/images/README.txt)",
        ("sklearn/datasets/images/*.jpg",),
        reduce=1,
        python=True,
        held_out=True,
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder for the photographs to train with")
    parser.add_argument("held_out", type=Path, help="folder for the photographs to evaluate with")
    arguments = parser.parse_args()
    for source in SOURCES:
        folder = arguments.held_out if source.held_out else arguments.photos
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            count = collect(source, Path(temporary), folder)
        print(f"{source.package} {source.version}: {count} photographs → {folder}")
    return 0


def collect(source: Source, temporary: Path, folder: Path) -> int:
    """Stores the photographs of one package in `folder` and returns how many there are."""
    unpacked = temporary / "unpacked"
    fetch(source, temporary, unpacked)
    for bundle in unpacked.glob("**/*.rcc"):
        unpack_bundle(bundle, unpacked)
    count = 0
    for pattern in source.pictures:
        paths = sorted(unpacked.glob(pattern))
        if not paths:
            raise Unusable(f"{source.package} {source.version} has no file {pattern}")
        for path in paths:
            with Image.open(path) as image:
                factor = max(source.reduce, -(-max(image.size) // LONGEST_SIDE))
                reduced = image.convert("RGB").reduce(factor)
            reduced.save(folder / source.file_name(path.relative_to(unpacked)), quality=92, subsampling="4:4:4")
        count += len(paths)
    return count


def fetch(source: Source, temporary: Path, unpacked: Path) -> None:
    """Downloads a package into `temporary` and unpacks it; raises Unusable if the package manager cannot."""
    if source.python:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command = [*pip, f"{source.package}=={source.version}"]
    else:
        command = ["apt-get", "--quiet", "download", f"{source.package}={source.version}"]
    try:
        subprocess.run(command, cwd=temporary, check=True, capture_output=True, text=True)
        (archive,) = temporary.glob("*.whl" if source.python else "*.deb")
        if source.python:
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(unpacked)
        else:
            subprocess.run(["dpkg-deb", "--extract", archive, unpacked], check=True, capture_output=True, text=True)
    except FileNotFoundError as problem:
        raise Unusable(f"{problem.filename} is missing: packages of Debian 12 are fetched with it") from problem
    except subprocess.CalledProcessError as problem:
        raise Unusable(f"`{' '.join(command)}` failed: {problem.stderr}") from problem


def unpack_bundle(bundle: Path, folder: Path) -> None:
    """Writes the pictures of a Qt resource bundle below `folder`."""
    for name, content in bundled_files(bundle.read_bytes()):
        if name.endswith(".webp"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def bundled_files(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files in a Qt resource bundle of format 2 or 3.

    After «qres» and the version come the offsets of three tables, all numbers big-endian: the tree, of entries of 22
    bytes (offset of the name, flags; then of a folder the number of its children and the index of the first, of a file
    the offset of its content); the contents, each after its length; and the names, each after its length and a hash.
    Contents may be compressed, but pictures never are: it would not make them smaller.
    """

    def number(offset: int, size: int = 4) -> int:
        return int.from_bytes(data[offset : offset + size], "big")

    tree, contents, names = number(8), number(12), number(16)
    is_folder, is_compressed = 2, 1 | 4

    def files(index: int, path: str) -> Iterator[tuple[str, bytes]]:
        entry = tree + 22 * index
        flags = number(entry + 4, 2)
        if index > 0:
            name = names + number(entry)
            path += "/" * bool(path) + data[name + 6 : name + 6 + 2 * number(name, 2)].decode("utf-16-be")
        if flags & is_folder:
            first = number(entry + 10)
            for child in range(first, first + number(entry + 6)):
                yield from files(child, path)
        elif not flags & is_compressed:
            content = contents + number(entry + 10)
            yield path, data[content + 4 : content + 4 + number(content)]

    return files(0, "")


if __name__ == "__main__":
    run_script(main)
