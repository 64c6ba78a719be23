"""TrOCR's parts, decoding and loading, against transformers on tiny random models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub import constants as hub
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    DeiTConfig,
    GenerationConfig,
    RobertaTokenizerFast,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

from build_engine import gpu_name
from models.spec import ExportablePart, Unusable, loop_of_runs
from models.trocr import SPEC, network, tokenizer
from models.trocr.decoding import Generation, decode, restrict, tables
from tests.conftest import run_step
from tests.test_engines import run_with_tensorrt

GPU = [pytest.mark.gpu, pytest.mark.skipif(gpu_name() is None, reason="no GPU")]
VOCABULARY = 40
HEIGHT, WIDTH = 32, 48

# What tells the tiny models apart: everything a TrOCR's configuration may vary.
VARIANTS: dict[str, dict[str, Any]] = {
    "vit": dict(cross_attention_hidden_size=32),
    "vit, tied": dict(tie_word_embeddings=True),
    "deit, relu, scaled": dict(deit=True, activation_function="relu", scale_embedding=True),
    "projected": dict(encoder_width=24),
    "sinusoidal": dict(
        use_learned_position_embeddings=False, layernorm_embedding=False, cross_attention_hidden_size=32
    ),
    "sinusoidal, normalised": dict(use_learned_position_embeddings=False, scale_embedding=True),
}

# Generation settings on top of start 2, end 2, padding 1.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "long": dict(max_length=40),
    "max_new_tokens": dict(max_new_tokens=9, min_new_tokens=4),
    **{f"min_length {length}": dict(max_length=24, min_length=length) for length in (4, 6, 9)},
    "no end": dict(eos_token_id=None, max_length=12),
    "four ends": dict(eos_token_id=[2, 9, 17, 29], max_length=24),
    "three grams": dict(no_repeat_ngram_size=3, max_length=30),
    "one gram": dict(no_repeat_ngram_size=1, max_length=20),
    "forced": dict(forced_bos_token_id=11, forced_eos_token_id=2, max_length=16),
    "forced, suppressed": dict(forced_bos_token_id=11, begin_suppress_tokens=[5, 6, 9, 12, 30], max_length=16),
    "suppressed": dict(suppress_tokens=[3, 8, 13, 21], begin_suppress_tokens=[5, 6, 9, 12, 30], max_length=16),
    "padding token 0": dict(pad_token_id=0, max_length=16),
}
BEAM_SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{beams} beams": dict(num_beams=beams, max_length=24) for beams in (2, 3, 4, 7)},
    "32 beams": dict(num_beams=32, max_length=8),
    **{
        f"stopping {stopping}, penalty {penalty}": dict(
            num_beams=4, max_length=40, early_stopping=stopping, length_penalty=penalty
        )
        for stopping in (True, False, "never")
        for penalty in (0.0, 1.0, 2.0, -1.0)
    },
    "crowded": dict(
        num_beams=2, max_length=40, eos_token_id=[2, 9, 17, 29], length_penalty=3.0, early_stopping="never"
    ),
    **{f"beams, {name}": dict(settings, num_beams=3) for name, settings in SETTINGS.items()},
}

GREEDY = Generation(start=2, eos=(2,), pad=1, max_length=24)
BEAMS = replace(GREEDY, num_beams=3)


class TorchExecutor:
    """Runs the PyTorch modules of the parts, and insists that inputs are as the parts declare them."""

    def __init__(self, parts: list[ExportablePart]) -> None:
        self.parts = {exportable.part.name: exportable for exportable in parts}

    def run(self, part: str, inputs: dict[str, Any]) -> dict[str, Any]:
        exportable = self.parts[part]
        specs = exportable.part.inputs
        assert inputs.keys() == {tensor.name for tensor in specs}
        for tensor in specs:
            value = inputs[tensor.name]
            assert isinstance(value, torch.Tensor if tensor.internal else np.ndarray)
            assert str(value.dtype).endswith(tensor.dtype)
        sizes = exportable.part.sizes_of({name: value.shape for name, value in inputs.items()})
        assert all(sizes[dim.name] <= dim.maximum for dim in exportable.part.dims)
        with torch.inference_mode():
            outputs = exportable.module(*(torch.as_tensor(inputs[tensor.name]) for tensor in specs))
        named = zip(exportable.part.outputs, outputs, strict=True)
        return {tensor.name: value if tensor.internal else value.numpy() for tensor, value in named}

    def synchronize(self) -> None:
        pass

    def loop(
        self, part: str, inputs: dict[str, Any], carried: dict[str, str], times: int, until: str | None
    ) -> dict[str, Any]:
        return loop_of_runs(self, part, inputs, carried, times, until)

    def limits(self, part: str) -> dict[str, tuple[int, int]]:
        return self.parts[part].part.limits()

    def zeros(self, part: str, name: str, dims: dict[str, int]) -> torch.Tensor:
        (tensor,) = (tensor for tensor in self.parts[part].part.inputs if tensor.name == name)
        return torch.zeros(tensor.sizes(dims))

    def rows(self, value: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        return value[torch.as_tensor(indices)]


def tiny_model(variant: str, seed: int = 0, positions: int = 48, end: float = 1.6) -> VisionEncoderDecoderModel:
    """Built as transformers builds it, with wide weights so that the tokens vary, and an end that is the more likely,
    the larger `end` is."""
    options = dict(tie_word_embeddings=False, **VARIANTS[variant]) if "tied" not in variant else dict(VARIANTS[variant])
    width = options.pop("encoder_width", 32)
    encoder = (DeiTConfig if options.pop("deit", False) else ViTConfig)(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=[HEIGHT, WIDTH]
    )
    decoder = TrOCRConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=positions,
        **options,
    )
    model = VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig(encoder=encoder.to_dict(), decoder=decoder.to_dict())
    ).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                narrow = 0.5 if "out_proj" in name else 1.5
                parameter.copy_(torch.randn(parameter.shape, generator=random) * narrow / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
        # One direction of the hidden state votes for the end: sequences then end, and at different places.
        # Tokens that are likely together with it make crowded beams where they are ends as well.
        output = model.decoder.output_projection.weight
        output[2] *= end
        for token, share in ((9, 0.97), (17, 0.94), (29, 0.91)):
            output[token] = share * output[2]
    return model


def pixels(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that share tiny tensors mostly wait for each other, for minutes if other programs are busy too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> dict[str, VisionEncoderDecoderModel]:
    return {variant: tiny_model(variant) for variant in VARIANTS}


def generation_config(**settings: Any) -> GenerationConfig:
    return GenerationConfig(**{"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, **settings})


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


def both_ways(
    model: VisionEncoderDecoderModel, settings: dict[str, Any], rows: int, seed: int = 0, spare: int = 0
) -> tuple[list[list[int]], list[list[int]], list[float], list[float | None]]:
    """Ids from `generate` and from ours, with `spare` positions of the cache, and the scores of both."""
    config = generation_config(**settings, return_dict_in_generate=True, output_scores=True)
    model.generation_config = config  # generate fills what is unset from here
    images = pixels(rows, seed)
    with torch.inference_mode():
        output = model.generate(images, generation_config=config)
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    expected = []
    for row in output.sequences[:, 1:].tolist():
        ends = [place for place, token in enumerate(row) if token in eos]
        expected.append(row[: ends[0] + 1] if ends else row)

    generation = network.generation_of(config, model.config, "test")
    executor = TorchExecutor(network.parts_of(model, generation))
    decoded = []
    for some in images.split(executor.limits("step")["batch"][1]):
        hidden = executor.run("encoder", {"pixel_values": some.numpy()})["encoder_hidden"]
        capacity = generation.max_length + spare
        decoded += decode(executor, hidden, len(some), generation, layers=2, capacity=capacity)
    scores = [] if generation.num_beams == 1 else output.sequences_scores.tolist()
    return expected, [one.ids for one in decoded], scores, [one.score for one in decoded]


@pytest.mark.parametrize("settings", [*SETTINGS, *BEAM_SETTINGS])
@pytest.mark.parametrize("variant", ["vit", "sinusoidal, normalised"])
def test_decoding_equals_generate(models: dict, variant: str, settings: str) -> None:
    expected, ours, scores, our_scores = both_ways(models[variant], {**SETTINGS, **BEAM_SETTINGS}[settings], rows=12)
    assert ours == expected
    if scores:
        np.testing.assert_allclose(our_scores, scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spare", [0, 8])
@pytest.mark.parametrize("settings", [dict(), dict(num_beams=2), dict(num_beams=4, early_stopping=True)])
@pytest.mark.parametrize("eos", [None, 2, [2, 9]])
def test_long_decoding_equals_generate(eos: Any, settings: dict[str, Any], spare: int) -> None:
    """Hundreds of tokens, and as many as there are positions."""
    model, length = tiny_model("vit", positions=208), 208 - spare
    how = dict(settings, eos_token_id=eos, max_length=length, min_length=180, length_penalty=2.0)
    expected, ours, scores, our_scores = both_ways(model, how, rows=3, spare=spare)
    assert ours == expected
    assert all(len(row) >= 180 for row in ours)
    if scores:
        np.testing.assert_allclose(our_scores, scores, rtol=1e-5, atol=1e-5)


def test_images_end_by_themselves(models: dict) -> None:
    """What one image's beams do, and how long they take, is nothing to another's."""
    settings = dict(num_beams=3, max_length=40, early_stopping=True)
    together, ours, *_ = both_ways(models["vit"], settings, rows=8)
    assert ours == together
    assert len({len(row) for row in ours}) >= 3


def test_the_step_decodes_beams_unless_it_would_have_to_look_back() -> None:
    assert (GREEDY.step_beams, BEAMS.step_beams) == (1, 3)
    assert replace(BEAMS, no_repeat_ngram_size=2).step_beams == 1
    many = replace(GREEDY, num_beams=32, eos=(2, 3, 4))
    assert (many.candidates, many.step_beams) == (128, 32)
    assert replace(many, eos=(2, 3, 4, 5)).step_beams == 1
    assert (replace(BEAMS, eos=()).candidates, replace(BEAMS, eos=(2, 3)).candidates) == (6, 9)


def test_too_many_ways_to_end_are_looked_at_on_the_host(models: dict) -> None:
    settings = dict(num_beams=20, eos_token_id=[2, 9, 17, 29, 30, 31], max_length=8)
    expected, ours, scores, our_scores = both_ways(models["vit"], settings, rows=2)
    assert ours == expected
    np.testing.assert_allclose(our_scores, scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [name for name, how in SETTINGS.items() if "no_repeat_ngram_size" not in how])
def test_tables_restrict_as_the_search_on_the_host(models: dict, settings: str) -> None:
    generation = network.generation_of(generation_config(**SETTINGS[settings]), models["vit"].config, "test")
    check_tables(generation)


@pytest.mark.parametrize(
    "settings",
    [
        dict(forced_bos=5, suppress=(5,)),
        dict(forced_bos=5, begin_suppress=(5, 6)),
        dict(forced_bos=5, forced_eos=(2,), max_length=2),
        dict(forced_eos=(7, 4, 9), suppress=(4,), begin_suppress=(7,)),
        dict(forced_eos=(7, 4), begin_suppress=(4,), max_length=2),
        dict(forced_eos=(4,), begin_suppress=(4,), max_length=2),
        dict(forced_bos=6, forced_eos=(7, 4), begin_suppress=(4,), max_length=3),
        dict(min_length=20, suppress=(2,), begin_suppress=(2, 3)),
        dict(suppress=tuple(range(VOCABULARY))),
        dict(eos=(), min_length=5),
    ],
)
def test_tables_restrict_where_settings_meet(settings: dict[str, Any]) -> None:
    check_tables(Generation(**{"start": 2, "eos": (2, 9), "pad": 1, "max_length": 12, **settings}))


def check_tables(generation: Generation) -> None:
    random = np.random.default_rng(0)
    allowed_from, forced = tables(generation, VOCABULARY, 48)
    for position in range(generation.max_length - 1):
        logits = random.standard_normal((60, VOCABULARY), np.float32)
        logits[:, [*generation.eos, *generation.suppress, *generation.begin_suppress]] += 2
        expected = restrict(logits, np.zeros((60, position + 1), np.int64), generation).argmax(axis=1)
        chosen = np.where(position < allowed_from, -np.inf, logits).argmax(axis=1)
        if forced[position] >= 0:
            chosen[:] = forced[position]
        np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize("settings", [dict(max_length=24), dict(max_length=24, num_beams=3, no_repeat_ngram_size=2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_decodes_as_generate(models: dict, variant: str, settings: dict[str, Any]) -> None:
    for seed in range(3):
        expected, ours, _, _ = both_ways(models[variant], settings, rows=4, seed=seed)
        assert ours == expected


# The largest that engines are built for.  Settings, images, tokens of the longest row.
LARGE: dict[str, tuple[dict[str, Any], int, int]] = {
    "200 tokens": (dict(max_length=201, eos_token_id=None), 64, 200),
    "ends anywhere within 200 tokens": (dict(max_length=201), 64, 200),
    "a cache of 512 positions": (dict(max_length=512), 8, 511),
    "200 tokens, 4 beams": (dict(max_length=201, num_beams=4, length_penalty=2.0), 16, 200),
}


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("variant", ["vit", "sinusoidal, normalised"])
def test_long_outputs_of_large_batches_equal_generate(variant: str, case: str) -> None:
    settings, images, longest = LARGE[case]
    model = tiny_model(variant, positions=600, end=1.1)
    expected, ours, _, _ = both_ways(model, settings, images)
    assert ours == expected
    lengths = {len(row) for row in expected}
    assert max(lengths) == longest
    assert len(lengths) >= 6 or "anywhere" not in case
    assert len({token for row in expected for token in row[longest - 50 :]}) >= 5  # they do not just repeat one


def test_batches_larger_than_the_parts_take_are_divided(models: dict, tmp_path: Path) -> None:
    model = models["vit"]
    generation = network.generation_of(generation_config(max_length=24, num_beams=3), model.config, "test")
    executor = TorchExecutor(network.parts_of(model, generation))
    assert executor.limits("step")["batch"] == (1, 21)  # of 64 rows
    tokenizer.of_numbers(VOCABULARY).save(str(tmp_path / tokenizer.FILE_NAME))
    settings = {"generation": asdict(generation), "layers": 2, "max_positions": 48, "clean_up": False}
    images = pixels(22).numpy()  # more than 64 rows
    ids = [
        [result.ids for result in SPEC.run(executor, settings, tmp_path, part)] for part in (images, *images[:, None])
    ]
    assert ids[0] == [one for (one,) in ids[1:]]


def test_the_models_exercise_the_search(models: dict) -> None:
    """Guards the tests above: rows end at different places, tokens vary, settings and beams change the outcome."""
    expected, _, _, _ = both_ways(models["vit"], SETTINGS["long"], rows=8)
    assert len({len(row) for row in expected}) >= 3
    assert len({token for row in expected for token in row}) >= 10
    outcomes = [both_ways(models["vit"], settings, 8)[0] for settings in (*SETTINGS.values(), *BEAM_SETTINGS.values())]
    assert len({json.dumps(rows) for rows in outcomes}) >= 18


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_teacher_forcing(models: dict, variant: str) -> None:
    model, rows, length = models[variant], 3, 17
    executor = TorchExecutor(network.parts_of(model, GREEDY))
    images = pixels(rows)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(images, decoder_input_ids=tokens).logits.numpy()
    assert np.abs(logits_of(executor, images, tokens) - expected).max() < 1e-4


def test_a_decoded_padding_token_has_no_sinusoidal_position(models: dict) -> None:
    model = models["sinusoidal"]
    images, tokens = pixels(2), torch.tensor([[2, 9, 1, 14, 1, 5], [2, 1, 1, 8, 6, 1]])
    expected, cache = [], None
    with torch.inference_mode():
        encoded = model.encoder(images)
        for column in tokens.split(1, dim=1):
            output = model(encoder_outputs=encoded, decoder_input_ids=column, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            expected.append(output.logits[:, 0].numpy())
    ours = logits_of(TorchExecutor(network.parts_of(model, GREEDY)), images, tokens)
    assert np.abs(ours - np.stack(expected, axis=1)).max() < 1e-4


def logits_of(executor: TorchExecutor, images: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
    """(rows, length, vocabulary) by steps, with a cache that is longer than the tokens."""
    from models.trocr.decoding import StepLoop

    hidden = executor.run("encoder", {"pixel_values": images.numpy()})["encoder_hidden"]
    cross = executor.run("prefill", {"encoder_hidden": hidden})
    steps = StepLoop(executor, cross, len(tokens), capacity=tokens.shape[1] + 4, layers=2)
    return np.stack([steps.logits(column, place) for place, column in enumerate(tokens.numpy().T)], axis=1)


@pytest.mark.parametrize("generation", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("variant", ["deit, relu, scaled", "projected", "sinusoidal, normalised"])
def test_parts_export_with_dynamic_axes(models: dict, variant: str, generation: Generation, tmp_path: Path) -> None:
    for exportable in network.parts_of(models[variant], generation):
        part = exportable.part
        example = exportable.example(exportable.trace_at, np.random.default_rng(0))
        dims = {dim.name: torch.export.Dim(dim.name) for dim in part.dims}
        shapes = [{i: dims[size] for i, size in enumerate(t.shape) if isinstance(size, str)} for t in part.inputs]
        program = torch.onnx.export(
            Positional(exportable.module),
            tuple(torch.from_numpy(example[tensor.name]) for tensor in part.inputs),
            dynamo=True,
            opset_version=18,
            input_names=[tensor.name for tensor in part.inputs],
            output_names=[tensor.name for tensor in part.outputs],
            dynamic_shapes=(tuple(shapes),),
            verbose=False,
        )
        assert plugins_in(program.model_proto) == Counter(part.plugins)

        program.save(tmp_path / "part.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "part.onnx")
        for sizes in exportable.check_at:
            assert sizes != exportable.trace_at
            inputs = exportable.example(sizes, np.random.default_rng(1))
            with torch.inference_mode():
                expected = exportable.module(*(torch.from_numpy(inputs[tensor.name]) for tensor in part.inputs))
            for tensor, value, reference in zip(part.outputs, session.run(None, inputs), expected, strict=True):
                assert value.shape == tensor.sizes(sizes)
                assert np.abs(value - reference.numpy()).max() < 1e-5 * max(1, reference.abs().max())


class Positional(torch.nn.Module):
    """The exporter wants the dynamic axes in the shape of the signature: one for all parts."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.module(*inputs)


