"""Restormer's variants and checkpoints, its tiling, and its pictures."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.restormer import checkpoint, images, samples, tiling
from models.restormer.checkpoint import TASKS, architecture_of, random_network, read_checkpoint
from models.restormer.network import Architecture, Restormer
from models.spec import Unusable

TINY = Architecture(dim=8, num_blocks=(1, 2, 1, 1), num_refinement_blocks=1, heads=(1, 2, 4, 8))
COLOUR = {"in_channels": 3, "out_channels": 3, "dual_pixel": False}
GRAY = {**COLOUR, "in_channels": 1, "out_channels": 1}
DUAL_PIXEL = {**COLOUR, "in_channels": 6, "dual_pixel": True}


def published_names(norm_bias: bool, dual_pixel: bool) -> set[str]:
    """The tensor names of the authors' checkpoints, written down from their structure."""
    block = ["attn.temperature", "attn.qkv.weight", "attn.qkv_dwconv.weight", "attn.project_out.weight"]
    block += ["ffn.project_in.weight", "ffn.dwconv.weight", "ffn.project_out.weight"]
    block += [f"norm{n}.body.{kind}" for n in (1, 2) for kind in (["weight", "bias"] if norm_bias else ["weight"])]
    levels = {"encoder_level1": 4, "encoder_level2": 6, "encoder_level3": 6, "latent": 8, "decoder_level3": 6}
    levels |= {"decoder_level2": 6, "decoder_level1": 4, "refinement": 4}
    names = {f"{level}.{index}.{name}" for level, depth in levels.items() for index in range(depth) for name in block}
    names |= {f"{name}.body.0.weight" for name in ("down1_2", "down2_3", "down3_4", "up4_3", "up3_2", "up2_1")}
    names |= {"patch_embed.proj.weight", "output.weight", "reduce_chan_level3.weight", "reduce_chan_level2.weight"}
    return names | ({"skip_conv.weight"} if dual_pixel else set())


@pytest.mark.parametrize("task", TASKS)
def test_published_names_and_variants(task):
    architecture = TASKS[task]
    with torch.device("meta"):
        tensors = Restormer(architecture).state_dict()
    assert set(tensors) == published_names(architecture.norm_bias, architecture.dual_pixel)
    read = architecture_of(tensors, task)
    assert replace(read, ffn_expansion=2.66) == architecture
    assert [int(width * read.ffn_expansion) for width in (48, 96, 192, 384)] == [127, 255, 510, 1021]


def test_published_size():
    with torch.device("meta"):
        network = Restormer(Architecture())
    assert sum(parameter.numel() for parameter in network.parameters()) == 26_126_644
    assert len(network.state_dict()) == 494
    assert network.architecture.total_blocks == 44


@pytest.mark.parametrize("wrapping", ["params", "params_ema", "state_dict", None])
@pytest.mark.parametrize(
    "variant",
    [{}, {"norm_bias": False}, {"in_channels": 1, "out_channels": 1}, {"in_channels": 6, "dual_pixel": True}],
    ids=["deblurring", "bias-free", "gray", "dual-pixel"],
)
def test_checkpoints_load_as_they_are(tmp_path, variant, wrapping):
    network = random_network(replace(TINY, **variant)).eval()
    tensors = network.state_dict()
    torch.save({wrapping: tensors} if wrapping else tensors, tmp_path / "net.pth")
    loaded = read_checkpoint(tmp_path / "net.pth").eval()
    image = torch.rand(1, network.architecture.in_channels, 16, 24)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), network(image), rtol=0, atol=0)


def test_dual_pixel_output_has_no_residual():
    """As the original: the image itself, which has six channels, is not added."""
    network = random_network(replace(TINY, in_channels=6, dual_pixel=True)).eval()
    with torch.no_grad():
        for parameter in network.output.parameters():
            parameter.zero_()
        assert network(torch.rand(1, 6, 16, 16)).abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("latent.0.attn.qkv.weight"), "1 tensors missing (latent.0.attn.qkv.weight)"),
        (lambda tensors: tensors.update(head=torch.zeros(1)), "1 tensors left over (head)"),
        (lambda tensors: tensors.update({"up2_1.body.0.weight": torch.zeros(1)}), "1 tensors of another shape"),
        (lambda tensors: tensors.pop("patch_embed.proj.weight"), "tensor patch_embed.proj.weight is missing"),
        (lambda tensors: tensors.clear(), "is missing"),
    ],
)
def test_checkpoint_that_does_not_fit(tmp_path, change, message):
    tensors = dict(random_network(TINY).state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "net.pth")
    with pytest.raises(Unusable, match=".*") as problem:
        read_checkpoint(tmp_path / "net.pth")
    assert message in str(problem.value)


