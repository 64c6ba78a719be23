import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from export_onnx import export
from plugins import find, kernels
from plugins.greedy_choice.test_greedy_choice import tiny_model
from plugins.testing import assert_close, assert_replaces_in_trocr, grafted, run_function, trocr_part
from plugins.token_embedding.reference import token_embedding

PLUGIN = find("token_embedding")


def random_inputs(shape, vocabulary, places, dim, dtype):
    """Tables and sequences as arrays."""
    random = np.random.default_rng(0)
    tokens, positions = (random.standard_normal((size, dim)).astype(dtype) for size in (vocabulary, places))
    return tokens, positions, random.integers(0, vocabulary, shape, np.int32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("scale", [1.0, 16.0, 22.627417])
@pytest.mark.parametrize(
    ("shape", "position", "dim"), [((1, 8), 0, 64), ((3, 24), 23, 5), ((2, 4, 16), 7, 32), ((1, 1), 0, 1)]
)
def test_function_is_the_reference(shape, position, dim, scale, dtype):
    tokens, positions, sequences = random_inputs(shape, 40, shape[-1], dim, dtype)
    inputs = dict(tokens=tokens, positions=positions, sequences=sequences, position=np.array([position], np.int32))
    (actual,) = run_function(PLUGIN, inputs, scale=scale)
    tensors = map(torch.from_numpy, (tokens, positions, sequences))
    expected = token_embedding(*tensors, position, scale).numpy()
    assert actual.shape == (int(np.prod(shape[:-1])), 1, dim)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_pattern_replaces_that_of_trocr(num_beams):
    (match,) = assert_replaces_in_trocr(PLUGIN, "step", num_beams)
    assert match.attributes == {"scale": 1.0}
    tokens, positions, *variables = match.inputs
    assert [tuple(table.shape) for table in (tokens, positions)] == [(439, 192), (64, 192)]
    assert [tensor.name for tensor in variables] == ["sequences", "position"]


@pytest.mark.parametrize("part", ["encoder", "prefill"])
def test_pattern_finds_nothing_elsewhere(part):
    assert PLUGIN.pattern.matches(gs.import_onnx(trocr_part(part)[1])) == []


@pytest.mark.parametrize(
    ("options", "count", "scale", "num_beams"),
    [
        (dict(scale_embedding=True), 1, 8.0, 1),
        (dict(scale_embedding=True), 1, 8.0, 3),
        (dict(layernorm_embedding=False, tie_word_embeddings=True), 1, 1.0, 1),
        (dict(use_learned_position_embeddings=False), 0, None, 1),
        (dict(use_learned_position_embeddings=False, scale_embedding=True), 0, None, 3),
    ],
    ids=["scaled", "scaled, beams", "tied, no norm", "sinusoidal", "sinusoidal, scaled, beams"],
)
def test_variants_of_trocr(options, count, scale, num_beams):
    from models.trocr.decoding import Generation
    from models.trocr.network import parts_of, random_weights

    config = tiny_model(50)
    for name, value in options.items():
        setattr(config.decoder, name, value)
    generation = Generation(0, (2,), 1, 40, num_beams=num_beams)
    (step,) = (one for one in parts_of(random_weights(config), generation) if one.part.name == "step")
    graph = gs.import_onnx(export(step))
    matches = PLUGIN.pattern.matches(graph)
    assert len(matches) == step.part.plugins["token_embedding"] == count
    if not matches:
        return
    assert matches[0].attributes == {"scale": scale}
    session = grafted(graph, PLUGIN, matches)
    inputs = step.example({"batch": 2, "length": 40}, np.random.default_rng(0))
    for position in (0, 17, 37):
        inputs["position"][:] = position
        with torch.inference_mode():
            expected = step.module(*(torch.from_numpy(values) for values in inputs.values()))
        assert_close(session.run(None, inputs)[0], expected[0])


class Embedding:
    """The nodes of the subgraph in a step's graph, to be changed."""

    def __init__(self, num_beams):
        exportable, model = trocr_part("step", num_beams)
        self.module, self.example = exportable.module, exportable.example
        self.graph = gs.import_onnx(model)
        (match,) = PLUGIN.pattern.matches(self.graph)
        self.tokens, self.positions, self.sequences, self.position = match.inputs
        (self.add,) = match.outputs[0].inputs
        self.token, self.place = (table.outputs[0] for table in match.inputs[:2])
        self.column = next(node for node in self.sequences.outputs if node in match.nodes)

    def read(self, tensor):
        """Another reader of a tensor."""
        copy = gs.Variable(f"{tensor.name}.read", tensor.dtype, tensor.shape)
        self.graph.nodes.append(gs.Node("Identity", inputs=[tensor], outputs=[copy]))
        self.graph.outputs.append(copy)

    def scale(self, values):
        token = self.token.outputs[0]
        scaled = gs.Variable("scaled", token.dtype, token.shape)
        self.add.inputs[self.add.inputs.index(token)] = scaled
        factor = gs.Constant("factor", np.array(values, np.float32))
        self.graph.nodes.append(gs.Node("Mul", inputs=[factor, token], outputs=[scaled]))
        return scaled

    def count(self):
        return len(PLUGIN.pattern.matches(self.graph))


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("shared", ["flattened position", "index", "column", "ids"])
def test_others_may_read_the_indices(shared, num_beams):
    there = Embedding(num_beams)
    index = there.column.inputs[1]
    tensors = {"flattened position": index.inputs[0].inputs[0], "index": index}
    tensors |= {"column": there.column.outputs[0], "ids": there.token.inputs[1]}
    there.graph.toposort()
    there.read(tensors[shared])
    session = grafted(there.graph, PLUGIN, PLUGIN.pattern.matches(there.graph))
    inputs = there.example({"batch": 3, "length": 24}, np.random.default_rng(0))
    with torch.inference_mode():
        expected = there.module(*(torch.from_numpy(values) for values in inputs.values()))
    assert_close(session.run(None, inputs)[0], expected[0])


@pytest.mark.parametrize("num_beams", [1, 4])
def test_rows_that_others_read_stay(num_beams):
    for name in ("token", "place"):
        there = Embedding(num_beams)
        there.read(getattr(there, name).outputs[0])
        assert there.count() == 0
    there = Embedding(num_beams)
    there.read(there.scale(3.0))
    assert there.count() == 0


@pytest.mark.parametrize("num_beams", [1, 4])
def test_near_misses_stay(num_beams):
    there = Embedding(num_beams)
    there.scale(3.0)
    (match,) = PLUGIN.pattern.matches(there.graph)
    assert match.attributes == {"scale": 3.0}
    there = Embedding(num_beams)
    there.scale(np.full(192, 3.0))
    assert there.count() == 0  # a factor for each column
    for node in ("column", "token", "place"):
        there = Embedding(num_beams)
        attributes = getattr(there, node).attrs
        attributes["axis"] = 0 if node == "column" else 1
        assert there.count() == 0
    for tensor in ("sequences", "position"):
        there = Embedding(num_beams)
        getattr(there, tensor).dtype = np.dtype(np.int64)
        assert there.count() == 0
    there = Embedding(num_beams)
    there.position.shape = [2]
    assert there.count() == 0
    there = Embedding(num_beams)
    there.positions.values = there.positions.values[:, :1]
    assert there.count() == 0
    there = Embedding(num_beams)
    there.add.op = "Sub"
    assert there.count() == 0
    there = Embedding(num_beams)
    there.token.inputs[0] = gs.Variable("computed", np.float32, [439, 192])
    assert there.count() == 0


def test_another_positions_row_stays():
    """Two positions, of which each index takes one."""
    there = Embedding(1)
    there.place.inputs[1] = gs.Variable("another", np.int32, [1])
    assert there.count() == 0


def launch(tokens, positions, sequences, position, scale=1.0, y=None):
    """The kernel's y (rows, 1, D), written to `y` if given."""
    length, dim = sequences.shape[-1], tokens.shape[1]
    rows = sequences[..., 0].numel()
    y = kernels.poisoned(rows, 1, dim, dtype=tokens.dtype) if y is None else y
    sizes = rows, length, len(tokens), len(positions), dim
    at = torch.tensor([position], dtype=torch.int32, device="cuda")
    kernels.launch("token_embedding", tokens.dtype, tokens, positions, sequences, at, y, *sizes, scale)
    return y


def on_gpu(*arguments):
    return [torch.from_numpy(array).cuda() for array in random_inputs(*arguments)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("scale", [1.0, 16.0, 22.627417])
@pytest.mark.parametrize(
    ("shape", "vocabulary", "dim"),
    [((rows, 24), 50265, 1024) for rows in (1, 2, 3, 8, 17, 32, 64)]
    + [((16, 4, 40), 50265, 1024), ((1, 4, 512), 64044, 256), ((0, 24), 9, 64), ((3, 1), 1, 8), ((70_000, 2), 5, 8)]
    # rows of whole words of 16, 8, 4 and 2 bytes, in the one type or the other
    + [((5, 13), 101, dim) for dim in (1, 2, 3, 4, 6, 12, 20, 127, 128, 129, 768, 1023, 1026, 4100, 4104)],
)
def test_kernel_is_the_reference(shape, vocabulary, dim, scale, dtype):
    tokens, positions, sequences = on_gpu(shape, vocabulary, shape[-1] + 2, dim, dtype)
    for position in {0, shape[-1] // 2, shape[-1] - 1}:
        expected = token_embedding(tokens, positions, sequences, position, scale)
        assert torch.equal(launch(tokens, positions, sequences, position, scale), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("dim", [3, 8, 192, 1024])
def test_kernel_keeps_within_the_tables(dim, dtype):
    """Tokens and positions outside; NaN around all that is read, and around what is written."""
    random = torch.Generator("cuda").manual_seed(0)
    guard, type_ = 4 * dim, torch.from_numpy(np.zeros(0, dtype)).dtype
    tables = []
    for rows in (11, 7):
        memory = kernels.poisoned(rows * dim + 2 * guard, dtype=type_)
        tables.append(memory[guard:-guard].view(rows, dim))
        tables[-1].copy_(torch.randn(rows, dim, generator=random, device="cuda"))
    largest = np.iinfo(np.int32).max
    ids = [0, 10, 11, 12, -1, -2, largest, -largest - 1]
    memory_y = kernels.poisoned(len(ids) * dim + 2 * guard, dtype=type_)
    y = memory_y[guard:-guard].view(len(ids), 1, dim)
    sequences = torch.tensor(ids, dtype=torch.int32, device="cuda").unsqueeze(1).repeat(1, 9)
    for position in (0, 6, 7, 8, 9, 1000, largest, -1, -largest - 1):
        y.fill_(torch.nan)
        expected = token_embedding(*tables, sequences, position, 2.0)
        assert torch.equal(launch(*tables, sequences, position, 2.0, y), expected)
    assert torch.equal(expected[[1]].expand(3, 1, dim), expected[[1, 2, 6]])
    assert memory_y.isnan().sum() == 2 * guard


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("unaligned", [0, 1, 3])
@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_kernel_takes_tensors_on_any_boundary(ahead, unaligned, dtype):
    """Tokens, positions or y that begin some elements behind a boundary of 16 bytes."""
    tensors = on_gpu((3, 5), 10, 5, 64, dtype)
    tensors.append(kernels.poisoned(3, 1, 64, dtype=tensors[0].dtype))
    memory = kernels.poisoned(tensors[unaligned].numel() + 2 * ahead, dtype=tensors[0].dtype)
    moved = memory[ahead:-ahead].view(tensors[unaligned].shape)
    tensors[unaligned] = moved.copy_(tensors[unaligned])
    tokens, positions, sequences, y = tensors
    expected = token_embedding(tokens, positions, sequences, 3, 1.5)
    assert torch.equal(launch(tokens, positions, sequences, 3, 1.5, y), expected)
    assert memory.isnan().sum() == 2 * ahead


@pytest.mark.gpu
def test_kernel_rounds_once():
    """Infinities and numbers beyond FP16 behave as in PyTorch; a sum is rounded, not its terms."""
    values = torch.tensor([[60000.0, 1.0, torch.inf, -0.0, 2049.0, 3e-8]], device="cuda").half()
    others = torch.tensor([[60000.0, 2.0**-11, -torch.inf, -0.0, 0.0, 0.0]], device="cuda").half()
    sequences = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    for scale in (1.0, 1.0001, 3.0):
        actual, expected = (
            launch(values, others, sequences, 0, scale),
            token_embedding(values, others, sequences, 0, scale),
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_kernel_waits_for_the_step_before():
    """Sequences and position that greedy_choice writes right before, and writes again right behind."""
    torch.manual_seed(0)
    rows, length, vocabulary, dim = 3, 40, 3000, 1024
    tokens, positions = torch.randn(vocabulary, dim, device="cuda"), torch.randn(length, dim, device="cuda")
    logits = torch.randn(length, rows, vocabulary, device="cuda")
    sequences = torch.zeros(rows, length, dtype=torch.int32, device="cuda")
    position, finished = (torch.zeros(count, dtype=torch.int32, device="cuda") for count in (1, rows))
    allowed_from, forced, ends = (torch.full((1,), value, dtype=torch.int32, device="cuda") for value in (0, -1, -1))
    workspace = torch.zeros(1024, dtype=torch.int64, device="cuda")
    y = kernels.poisoned(length, rows, 1, dim, dtype=torch.float32)
    torch.cuda.synchronize()
    for step in range(length):
        sizes = rows, length, vocabulary, length, dim
        kernels.launch("token_embedding", y.dtype, tokens, positions, sequences, position, y[step], *sizes, 1.0)
        state = sequences, position, finished
        kernels.launch(
            *("greedy_choice", y.dtype, logits[step], *state, allowed_from, forced, ends, *state, workspace),
            *(rows, vocabulary, length, 1, 1, 1, 0),
        )
    chosen = torch.cat([torch.zeros(1, rows, dtype=torch.int64, device="cuda"), logits.argmax(dim=2)])[:length]
    assert torch.equal(sequences, chosen.T.int())
    assert torch.equal(y, (tokens[chosen] + positions[:, None]).unsqueeze(2))


@pytest.mark.gpu
def test_kernel_refuses_empty_tables():
    tokens, positions, sequences = on_gpu((2, 4), 5, 4, 8, np.float16)
    for index in range(2):
        tables = [tokens, positions]
        tables[index] = tables[index][:0]
        with pytest.raises(RuntimeError):
            launch(*tables, sequences, 0)
    with pytest.raises(RuntimeError):
        kernels.launch("token_embedding", tokens.dtype, *(tokens,) * 5, 2**31, 1, 5, 4, 8, 1.0)