def plugins_in(model: Any) -> Counter:
    """What the graph holds of each plugin's pattern, by its most telling nodes."""
    constant = {tensor.name for tensor in model.graph.initializer}
    producer = {output: node for node in model.graph.node for output in node.output}
    types = [node.op_type for node in model.graph.node]
    outputs = {tensor.name for tensor in model.graph.output}
    found = Counter()
    for node in model.graph.node:
        source = producer.get(node.input[0]) if node.input else None
        if node.op_type == "LayerNormalization" and source is not None and source.op_type == "Add":
            shapes = [shape_of(model, name) for name in source.input]
            residual = not constant & set(source.input) and shapes[0] == shapes[1]
            found["residual_layer_norm"] += residual
            found["linear_residual"] += residual and shapes[0][1] == 1
        if node.op_type == "LayerNormalization" and shape_of(model, node.input[0])[1] == 1:
            readers = [reader for reader in model.graph.node if node.output[0] in reader.input]
            projections = [reader.op_type for reader in readers].count("MatMul")
            found[{1: "layer_norm_linear", 3: "layer_norm_qkv"}[projections]] += 1
        if node.op_type == "MatMul" and len(shape := shape_of(model, node.input[0])) == 3:
            found["linear"] += shape[1] != 1 and node.input[1] in constant
        if node.op_type == "Add" and any(is_row_of_position(producer.get(name)) for name in node.input):
            readers = [reader.op_type for reader in model.graph.node if node.output[0] in reader.input]
            found["token_embedding"] += "Where" not in readers
        found["split_heads"] += node.op_type == "Transpose" and node.output[0] in outputs
        found["greedy_choice"] += node.op_type == "ArgMax"
        found["beam_choice"] += node.op_type == "LogSoftmax"
        if node.op_type == "Softmax":
            own = "beam_self_attention" if "LogSoftmax" in types else "cached_self_attention"
            kind = own if source is not None and source.op_type == "Where" else "cross_attention"
            found[kind if "Range" in types else "encoder_attention"] += 1
    return found


