"""Data sets of one's own: labels files, reading piece by piece, and what the comparison says of single samples."""

from __future__ import annotations

import json
import pickle
import re

import numpy as np
import onnx
import pytest
from PIL import Image

from compare import DONE, Task, results_of, results_path, run_samples, worst_first
from models.restormer import SPEC as RESTORMER
from models.restormer import metric
from models.spec import Sample, Unusable
from models.trocr import SPEC as TROCR
from tests.conftest import run_step

COLOUR = {"in_channels": 3, "dual_pixel": False}


def picture(path, height=24, width=32, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)


def compared(model, folder, *arguments):
    done = run_step("compare.py", model, "--build-dir", folder, *arguments)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout, json.loads((folder / model / "report.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------


def test_json_lines_pair_pictures(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "clean" / "a.png")
    (tmp_path / "labels.jsonl").write_text('{"image": "a.png", "clean": "clean/a.png", "camera": 3}\n\n')
    (sample,) = RESTORMER.labelled(COLOUR, tmp_path, tmp_path / "labels.jsonl")
    assert sample.name == "a.png"
    assert sample.item.pixels.shape == sample.truth.shape == (24, 32, 3)


def test_json_lines_pair_lines_with_texts(tmp_path):
    picture(tmp_path / "a.png")
    entries = [{"image": "a.png", "text": "x\u2028y"}, {"path": "a.png", "text": "z", "ids": [3]}]  # infer_trt.py's
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in entries))
    found = TROCR.labelled({}, tmp_path, tmp_path / "labels.jsonl")
    assert [(sample.name, sample.truth) for sample in found] == [("a.png", "x\u2028y"), ("a.png", "z")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png"}', 'not a JSON object with "image" and "clean"'),
        ('{"image": "a.png", "clean": ', "not a JSON object"),
        ('["a.png", "clean/a.png"]', "no tab"),
        ('{"image": "a.png", "clean": ""}', "empty"),
        ('{"image": "none.png", "clean": "clean/a.png"}', "none.png: no such file"),
        ('{"image": "a.png", "clean": "clean/gray.png"}', "differ in size or number of colours"),
        ('{"image": "a.png", "clean": "clean/small.png"}', "differ in size"),
        ('{"image": "a.png", "clean": "clean/cut.png"}', "cut.png: not an image, or a damaged one"),
    ],
)
def test_file_and_line_that_do_not_fit_are_named(tmp_path, line, message):
    picture(tmp_path / "a.png")
    picture(tmp_path / "clean" / "a.png")
    picture(tmp_path / "clean" / "gray.png", mode="L")
    picture(tmp_path / "clean" / "small.png", height=23)
    whole = (tmp_path / "clean" / "a.png").read_bytes()
    (tmp_path / "clean" / "cut.png").write_bytes(whole[: len(whole) // 2])
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"image": "a.png", "clean": "clean/a.png"}\n' + line + "\n")
    with pytest.raises(Unusable, match=f"{re.escape(str(labels))}, line 2: .*{re.escape(message)}"):
        RESTORMER.labelled(COLOUR, tmp_path, labels)


# ---------------------------------------------------------------------------------------------------------------------
# Piece by piece
# ---------------------------------------------------------------------------------------------------------------------


def test_samples_of_a_data_set_are_read_when_they_are_used(tmp_path):
    for index in range(20):
        picture(tmp_path / f"{index}.png", 40, 50)
    (tmp_path / "labels.tsv").write_text("".join(f"{index}.png\t{index}.png\n" for index in range(20)))
    found = RESTORMER.labelled(COLOUR, tmp_path, tmp_path / "labels.tsv")
    stored = pickle.dumps(found)
    assert len(stored) < 40 * 50 * 3  # less than one picture
    (tmp_path / "7.png").unlink()
    found = pickle.loads(stored)
    assert found[8].item.pixels.shape == (40, 50, 3)
    with pytest.raises(Unusable, match="7.png: no such file"):
        _ = found[7].item


@pytest.mark.parametrize("passes", [1, 3])
def test_results_are_kept_once_and_every_pass_is_timed(tmp_path, capsys, passes):
    samples, calls = [Sample(str(index), index, None) for index in range(7)], []

    def run(items):
        calls.append(items)
        return [10 * item for item in items]

    total_ms = run_samples(run, Task(samples, passes), 3, results_path(tmp_path, "patched fp16"))
    assert calls == [[0, 1, 2], *passes * [[0, 1, 2], [3, 4, 5], [6]]]  # the first one warms up
    assert list(results_of(tmp_path, "patched fp16")) == [0, 10, 20, 30, 40, 50, 60]
    assert len(total_ms) == passes and min(total_ms) > 0
    assert capsys.readouterr().out.splitlines() == passes * [f"{DONE} 3", f"{DONE} 3", f"{DONE} 1"]


def test_worst_first():
    numbers = [{"PSNR dB": value, "SSIM": 1} for value in (30.0, 12.0, float("nan"), 20.0, float("inf"))]
    assert worst_first(RESTORMER, numbers) == [2, 1, 3, 0, 4]
    numbers = [{"edits": 1, "characters": 10, "exact": 0}, {"edits": 1, "characters": 2, "exact": 0}]
    assert worst_first(TROCR, numbers) == [1, 0]


def test_pictures_differ_from_a_step_of_eight_bits_on():
    image = np.full((8, 8, 3), 0.5, np.float32)
    seen, unseen, nan = (
        image + change * (np.arange(192).reshape(8, 8, 3) == 5) for change in (1.1 / 255, 0.9 / 255, np.nan)
    )
    found = metric.difference([image] * 4, [image, seen, unseen, nan])
    assert found["differing outputs"] == 2
    assert np.isnan(found["max abs error of the image"])
    assert metric.difference([image] * 2, [image, unseen])["differing outputs"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------------------


def disturb(path, name, factor):
    """Scales one weight of the graph at `path`."""
    model = onnx.load(path)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(factor), name))
    onnx.save(model, path)


