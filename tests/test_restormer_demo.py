"""The demo Restormer's data, training and model card, on a CPU and in small."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.restormer import samples
from models.restormer.checkpoint import read_checkpoint
from models.restormer.demo import evaluate, photographs, train
from models.restormer.demo.batches import KERNEL, MARGIN, Pictures, blur, degrade, motion_kernels, random_kernels
from models.restormer.network import Architecture
from models.spec import Unusable

CPU = torch.device("cpu")
PLAN = train.Plan("tiny", 1.0, 6, 2, 16, 1e-3, 0, False, False)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    architecture = Architecture(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, ffn_expansion=2.5)
    monkeypatch.setitem(train.ARCHITECTURES, "tiny", architecture)


@pytest.fixture
def pictures():
    random = np.random.default_rng(0)
    sizes = [(40, 50), (33, 70)]
    return Pictures([random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes], [1.0, 2.0], CPU)


def as_batch(images):
    """(H, W, 3) arrays of one size → (B, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("angle", [0, 30, 75, 120])
def test_kernels_are_those_of_the_samples(angle):
    straight = motion_kernels(torch.tensor([KERNEL]), torch.tensor([angle]), torch.zeros(1))
    np.testing.assert_allclose(straight[0], samples.motion_kernel(KERNEL, angle), atol=1.5 / (8 * KERNEL))


def test_random_kernels_move_nothing_on_average():
    kernels = random_kernels(200, torch.Generator().manual_seed(0))
    offsets = torch.arange(KERNEL) - MARGIN
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(200))
    assert (kernels.sum(1) @ offsets.float()).abs().max() < 0.5
    assert (kernels.sum(2) @ offsets.float()).abs().max() < 0.5
    touched = (kernels > 0).sum((1, 2))
    assert touched.min() >= 3
    assert touched.max() >= KERNEL


def test_degradation_is_that_of_the_samples(monkeypatch):
    monkeypatch.setattr(samples, "NOISE", 0)
    random = np.random.default_rng(0)
    images = random.random((2, 30, 41, 3))
    kernels = np.zeros((2, KERNEL, KERNEL))
    kernels[0, 4:13, 4:13] = samples.motion_kernel(9, 30)
    kernels[1] = random.dirichlet(np.ones(KERNEL**2)).reshape(KERNEL, KERNEL)  # no symmetry hides a mistake
    expected = [samples.degrade(image, kernel, random) for image, kernel in zip(images, kernels)]
    degraded = degrade(as_batch(images), torch.from_numpy(kernels).float(), torch.zeros(2, 1, 1, 1), torch.Generator())
    steps = (degraded - as_batch(expected)).abs() * 255
    assert steps.max() <= 1 + 1e-3  # a value between two steps may be rounded to either
    assert (steps > 0.5).float().mean() < 1e-3


def test_noise_has_the_deviation_asked_for():
    kernels = motion_kernels(torch.tensor([1.0]), torch.zeros(1), torch.zeros(1))
    gray = torch.full((1, 3, 100, 100), 0.5)
    noise = degrade(gray, kernels, torch.full((1, 1, 1, 1), 8 / 255), torch.Generator().manual_seed(0)) - gray
    assert noise.std() * 255 == pytest.approx(8, rel=0.05)
    torch.testing.assert_close(blur(gray, kernels), gray)


def test_crops_are_parts_of_the_pictures():
    """Each pixel says where it is from: neighbours in a crop are neighbours in one picture, in any of eight ways."""
    marked = []
    for number, (height, width) in enumerate([(12, 20), (30, 11)]):
        rows, columns = np.indices((height, width))
        marked.append(np.stack([rows, columns, np.full_like(rows, number)], axis=2).astype(np.uint8))
    crops = (Pictures(marked, [1, 1], CPU).crops(64, 10, torch.Generator().manual_seed(0)) * 255).round()
    assert set(crops[:, 2].unique().tolist()) == {0, 1}
    assert (crops[:, 2].amax((1, 2)) == crops[:, 2].amin((1, 2))).all()
    down, right = crops.diff(dim=2)[:, :2, 0, 0], crops.diff(dim=3)[:, :2, 0, 0]
    assert (crops.diff(dim=2)[:, :2] == down[:, :, None, None]).all()
    assert (crops.diff(dim=3)[:, :2] == right[:, :, None, None]).all()
    assert {tuple(way) for way in torch.cat([down, right], dim=1).int().tolist()} == {
        way for sign in (1, -1) for other in (1, -1) for way in ((sign, 0, 0, other), (0, sign, other, 0))
    }


def test_training_learns_one_batch(pictures, monkeypatch):
    training = train.Training(replace(PLAN, learning_rate=4e-3), pictures)
    pair = train.training_pair(pictures, 2, 16, training.random)
    monkeypatch.setattr(train, "training_pair", lambda *arguments: pair)
    monkeypatch.setattr(train, "WARM_UP_STEPS", 1)
    training.plan = replace(training.plan, steps=150)
    losses = [training.train_step().item() for _ in range(150)]
    assert losses[-1] < 0.8 * train.charbonnier(*pair).item() < losses[0]