def is_row_of_position(node: Any) -> bool:
    return node is not None and node.op_type == "Gather" and node.input[1] == "position"


def shape_of(model: Any, name: str) -> list[Any]:
    values = (*model.graph.value_info, *model.graph.input)
    (value,) = (value for value in values if value.name == name)
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("generation", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_examples_fit_the_parts(models: dict, variant: str, generation: Generation) -> None:
    for exportable in network.parts_of(models[variant], generation):
        part = exportable.part
        assert not {0, 1} & set(exportable.trace_at.values())
        for sizes in (exportable.trace_at, *exportable.check_at):
            assert all(dim.minimum <= sizes[dim.name] <= dim.maximum for dim in part.dims)
            inputs = exportable.example(sizes, np.random.default_rng(0))
            assert [(name, str(v.dtype), v.shape) for name, v in inputs.items()] == [
                (tensor.name, tensor.dtype, tensor.sizes(sizes)) for tensor in part.inputs
            ]


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> RobertaTokenizerFast:
    folder = tmp_path_factory.mktemp("bpe")
    trained = ByteLevelBPETokenizer()
    lines = ["The quick brown fox, it's said, jumps over the lazy dog .", "Ein Würfel kostet 5 €; drei kosten 12 €!"]
    trained.train_from_iterator(lines, vocab_size=300, special_tokens=list(tokenizer.SPECIAL), show_progress=False)
    trained.save_model(str(folder))
    return RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.fixture
def folder(models: dict, text_tokenizer: RobertaTokenizerFast, tmp_path: Path) -> Path:
    """A sinusoidal model's folder, as a user would save it."""
    return save(models["sinusoidal"], text_tokenizer, tmp_path / "folder")


def save(model: VisionEncoderDecoderModel, text_tokenizer: RobertaTokenizerFast, folder: Path, **settings: Any) -> Path:
    model.generation_config = generation_config(**{"max_length": 24, **settings})
    model.save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    size = {"height": HEIGHT, "width": WIDTH}
    ViTImageProcessorPil(size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.4, 0.5]).save_pretrained(folder)
    return folder


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(3)
    return [Image.fromarray(random.integers(0, 256, (40, 30 + 11 * i, 3), np.uint8)) for i in range(count)]