def test_report_on_lines_lists_every_difference(copied, tmp_path):
    samples = copied / "samples" / "trocr"
    pairs = [line.split("\t") for line in (samples / "labels.tsv").read_text().splitlines()]
    labels, count = tmp_path / "labels.jsonl", 3 * len(pairs)
    labels.write_text("".join(json.dumps({"image": name, "text": text}) + "\n" for name, text in 3 * pairs))
    disturb(copied / "trocr" / "encoder.fp32.onnx", "encoder.embeddings.position_embeddings", 1.03)
    done = run_step(
        "compare.py", "trocr", "--executors", "pytorch", "patched", "--precision", "fp32", "--build-dir", copied,
        "--images", samples, "--labels", labels,
    )  # fmt: skip
    assert done.returncode == 1  # outputs differ, in FP32
    report = json.loads((copied / "trocr" / "report.json").read_text())
    row = report["executors"]["patched fp32"]
    assert report["samples"] == count
    assert 0 < len(row["differences"]) == row["difference"]["differing outputs"] <= count
    for one in row["differences"]:
        assert one["reference"] != one["result"]
        assert one["CER % against reference"] > 0
    listed = {one["sample"] for one in row["differences"]}
    assert listed <= {name for name, _ in pairs}

    shown = report["side_by_side"]
    assert len(shown) == 10
    rates = [sample["score"]["CER %"] for sample in shown]
    assert rates == sorted(rates, reverse=True)
    truths = {name: text for name, text in pairs}
    for sample in shown:
        assert list(sample["cells"]) == ["truth", "pytorch", "patched fp32"]
        assert sample["cells"]["truth"] == truths[sample["name"]]
        assert (sample["cells"]["pytorch"] != sample["cells"]["patched fp32"]) == (sample["name"] in listed)
    text = (copied / "trocr" / "report.md").read_text()
    assert "## Worst samples" in text
    assert f"{len(row['differences'])} of {count}; report.json lists all" in text
    assert f"{len(row['differences'])} of {count}" in done.stdout
    assert (
        len({line.count(" | ") for line in text.splitlines() if line.startswith("| <code>")}) == 2
    )  # no text splits cells
    assert not list((copied / "trocr").glob("tmp*"))


def test_report_on_pictures_shows_the_gain(copied):
    samples = copied / "samples" / "restormer"
    _, report = compared(
        "restormer", copied, "--executors", "pytorch", "--images", samples, "--labels", samples / "labels.tsv"
    )
    pairs = [
        [np.asarray(Image.open(samples / name)).astype(np.float32) / 255 for name in line.split("\t")]
        for line in (samples / "labels.tsv").read_text().splitlines()
    ]
    degraded, clean = zip(*pairs)
    assert report["input"] == pytest.approx(metric.score(degraded, clean))
    assert report["executors"]["pytorch"]["score"]["PSNR dB"] != report["input"]["PSNR dB"]
    text = (copied / "restormer" / "report.md").read_text()
    for sample in report["side_by_side"]:
        assert list(sample["cells"]) == ["input", "truth", "pytorch"]
        for one in sample["cells"].values():
            assert f"![]({one['picture']})" in text
            with Image.open(copied / "restormer" / one["picture"]) as image:
                image.load()


def test_one_image_without_labels(copied):
    line = copied / "samples" / "trocr" / "page-1.png"
    output, report = compared("trocr", copied, "--executors", "pytorch", "--images", line)
    row = report["executors"]["pytorch"]
    assert row["score"] == report["input"] == {}
    assert row["ms_per_item"]["median"] > 0
    ((name, label, text),) = (row.split("\t") for row in output.splitlines() if "\t" in row)
    assert (name, label) == ("page-1.png", "pytorch")
    assert text == report["side_by_side"][0]["cells"]["pytorch"]

    photo = copied / "samples" / "restormer" / "coffee.png"
    output, report = compared("restormer", copied, "--precision", "fp16", "--executors", "patched", "--images", photo)
    assert report["executors"]["patched fp16"]["difference"]["differing outputs"] == 0
    paths = [row.split("\t")[2] for row in output.splitlines() if "\t" in row]
    assert len(paths) == 3  # input, PyTorch, FP16
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (229, 187)


def test_images_and_labels_that_do_not_go_together(refused, built, tmp_path):
    samples = built / "samples" / "trocr"
    for arguments in (
        ["--labels", samples / "labels.tsv"],
        ["--images", samples],
        ["--images", samples / "page-1.png", "--labels", samples / "labels.tsv"],
    ):
        assert "--labels" in refused("compare.py", "trocr", *arguments, "--build-dir", built)
    assert "labels.tsv" in refused("compare.py", "trocr", "--images", samples / "labels.tsv", "--build-dir", built)
    missing = tmp_path / "none.png"
    assert str(missing) in refused("compare.py", "trocr", "--images", missing, "--build-dir", built)
