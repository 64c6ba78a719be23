"""The TrOCR demo's data and training, on a CPU with the fonts that matplotlib ships."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrOCRProcessor, VisionEncoderDecoderModel

from models.spec import Unusable
from models.trocr import SPEC, network
from models.trocr.demo import evaluate, lines, train
from models.trocr.demo.degrade import photograph


@pytest.fixture(autouse=True)
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans that need no scikit-learn: a stroke at the digit's place."""

    def scanned(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(10)
        scans = np.zeros((10, 8, 8), np.uint8)
        scans[labels, :, labels % 8] = 255
        return scans, labels

    monkeypatch.setattr(lines, "scanned_digits", scanned)


@pytest.fixture(scope="session")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as demo.fonts leaves it, of Latin fonts only."""
    folder = tmp_path_factory.mktemp("fonts")
    shipped = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for part, names in (("train", ("DejaVuSans", "STIXGeneral")), ("held_out", ("DejaVuSerif",))):
        (folder / part / "latin").mkdir(parents=True)
        for name in names:
            shutil.copy(shipped / f"{name}.ttf", folder / part / "latin")
    return folder


@pytest.fixture
def source(fonts: Path) -> lines.Sources:
    return lines.sources(fonts, held_out=False)


def trained(source: lines.Sources, steps: int, checkpoint: Path | None = None) -> tuple[train.Training, list[float]]:
    """A training of `steps` in all that continues from the checkpoint, and the losses of its steps."""
    training = train.Training(train.SMOKE, source, "cpu", seed=3, workers=0, checkpoint=checkpoint)
    losses = []
    while training.step < steps:
        losses.append(training.advance(progress=training.step / 20)[0].item())
    return training, losses


# ---------------------------------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------------------------------


def test_characters_are_distinct_and_known() -> None:
    assert len(set(lines.CHARACTERS)) == len(lines.CHARACTERS)
    assert 300 <= len(lines.CHINESE) <= 400
    assert len(train.VOCABULARY) == len(lines.CHARACTERS) + 5
    for text in (*evaluate.PAGE, *evaluate.SAMPLES):
        assert set(text) <= set(lines.CHARACTERS) and len(text) <= lines.LONGEST


def test_texts_fit_the_vocabulary() -> None:
    random = np.random.default_rng(1)
    texts, chinese = zip(*(lines.random_text(random, with_chinese=True) for _ in range(400)))
    for text in texts:
        assert 0 < len(text) <= lines.LONGEST and text == text.strip()
    assert set("".join(texts)) <= set(lines.CHARACTERS)
    assert 0.1 < np.mean(chinese) < 0.5
    tokens = train.tokens_of(texts)
    assert tokens.shape == (400, lines.LONGEST + 2)
    assert (tokens == train.END).sum() == 400 and (tokens[:, 0] == train.START).all()


def test_lines_follow_from_their_seed(source: lines.Sources) -> None:
    (ink, texts), (again, same), (other, others) = (lines.chunk(source, (7, n), 12, 0.3) for n in (1, 1, 2))
    assert texts == same and np.array_equal(ink, again)
    assert texts != others and not np.array_equal(ink, other)
    assert ink.shape == (12, lines.HEIGHT, lines.WIDTH) and ink.dtype == np.uint8
    assert (ink.max(axis=(1, 2)) > 100).all() and (ink.mean(axis=(1, 2)) < 128).all()


def test_digit_lines_hold_nothing_but_digits(source: lines.Sources) -> None:
    ink, text = lines.digit_line(np.random.default_rng(2), source)
    assert set(text) <= set("0123456789 ") and len(text) <= lines.LONGEST
    assert np.asarray(ink).max() == 255


def test_photographs_follow_from_their_generator(source: lines.Sources) -> None:
    ink = torch.from_numpy(lines.chunk(source, (7, 3), 4)[0].copy())
    first, again, other = (photograph(ink, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (4, 3, lines.HEIGHT, lines.WIDTH) and first.min() >= 0 and first.max() <= 1


def test_fonts_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="models.trocr.demo.fonts"):
        lines.sources(tmp_path, held_out=False)


def test_page_is_cut_into_its_lines() -> None:
    page = evaluate.page_lines()
    assert page.pictures.shape == (len(page.texts), 3, lines.HEIGHT, lines.WIDTH)


def test_written_samples_are_read_as_labels(source: lines.Sources, tmp_path: Path) -> None:
    evaluate.write_samples(dataclasses.replace(source, chinese=source.latin), tmp_path)
    found = SPEC.labelled({}, tmp_path, tmp_path / "labels.tsv")
    assert [sample.truth for sample in found][: len(evaluate.SAMPLES)] == list(evaluate.SAMPLES)
    assert len(found) == len(evaluate.SAMPLES) + evaluate.DIGIT_SAMPLES
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 250_000


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def test_training_continues_where_it_stopped(source: lines.Sources, tmp_path: Path) -> None:
    through, losses = trained(source, 8)
    assert losses[-1] < losses[0]
    half, first = trained(source, 5)
    half.save(tmp_path / "checkpoint.pt")
    resumed, second = trained(source, 8, tmp_path / "checkpoint.pt")
    assert resumed.step == 8 and resumed.printers.number == through.printers.number
    assert first + second == pytest.approx(losses, rel=1e-5)


def test_workers_print_the_same_lines(source: lines.Sources) -> None:
    alone, helped = (train.Printers(source, train.SMOKE, 5, workers, 4) for workers in (0, 1))
    printed = [list(printers.printed(6, at_least=6)) for printers in (alone, helped)]
    helped.close()
    for (number, ink, texts), (other, other_ink, other_texts) in zip(*printed, strict=True):
        assert number == other and texts == other_texts and np.array_equal(ink, other_ink)


def test_published_size_takes_stretched_lines() -> None:
    learner = train.Learner(train.SMALL)
    pictures = evaluate.fitted(torch.rand(1, 3, lines.HEIGHT, lines.WIDTH), train.SMALL.image)
    tokens = train.tokens_of([lines.CHARACTERS[1 : 1 + lines.LONGEST]])
    losses = learner(pictures, tokens, torch.tensor([lines.LONGEST]), tokens[:, :-1])
    assert all(0 < loss < 100 for loss in losses)  # CTC's is 0 where columns are fewer than characters
    ours, published = learner.model.config, network.configs("small", len(train.VOCABULARY))
    for side, names in {
        "encoder": ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        "decoder": ("d_model", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "activation_function"),
    }.items():
        for name in names:
            assert getattr(getattr(ours, side), name) == getattr(getattr(published, side), name), name


def test_learning_rate_rises_and_falls() -> None:
    setup = train.Setup()
    rates = [train.learning_rate(setup, progress) for progress in np.linspace(0, 1, 101)]
    assert rates[0] < 0.05 * setup.peak and max(rates) > 0.95 * setup.peak and rates[-1] <= 0.011 * setup.peak


def test_stored_folder_is_read_by_the_chain_and_by_transformers(
    fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, checkpoint = tmp_path / "model", tmp_path / "checkpoint.pt"
    command = ["train", "--fonts", str(fonts), "--out", str(out), "--checkpoint", str(checkpoint), "--smoke"]
    for steps in ("3", "5"):
        monkeypatch.setattr("sys.argv", [*command, "--steps", steps])
        assert train.main() == 0
        assert json.loads((out / "figures.json").read_text())["steps"] == int(steps)
    assert "{" not in (out / "README.md").read_text(encoding="utf-8")

    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (40, 300, 3)).astype(np.uint8))
    loaded = network.load(str(out))
    assert loaded.original is not None
    (result,) = loaded.original([picture])

    processor = TrOCRProcessor.from_pretrained(out)
    model = VisionEncoderDecoderModel.from_pretrained(out).float().eval()
    pixel_values = processor(picture, return_tensors="pt").pixel_values
    ids = model.generate(pixel_values)
    assert processor.batch_decode(ids, skip_special_tokens=True) == [result.text]
    assert loaded.settings["generation"]["max_length"] == model.generation_config.max_length