def run_folder(folder: Path, build: Path) -> tuple[list[Any], list[Any]]:
    """The results of the loaded model's `original` and of `run` on its parts."""
    loaded = network.load(str(folder))
    build.mkdir(exist_ok=True)
    loaded.save_assets(build)
    settings = json.loads(json.dumps(loaded.settings))
    items = pictures(5)
    return loaded.original(items), SPEC.results(TorchExecutor(list(loaded.parts)), settings, build, items)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_folders_load(models: dict, variant: str, text_tokenizer: RobertaTokenizerFast, tmp_path: Path) -> None:
    model = models[variant]
    folder = save(model, text_tokenizer, tmp_path / "folder", num_beams=2)
    original, ours = run_folder(folder, tmp_path / "build")
    processor = ViTImageProcessorPil.from_pretrained(folder)
    with torch.inference_mode():
        ids = model.generate(processor(pictures(5), return_tensors="pt").pixel_values)
    assert [result.ids for result in ours] == [result.ids for result in original]
    assert [result.text for result in ours] == text_tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [result.text for result in original] == [result.text for result in ours]
    np.testing.assert_allclose([r.score for r in ours], [r.score for r in original], atol=1e-4)


def old_name(name: str) -> str:
    """The name that the checkpoints on the hub have for a tensor."""
    if not name.startswith("encoder."):
        return name
    name = name.replace("encoder.layers.", "encoder.encoder.layer.")
    name = re.sub(
        r"\.attention\.([qkv])_proj\.",
        lambda found: f".attention.attention.{dict(q='query', k='key', v='value')[found[1]]}.",
        name,
    )
    name = name.replace(".attention.o_proj.", ".attention.output.dense.")
    return name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")


