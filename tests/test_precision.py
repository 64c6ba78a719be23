"""The FP16 typing of graphs made by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from models.spec import Part, TensorSpec
from surgeon import finish, to_fp16

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)


def variable(name, dtype=F32):
    return gs.Variable(name, dtype, [1, 8])


def typed(nodes, inputs, outputs, keep_fp32=()):
    """The graph as FP16; inputs and outputs whose names begin with `state` are internal."""
    part = Part(
        "part",
        *(
            tuple(TensorSpec(tensor.name, "float32", (1, 8), tensor.name.startswith("state")) for tensor in tensors)
            for tensors in (inputs, outputs)
        ),
        dims=(),
    )
    graph = gs.Graph([gs.Node(op, inputs=ins, outputs=outs) for op, ins, outs in nodes], inputs=inputs, outputs=outputs)
    graph.opset = 17
    to_fp16(graph, part, [graph.nodes[index] for index in keep_fp32])
    return finish(graph, [])


def run(model, **inputs):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)


def casts(model):
    return [node.op_type for node in model.graph.node].count("Cast")


def types(model):
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {
        value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in (*inferred.input, *inferred.output, *inferred.value_info)
    }


def test_user_facing_tensors_keep_fp32_and_internal_ones_do_not():
    x, state, y, new_state = variable("x"), variable("state_in"), variable("y"), variable("state_out")
    model = typed([("Add", [x, state], [new_state]), ("Neg", [new_state], [y])], [x, state], [y, new_state])
    found = types(model)
    assert (found["x"], found["y"], found["state_in"], found["state_out"]) == (F32, F32, F16, F16)
    assert casts(model) == 2
    one = np.full((1, 8), 1.5, np.float32)
    y_value, state_value = run(model, x=one, state_in=one.astype(F16))
    assert (y_value.dtype, state_value.dtype) == (F32, F16)
    np.testing.assert_array_equal(y_value, -3 * np.ones((1, 8)))


@pytest.mark.parametrize(("keep_fp32", "dtype_of_square"), [([], F16), ([0], F32)])
def test_softmax_and_nodes_asked_for_stay_in_fp32(keep_fp32, dtype_of_square):
    x, square, shares, y = (variable(name) for name in ("x", "square", "shares", "y"))
    nodes = [("Mul", [x, x], [square]), ("Softmax", [square], [shares]), ("Mul", [shares, shares], [y])]
    model = typed(nodes, [x], [y], keep_fp32)
    assert types(model)["square"] == dtype_of_square
    assert types(model)["shares"] == F32
    np.testing.assert_allclose(run(model, x=np.full((1, 8), 3, np.float32))[0], 1 / 64)


def test_one_cast_serves_all_users():
    x, *rest = (variable(name) for name in "xabc")
    model = typed([("Neg", [x], [tensor]) for tensor in rest], [x], rest)
    assert casts(model) == 1 + 3  # the input once, each output


def test_constants_become_fp16_within_its_range():
    x, y = variable("x"), variable("y")
    least = gs.Constant("least", np.array(np.finfo(np.float32).min))
    model = typed([("Max", [x, least], [y])], [x], [y])
    (constant,) = model.graph.initializer
    assert onnx.numpy_helper.to_array(constant) == pytest.approx(-65504)
    np.testing.assert_array_equal(run(model, x=np.zeros((1, 8), np.float32))[0], np.zeros((1, 8)))


def test_integers_are_left_alone():
    ids, table = variable("ids", np.dtype(np.int64)), gs.Constant("table", np.eye(8, dtype=np.float32))
    y = gs.Variable("y", F32, [1, 8, 8])
    model = typed([("Gather", [table, ids], [y])], [ids], [y])
    assert types(model)["ids"] == np.int64
    (result,) = run(model, ids=np.arange(8).reshape(1, 8))
    np.testing.assert_array_equal(result[0], np.eye(8))