def test_checkpoint_of_anything_else(tmp_path):
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"net": [1, 2]}, tmp_path / "list.pth")
    torch.save(random_network(TINY), tmp_path / "module.pth")  # would run code of its own when unpickled
    for name, message in (("text", "cannot be read"), ("list", "holds no state dict"), ("module", "cannot be read")):
        with pytest.raises(Unusable, match=message):
            read_checkpoint(tmp_path / f"{name}.pth")
    with pytest.raises(Unusable, match="no checkpoint"):
        checkpoint.load(str(tmp_path / "nothing.pth"))
    with pytest.raises(Unusable, match="unknown Restormer task"):
        checkpoint.load("random:colorize")


# ---------------------------------------------------------------------------------------------------------------------


class FakeNetwork:
    """An executor that computes `function` and records the shapes it was given."""

    def __init__(self, function, largest=(720, 1280)):
        self.function, self.shapes, self.largest = function, [], largest

    def limits(self, part):
        return dict(zip(("height", "width"), ((64, side) for side in self.largest)))

    def run(self, part, inputs):
        self.shapes.append(inputs["image"].shape)
        return {"restored": self.function(inputs["image"])}


@pytest.mark.parametrize("shape", [(1, 1), (7, 200), (64, 64), (720, 1280), (721, 90), (1500, 2600), (3000, 65)])
def test_every_size_is_restored_in_tiles_that_the_engine_takes(shape):
    network = FakeNetwork(lambda image: image)
    pixels = np.random.default_rng(0).random((*shape, 3), dtype=np.float32)
    restored = tiling.restore(network, COLOUR, pixels)
    np.testing.assert_allclose(restored, pixels, atol=1e-6)
    for batch, channels, height, width in network.shapes:
        assert (batch, channels) == (1, 3)
        assert height % 8 == width % 8 == 0
        assert 64 <= height <= 720
        assert 64 <= width <= 1280


@pytest.mark.parametrize("largest", [(64, 64), (100, 72), (128, 1280)])
def test_small_engines_take_small_tiles(largest):
    network = FakeNetwork(lambda image: image, largest)
    pixels = np.random.default_rng(0).random((200, 310, 3), dtype=np.float32)
    np.testing.assert_allclose(tiling.restore(network, COLOUR, pixels), pixels, atol=1e-6)
    for *_, height, width in network.shapes:
        assert height % 8 == width % 8 == 0
        assert 64 <= height <= largest[0]
        assert 64 <= width <= largest[1]


def test_tiles_blend_without_a_seam():
    """Tiles whose results differ as much as 0 and 1 meet in a ramp, not in a step."""
    calls = iter(range(100))
    restored = tiling.restore(
        FakeNetwork(lambda image: np.full_like(image, next(calls) % 2)), COLOUR, np.zeros((64, 2500, 3), np.float32)
    )
    assert restored.min() == 0
    assert restored.max() == 1
    assert np.abs(np.diff(restored, axis=1)).max() <= 1 / tiling.OVERLAP


def test_gray_and_colour_meet_networks_of_the_other_kind():
    gray, colour = np.random.default_rng(0).random((2, 70, 80, 3), dtype=np.float32)
    network = FakeNetwork(lambda image: image * np.array([0, 1, 2], np.float32).reshape(1, 3, 1, 1))
    np.testing.assert_allclose(tiling.restore(network, COLOUR, gray[:, :, :1]), gray[:, :, :1], atol=1e-6)
    network = FakeNetwork(lambda image: 1 - image)
    np.testing.assert_allclose(tiling.restore(network, GRAY, colour), 1 - colour, atol=1e-6)
    assert {shape[1] for shape in network.shapes} == {1}


# ---------------------------------------------------------------------------------------------------------------------