@pytest.mark.parametrize("variant", ["vit, tied", "deit, relu, scaled", "sinusoidal"])
def test_checkpoints_with_the_old_names_load(
    models: dict, variant: str, text_tokenizer: RobertaTokenizerFast, tmp_path: Path
) -> None:
    model = models[variant]
    folder = save(model, text_tokenizer, tmp_path / "folder")
    before, _ = run_folder(folder, tmp_path / "build")
    (folder / "model.safetensors").unlink()
    state = {old_name(name): tensor for name, tensor in model.state_dict().items()}
    assert "encoder.encoder.layer.1.attention.attention.query.weight" in state
    state["decoder.model.decoder.embed_positions._float_tensor"] = torch.zeros(1)
    torch.save({name: tensor for name, tensor in state.items() if "pooler" not in name}, folder / "pytorch_model.bin")
    after, _ = run_folder(folder, tmp_path / "build")
    assert after == before
    ours = network.filled(network.built(model.config, ""), network.checkpoint(folder, ""), "")
    if "sinusoidal" in variant:  # whose from_pretrained fails in transformers itself
        tables = [network.decoder_of(one).embed_positions.weights for one in (ours, model)]
        assert torch.equal(*tables)
    else:
        theirs = VisionEncoderDecoderModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def test_sharded_double_precision_checkpoints_load(folder: Path, models: dict, tmp_path: Path) -> None:
    before, _ = run_folder(folder, tmp_path / "build")
    (folder / "model.safetensors").unlink()
    names = list(models["sinusoidal"].state_dict())
    shards = {name: f"pytorch_model-{index % 2}.bin" for index, name in enumerate(names)}
    for file in set(shards.values()):
        state = models["sinusoidal"].state_dict()
        torch.save({name: state[name].double() for name in names if shards[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    after, _ = run_folder(folder, tmp_path / "build")
    assert after == before


def test_generation_settings_in_an_old_config_count(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= dict(decoder_start_token_id=0, eos_token_id=2, pad_token_id=1, max_length=33, num_beams=4)
    config |= dict(no_repeat_ngram_size=3, early_stopping=True, length_penalty=2.0)
    (folder / "config.json").write_text(json.dumps(config))
    generation = network.load(str(folder)).settings["generation"]
    assert (generation["start"], generation["max_length"], generation["num_beams"]) == (0, 33, 4)
    assert (generation["no_repeat_ngram_size"], generation["early_stopping"], generation["length_penalty"]) == (
        3,
        True,
        2,
    )


def test_chinese_folder(models: dict, text_tokenizer: RobertaTokenizerFast, tmp_path: Path) -> None:
    folder = save(models["vit"], text_tokenizer, tmp_path / "folder", num_beams=4)
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + VOCABULARY - 5)))
    vocabulary = tokenizer.character_vocabulary(characters)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "preprocessor_config.json").unlink()
    original, ours = run_folder(folder, tmp_path / "build")
    generation = network.load(str(folder)).settings["generation"]
    assert (generation["start"], generation["max_length"], generation["num_beams"]) == (0, 48, 1)
    assert ours == original
    for result in ours:
        assert result.text == "".join(characters[i - 5] for i in result.ids if i >= 5)
    assert any(result.text for result in ours)