def test_continued_training_is_uninterrupted_training(pictures, tmp_path):
    straight = train.Training(PLAN, pictures)
    straight.run(float("inf"))
    first = train.Training(PLAN, pictures)
    for _ in range(3):
        first.train_step()
    first.save(tmp_path / "state.pt")
    second = train.Training(PLAN, pictures)
    second.load(tmp_path / "state.pt")
    second.run(float("inf"))
    assert straight.step == second.step == 6
    assert [run["steps"] for run in second.runs] == [3]
    for mine, theirs in ((straight.network, second.network), (straight.average, second.average)):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    other = train.Training(replace(PLAN, seed=1), pictures)
    with pytest.raises(Unusable, match="seed 0"):
        other.load(tmp_path / "state.pt")


def test_training_begins_with_exported_weights(pictures, tmp_path):
    first = train.Training(PLAN, pictures)
    first.run(float("inf"))
    first.export(tmp_path / "first.safetensors", {}, 0)
    second = train.Training(replace(PLAN, seed=1), pictures)
    second.begin_with(tmp_path / "first.safetensors")
    for mine, theirs in ((second.network, first.average), (second.average, first.average)):
        torch.testing.assert_close(mine.state_dict(), theirs.half().float().state_dict(), rtol=0, atol=0)
    second.run(float("inf"))
    second.export(tmp_path / "second.safetensors", {}, 0)
    notes = evaluate.read_notes(tmp_path / "second.safetensors")
    assert [run["seed"] for run in notes["runs"]] == [0, 1]
    assert notes["step"] == 12
    with pytest.raises(Unusable, match="no weights of demo"):
        train.Training(replace(PLAN, architecture="demo"), pictures).begin_with(tmp_path / "first.safetensors")


def test_smoke_run_leaves_weights_and_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--smoke", "--out", str(tmp_path)])
    assert train.main() == 0
    weights = tmp_path / "restormer.safetensors"
    assert weights.stat().st_size < 4e6
    network = read_checkpoint(weights)
    assert replace(network.architecture, ffn_expansion=2.5) == train.ARCHITECTURES["demo"]
    assert sum(parameter.numel() for parameter in network.parameters()) < 1.5e6
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(name in card for name, *_ in samples.CROPS)
    assert "In all 3 steps of AdamW" in card
    assert max(map(len, card.splitlines())) <= 120
    assert train.main() == 0
    assert "continuing at step 3, 100.0%" in capsys.readouterr().out


def test_evaluation_and_training_share_no_picture(tmp_path):
    crops = {name for name, *_ in samples.CROPS}
    for source in photographs.SOURCES:
        if not source.held_out:
            assert not any(name in pattern for name in crops for pattern in source.pictures)
    packages = [source.package for source in photographs.SOURCES]
    assert len(set(packages)) == len(packages)

    trained, held_out = Path("a/scikit-image-skimage-data-camera.jpg"), Path("b/scikit-learn-images-china.jpg")
    train.refuse_held_out([trained], [held_out])
    for photos in ([trained, Path("a") / held_out.name], [trained, Path("a/scikit-image-skimage-data-coffee.jpg")]):
        with pytest.raises(Unusable, match="for the evaluation"):
            train.refuse_held_out(photos, [held_out])
    with pytest.raises(Unusable, match="no photographs"):
        evaluate.picture_files(tmp_path)


def test_pictures_in_qt_bundles():
    """A bundle with one folder, `a`, that holds `b.webp` and the compressed `c.txt`."""

    def numbers(*sizes_and_values):
        return b"".join(value.to_bytes(size, "big") for size, value in sizes_and_values)

    names = b"".join(numbers((2, len(name)), (4, 0)) + name.encode("utf-16-be") for name in ("a", "b.webp", "c.txt"))
    at = {"a": 0, "b.webp": 8, "c.txt": 26}
    contents = numbers((4, 7)) + b"picture" + numbers((4, 2)) + b"xx"
    tree = numbers((4, 0), (2, 2), (4, 1), (4, 1), (8, 0))
    tree += numbers((4, at["a"]), (2, 2), (4, 2), (4, 2), (8, 0))
    tree += numbers((4, at["b.webp"]), (2, 0), (2, 0), (2, 0), (4, 0), (8, 0))
    tree += numbers((4, at["c.txt"]), (2, 1), (2, 0), (2, 0), (4, 11), (8, 0))
    offsets = [24, 24 + len(tree), 24 + len(tree) + len(contents)]
    bundle = b"qres" + numbers((4, 3), *((4, offset) for offset in offsets), (4, 0)) + tree + contents + names
    assert list(photographs.bundled_files(bundle)) == [("a/b.webp", b"picture")]