def restored_file(path, tmp_path):
    """Reads a picture and writes it again unchanged, as the writer does."""
    picture = images.read(path, COLOUR)
    with images.writer(tmp_path / "out") as writer:
        writer.write(path, picture, picture.pixels)
    return tmp_path / "out" / f"{path.stem}.png"


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_8_bit_pictures_keep_their_values(tmp_path, mode):
    values = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    original = Image.fromarray(values, "RGBA")
    original = original.convert("RGB").convert("P") if mode == "P" else original.convert(mode)
    original.save(tmp_path / "picture.png")
    result = Image.open(restored_file(tmp_path / "picture.png", tmp_path))
    same = {"P": "RGB", "1": "L"}.get(mode, mode)
    assert result.mode == same
    np.testing.assert_array_equal(np.asarray(result), np.asarray(original.convert(same)))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_pictures_keep_their_values(tmp_path, channels, suffix):
    cv2 = pytest.importorskip("cv2")
    values = np.random.default_rng(0).integers(0, 65536, (9, 11, channels), dtype=np.uint16)
    path = tmp_path / f"picture.{suffix}"
    cv2.imencode(f".{suffix}", values)[1].tofile(path)
    picture = images.read(path, COLOUR)
    assert picture.depth == 16
    assert (picture.alpha is not None) == (channels == 4)
    result = cv2.imdecode(np.fromfile(restored_file(path, tmp_path), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(result.reshape(values.shape), values)


def test_16_bit_colours_are_not_swapped(tmp_path):
    cv2 = pytest.importorskip("cv2")
    cv2.imencode(".png", np.full((2, 2, 3), (0, 1000, 65535), np.uint16))[1].tofile(tmp_path / "red.png")  # BGR
    pixels = images.read(tmp_path / "red.png", COLOUR).pixels
    np.testing.assert_allclose(pixels[0, 0], [1, 1000 / 65535, 0])


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    Image.new("RGB", (10, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert images.read(tmp_path / "turned.jpg", COLOUR).pixels.shape == (10, 20, 3)


def test_two_inputs_of_one_name_are_refused(tmp_path):
    picture = images.Picture(np.zeros((4, 4, 3), np.float32))
    with images.writer(tmp_path) as writer, pytest.raises(Unusable, match="both become"):
        writer.write(tmp_path / "a" / "photo.jpg", picture, picture.pixels)
        writer.write(tmp_path / "b" / "photo.png", picture, picture.pixels)


def test_damaged_pictures(tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(random).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "c.png").write_bytes(b"")
    for name in ("a.png", "b.jpg", "c.png", "missing.png"):
        with pytest.raises(Unusable, match=name):
            images.read(tmp_path / name, COLOUR)


def test_pictures_are_announced_in_order_once_they_are_written(tmp_path, capsys, monkeypatch):
    """Also those before one that fails, wherever it fails."""
    picture, encode = images.Picture(np.zeros((8, 8, 3), np.float32)), images.encode

    def slow(picture, restored, path):
        time.sleep(0.02 * (restored[0, 0, 0] % 2 == 0))
        if restored[0, 0, 0] == 9:
            raise OSError("the disk is full")
        encode(picture, restored, path)

    monkeypatch.setattr(images, "encode", slow)
    with pytest.raises(OSError, match="the disk is full"), images.writer(tmp_path) as writer:
        for number in range(10):
            writer.write(Path(f"{number}.jpg"), picture, np.full((8, 8, 3), number, np.float32))
    expected = [f"{number}.png" for number in range(9)]
    assert capsys.readouterr().out.splitlines() == [f"{Path(name).stem}.jpg → {tmp_path / name}" for name in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    with pytest.raises(Unusable, match="unreadable"), images.writer(tmp_path) as writer:
        writer.write(Path("last.jpg"), picture, np.zeros((8, 8, 3), np.float32))
        raise Unusable("the next one is unreadable")
    assert capsys.readouterr().out == f"last.jpg → {tmp_path / 'last.png'}\n"


@pytest.mark.parametrize("settings", [COLOUR, GRAY, DUAL_PIXEL], ids=["colour", "gray", "dual-pixel"])
def test_samples_come_back_from_files_as_they_were(tmp_path, settings):
    made = samples.samples(settings)
    samples.write_samples(settings, tmp_path)
    read = samples.labelled(settings, tmp_path, tmp_path / "labels.tsv")
    assert len(read) == len(made) >= 3
    for mine, theirs in zip(made, read):
        assert mine.item.pixels.shape[2] == settings["in_channels"]
        np.testing.assert_allclose(mine.item.pixels, theirs.item.pixels, atol=1e-6)
        np.testing.assert_allclose(mine.truth, theirs.truth, atol=0.5 / 255 + 1e-6)
        assert np.abs(mine.truth - mine.item.pixels[:, :, : mine.truth.shape[2]]).mean() > 0.01  # it is degraded


def test_motion_kernel_moves_nothing_on_average():
    kernel = samples.motion_kernel(9, 30)
    rows, columns = np.indices(kernel.shape)
    assert kernel.sum() == pytest.approx(1)
    assert (kernel * rows).sum() == pytest.approx(4)
    assert (kernel * columns).sum() == pytest.approx(4)
    assert np.count_nonzero(kernel) >= 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no pictures"),
        ("astronaut.png\n", "line 1"),
        ("astronaut.png\tclean/astronaut.png\nmissing.png\tclean/coffee.png\n", "missing.png"),
        ("astronaut.png\tclean/coffee.png\n", "differ in size"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, text, message):
    samples.write_samples(COLOUR, tmp_path)
    (tmp_path / "mine.tsv").write_text(text)
    with pytest.raises(Unusable, match=message):
        samples.labelled(COLOUR, tmp_path, tmp_path / "mine.tsv")