@pytest.mark.parametrize("executor", ["onnxruntime", pytest.param("tensorrt", marks=GPU)])
def test_the_chain_reads_long_lines_in_large_batches_as_generate(
    text_tokenizer: RobertaTokenizerFast, tmp_path: Path, executor: str
) -> None:
    """All five steps' files: 200 tokens, ends anywhere before, more images than a batch has."""
    folder = save(tiny_model("vit", positions=600, end=1.1), text_tokenizer, tmp_path / "folder", max_length=201)
    images = pictures(70)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        image.save(tmp_path / "images" / f"{number:02}.png")
    arguments = ("--build-dir", tmp_path)
    steps = [(run_step, "export_onnx.py", "trocr", "--weights", folder), (run_step, "surgeon.py", "trocr")]
    if executor == "tensorrt":
        steps.append((run_with_tensorrt, "build_engine.py", "trocr"))
    out = tmp_path / "lines.jsonl"
    run = run_with_tensorrt if executor == "tensorrt" else run_step
    steps.append((run, "infer_trt.py", "trocr", tmp_path / "images", "-o", out, "--executor", executor))
    for step, *command in steps:
        done = step(*command, *arguments)
        assert done.returncode == 0, done.stderr
    expected = [result.ids for result in network.load(str(folder)).original(images)]
    assert [json.loads(line)["ids"] for line in out.read_text().splitlines()] == expected
    lengths = {len(row) for row in expected}
    assert max(lengths) == 200 and len(lengths) >= 6


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def test_byte_level_texts_equal_transformers(text_tokenizer: RobertaTokenizerFast, tmp_path: Path) -> None:
    text_tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    # As older folders say; transformers ignores it for BPE.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clean_up_tokenization_spaces": True}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.clean_up_tokenization_spaces
    check_texts(tmp_path, theirs, [text_tokenizer("Würfel it's 5 €, dog .").input_ids])


