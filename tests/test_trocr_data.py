"""TrOCR's images, samples, labels, results and metrics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import DeiTImageProcessorPil, ViTImageProcessorPil

from models.spec import Unusable
from models.trocr import SPEC, metric
from models.trocr.images import preprocess, read
from models.trocr.pipeline import TextResult, cache_capacity
from models.trocr.tokenizer import character_vocabulary, of_characters, of_numbers, text_of

SETTINGS = dict(height=384, width=384, resample=2, scale=1 / 255, mean=[0.5] * 3, std=[0.5] * 3)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    random = np.random.default_rng(height * width)
    return random.integers(0, 256, (height, width, channels)).astype(np.uint8).squeeze()


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor_class", [ViTImageProcessorPil, DeiTImageProcessorPil])
@pytest.mark.parametrize("resample", [0, 2, 3])
@pytest.mark.parametrize("height, width", [(384, 384), (64, 256)])
def test_preprocessing_equals_transformers(processor_class: type, resample: int, height: int, width: int) -> None:
    mean, std = [0.48, 0.45, 0.4], [0.23, 0.22, 0.25]
    processor = processor_class(
        size={"height": height, "width": width},
        resample=resample,
        image_mean=mean,
        image_std=std,
        do_center_crop=False,
    )
    images = [Image.fromarray(noise(*size)) for size in ((31, 207), (400, 390), (5, 4), (384, 384))]
    settings = dict(height=height, width=width, resample=resample, scale=1 / 255, mean=mean, std=std)
    expected = processor(images, return_tensors="np").pixel_values
    ours = preprocess(images, settings)
    assert ours.dtype == np.float32 and ours.shape == (4, 3, height, width)
    assert np.abs(ours - expected).max() <= 1e-6


def test_files_equal_transformers_after_conversion(tmp_path: Path) -> None:
    Image.fromarray(noise(40, 90)).save(tmp_path / "line.jpg")
    processor = ViTImageProcessorPil(size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with Image.open(tmp_path / "line.jpg") as image:
        expected = processor(image.convert("RGB"), return_tensors="np").pixel_values
    assert np.abs(preprocess([read(tmp_path / "line.jpg", {})], SETTINGS) - expected).max() <= 1e-6


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((6, 8, 4), np.uint8)
    pixels[:, 4:, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    pixels[:, :4, 3] = 128
    Image.fromarray(pixels).convert("LA").save(tmp_path / "la.png")
    palette = Image.fromarray(np.zeros((6, 8), np.uint8)).convert("P")
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.unique(np.asarray(read(tmp_path / "rgba.png", {}))[:, :4]).tolist() == [255]
    assert np.unique(np.asarray(read(tmp_path / "rgba.png", {}))[:, 4:]).tolist() == [0]
    assert np.unique(np.asarray(read(tmp_path / "la.png", {}))[:, :4]).tolist() == [127]
    assert np.unique(np.asarray(read(tmp_path / "palette.png", {}))).tolist() == [255]


def test_sixteen_bit_gray_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    for name in ("gray.png", "gray.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.asarray(read(tmp_path / name, {}))[0, :, 1].tolist() == [0, 1, 128, 255]


def test_gray_two_level_and_cmyk_become_rgb(tmp_path: Path) -> None:
    gray = noise(7, 9, 1)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert (np.asarray(read(tmp_path / "gray.png", {})) == gray[:, :, None]).all()
    Image.fromarray(gray > 99).save(tmp_path / "two.png")
    assert (np.asarray(read(tmp_path / "two.png", {})) == 255 * (gray > 99)[:, :, None]).all()
    Image.new("CMYK", (4, 4)).save(tmp_path / "cmyk.jpg")
    assert (np.asarray(read(tmp_path / "cmyk.jpg", {})) == 255).all()


def test_orientation_is_followed(tmp_path: Path) -> None:
    image = Image.fromarray(noise(20, 60))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90°
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read(tmp_path / "turned.png", {})), np.rot90(np.asarray(image), -1))


def test_unreadable_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole.png"
    Image.fromarray(noise(64, 64)).save(whole)
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.jpg")
    for name in ("whole.png", "whole.jpg"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name in ("cut-whole.png", "cut-whole.jpg", "text.png", "empty.png", "absent.png", ""):
        with pytest.raises(Unusable, match=str(tmp_path / name)):
            read(tmp_path / name, {})
    for limit in (3000, 1000):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(Unusable, match="whole.png.*pixels"):
            read(whole, {})


# ---------------------------------------------------------------------------------------------------------------------
# Samples and labels
# ---------------------------------------------------------------------------------------------------------------------


def test_samples_hold_ink_and_texts() -> None:
    samples = SPEC.samples({})
    assert len(samples) == 14 and len({sample.name for sample in samples}) == 14
    for sample in samples:
        assert sample.item.mode == "RGB" and sample.truth.strip() == sample.truth != ""
        pixels = np.asarray(sample.item.convert("L")).astype(int)
        assert pixels.max() - pixels.min() > 80
        if sample.name.startswith("rendered"):
            border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            assert (border == 255).all()  # no letter is cut


def test_written_samples_are_read_as_labels(tmp_path: Path) -> None:
    SPEC.write_samples({}, tmp_path)
    found = SPEC.labelled({}, tmp_path, tmp_path / "labels.tsv")
    for sample, stored in zip(SPEC.samples({}), found, strict=True):
        assert stored.truth == sample.truth
        assert np.array_equal(np.asarray(stored.item), np.asarray(sample.item))


def test_labels_may_be_json_lines(tmp_path: Path) -> None:
    Image.fromarray(noise(9, 30)).save(tmp_path / "a.png")
    lines = [json.dumps({"path": "a.png", "text": "tab\tand 字"}), "", "a.png\t{two}"]
    (tmp_path / "labels.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    found = SPEC.labelled({}, tmp_path, tmp_path / "labels.jsonl")
    assert [(sample.name, sample.truth) for sample in found] == [("a.png", "tab\tand 字"), ("a.png", "{two}")]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.png\tfine\nb.png\tabsent", "line 2: there is no image .*b.png"),
        ("a.png\tfine\na.png no tab", "line 2: no tab"),
        ("\na.png\t  ", "line 2: .*empty"),
        ('{"path": "a.png"}', 'line 1: .*"text"'),
        ('{"path": "a.png", ', "line 1: not a JSON"),
        ('{"path": "a.png", "text": 5}', "line 1: .*no string"),
        ("\n\n", "names no image"),
        ("broken.png\ttext", "broken.png cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    Image.fromarray(noise(9, 30)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").touch()
    labels = tmp_path / "labels.txt"
    if text is not None:
        labels.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Unusable, match=message):
        SPEC.labelled({}, tmp_path, labels)


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def test_writer_prints_and_stores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "lines.jsonl"
    with SPEC.writer(out) as writer:
        writer.write(Path("a.png"), None, TextResult("Würfel", [5, 2]))
        writer.write(Path("b.png"), None, TextResult("", [2], -0.5))
        assert not out.exists()
    assert capsys.readouterr().out == "a.png\tWürfel\nb.png\t\n"
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [
        {"path": "a.png", "text": "Würfel", "ids": [5, 2]},
        {"path": "b.png", "text": "", "ids": [2]},
    ]
    with SPEC.writer(None) as writer:
        writer.write(Path("c.png"), None, TextResult("c", [3]))
    assert capsys.readouterr().out == "c.png\tc\n"


def test_writer_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text("before")
    with pytest.raises(RuntimeError), SPEC.writer(tmp_path / "lines.jsonl") as writer:
        writer.write(Path("a.png"), None, TextResult("a", [3]))
        raise RuntimeError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("lines.jsonl", "before")]
    with pytest.raises(Unusable, match="is a folder"), SPEC.writer(tmp_path):
        pass


def test_metrics() -> None:
    results = [TextResult("hallo", [5]), TextResult("", [2]), TextResult("abc ", [7])]
    scores = SPEC.score(results, ["hello", "ab", "abc"])
    assert scores == pytest.approx({"CER %": 100 * 3 / 10, "exact match %": 100 / 3})
    assert metric.cer_percent(["", "ab"], ["xy", "ab"]) == 100  # an empty truth does not hide what was read into it
    other = [results[0], TextResult("x", [9, 2]), TextResult("abc ", [8])]
    assert SPEC.difference(results, results) == {"differing outputs": 0, "CER % against reference": 0}
    assert SPEC.difference(results, other) == pytest.approx(
        {"differing outputs": 2, "CER % against reference": 100 / 8}
    )


def test_bars_catch_what_they_must() -> None:
    fp32 = {bar.metric: bar for bar in SPEC.bars["fp32"]}
    assert not fp32["differing outputs"].met(1) and not fp32["part max abs"].met(2e-3)


@pytest.mark.parametrize(
    "max_length, max_positions, capacity", [(21, 512, 24), (24, 512, 24), (2, 512, 8), (512, 512, 512), (44, 44, 44)]
)
def test_cache_capacity(max_length: int, max_positions: int, capacity: int) -> None:
    assert cache_capacity(max_length, max_positions) == capacity


def test_built_tokenizers() -> None:
    vocabulary = character_vocabulary("ab 字")
    reader = of_characters(vocabulary)
    ids = reader.encode("a 字b").ids
    assert ids == [vocabulary[character] for character in "a 字b"]
    assert text_of(reader, [0, *ids, 3, 4, 1, 2], clean_up=False) == "a 字b"
    numbers = of_numbers(2000)
    assert text_of(numbers, [0, 5, 1999, 2, 1, 77], clean_up=False) == "5 1999 77"