def test_sentencepiece_texts_equal_transformers(tmp_path: Path) -> None:
    import sentencepiece

    lines = tmp_path / "lines.txt"
    lines.write_text("The quick brown fox , it 's said , jumps over the lazy dog .\nWe do n't know !\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(tmp_path / "sentencepiece.bpe"), vocab_size=38, minloglevel=2
    )
    config = {"tokenizer_class": "XLMRobertaTokenizer", "clean_up_tokenization_spaces": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    check_texts(tmp_path, theirs, [theirs("We do n't know , the fox 's dog !").input_ids])


def check_texts(folder: Path, theirs: Any, known: list[list[int]]) -> None:
    made, clean_up = tokenizer.of_folder(folder)
    build = folder / "build"
    build.mkdir()
    made.save(str(build / tokenizer.FILE_NAME))
    reader = tokenizer.saved(build)
    random = np.random.default_rng(0)
    for ids in (*known, *(random.integers(0, len(theirs), 12).tolist() for _ in range(200))):
        assert tokenizer.text_of(reader, ids, clean_up) == theirs.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------------
# Built-in weights
# ---------------------------------------------------------------------------------------------------------------------


def test_demo_reads(tmp_path: Path) -> None:
    loaded = network.load("demo")
    assert "demo weights, trained by this project" in loaded.weights
    loaded.save_assets(tmp_path)
    samples = SPEC.samples(loaded.settings)
    items = [sample.item for sample in samples]
    original = loaded.original(items)
    ours = SPEC.results(TorchExecutor(list(loaded.parts)), loaded.settings, tmp_path, items)
    assert SPEC.difference(original, ours) == {"differing outputs": 0, "CER % against reference": 0.0}
    assert SPEC.score(ours, [sample.truth for sample in samples])["CER %"] < 6


@pytest.mark.parametrize(
    "variant, vocabulary, parameters",
    [
        *(("small", None, 61_448_832), ("base", None, 384_802_560), ("large", None, 608_119_808)),
        ("base", 7545, 297_312_000),  # random:chinese
    ],
)
def test_random_variants_have_the_published_shapes(variant: str, vocabulary: int | None, parameters: int) -> None:
    model = network.built(network.configs(variant, vocabulary), variant)  # on the meta device
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert not hasattr(model, "enc_to_dec_proj")


def test_gb2312_is_a_vocabulary_of_distinct_characters() -> None:
    characters = network.gb2312()
    assert len(set(characters)) == len(characters) == 95 + 7445
    assert len(tokenizer.character_vocabulary(characters)) == 7545


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be used
# ---------------------------------------------------------------------------------------------------------------------


def refused(weights: Any, *words: str) -> None:
    with pytest.raises(Unusable) as caught:
        network.load(str(weights))
    message = " ".join(str(caught.value).split())
    assert len(message) < 400
    for word in words:
        assert word in message


def test_unknown_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    refused("random:huge", "random:huge", "random:small")
    refused("microsoft/trocr-of-nobody", "microsoft/trocr-of-nobody", "cannot be downloaded")
    refused(tmp_path / "absent", "absent does not exist")
    (tmp_path / "weights.pth").touch()
    refused(tmp_path / "weights.pth", "is a file")
    refused(tmp_path, "no config.json")


def encoder_decoder(encoder: str, decoder: str) -> str:
    parts = {"encoder": {"model_type": encoder}, "decoder": {"model_type": decoder}}
    return json.dumps({"model_type": "vision-encoder-decoder", **parts})


@pytest.mark.parametrize(
    "config, words",
    [
        ("{", ["config.json"]),
        ('{"model_type": "bert"}', ["bert", "TrOCR"]),
        (encoder_decoder("vit", "gpt2"), ["gpt2"]),
        (encoder_decoder("swin", "trocr"), ["swin"]),
        ('{"model_type": "no-such-model"}', ["config.json"]),
    ],
)
def test_other_architectures_are_refused(folder: Path, config: str, words: list[str]) -> None:
    (folder / "config.json").write_text(config)
    refused(folder, str(folder), *words)


@pytest.mark.parametrize(
    "settings, word",
    [
        (dict(repetition_penalty=1.2), "repetition_penalty"),
        (dict(do_sample=True), "do_sample"),
        (dict(bad_words_ids=[[3]]), "bad_words_ids"),
        (dict(renormalize_logits=True), "renormalize_logits"),
        (dict(max_length=49), "max_length"),
        (dict(num_beams=65), "num_beams"),
        (dict(suppress_tokens=[VOCABULARY]), f"token {VOCABULARY}"),
        (dict(decoder_start_token_id=None), "decoder_start_token_id"),
    ],
)
def test_generation_settings_that_would_change_results_are_refused(
    models: dict, text_tokenizer: RobertaTokenizerFast, tmp_path: Path, settings: dict[str, Any], word: str
) -> None:
    folder = save(models["vit"], text_tokenizer, tmp_path / "folder")
    stored = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(stored | settings))
    refused(folder, word)


def test_checkpoints_that_do_not_fit_are_refused(folder: Path, models: dict) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no weights")
    file = folder / "pytorch_model.bin"
    file.write_bytes(b"no checkpoint")
    refused(folder, "pytorch_model.bin cannot be loaded")
    state = dict(models["sinusoidal"].state_dict())
    projection = "decoder.model.decoder.layers.0.fc1.weight"
    torch.save({name: tensor for name, tensor in state.items() if name != projection}, file)
    refused(folder, "lacks 1 tensors", projection)
    torch.save({**state, "classifier.weight": torch.zeros(2), "classifier.bias": torch.zeros(2)}, file)
    refused(folder, "left over 2 tensors", "classifier.bias, classifier.weight")
    torch.save({**state, projection: torch.zeros(3, 4)}, file)
    refused(folder, projection, "(3, 4)")
    torch.save({"state_dict": state}, file)
    refused(folder, "cannot be loaded")


def test_other_companions_that_do_not_fit_are_refused(folder: Path) -> None:
    processor = folder / "preprocessor_config.json"
    stored = json.loads(processor.read_text())
    processor.write_text(json.dumps(stored | {"size": {"height": 24, "width": 24}}))
    refused(folder, "pre-processing", "32×48")
    processor.write_text(json.dumps(stored))
    for file in (*folder.glob("*token*"), *folder.glob("vocab*"), *folder.glob("merges*")):
        file.unlink()
    refused(folder, "tokenizer")


def test_a_missing_tokenizer_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="export_onnx.py trocr"):
        tokenizer.saved(tmp_path)
    (tmp_path / tokenizer.FILE_NAME).write_text("{")
    with pytest.raises(Unusable, match="damaged"):
        tokenizer.saved(tmp_path)


def test_the_execution_side_imports_no_pytorch() -> None:
    heavy = {"torch", "transformers", "jiwer", "skimage", "matplotlib"}
    code = f"import sys, models.trocr; print({heavy} & set(sys.modules))"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "set()\n"
