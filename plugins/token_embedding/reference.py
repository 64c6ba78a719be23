"""TokenEmbedding: the embedding of one token of each sequence, with that of its position.

y = scale · tokens[sequences[…, position]] + positions[position]

For PyTorch and the kernel an index outside its table is the nearest one inside.  For ONNX it is an error: ONNX Runtime
says so, TensorRT's own layers leave open what they read.
"""

from __future__ import annotations

from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
TokenEmbedding <scale, plugin_version, plugin_namespace> (tokens, positions, sequences, position) => (y) {
    column = Gather <axis = -1> (sequences, position)
    rows = Constant <value_ints = [-1, 1]> ()
    ids = Reshape (column, rows)
    token = Gather <axis = 0> (tokens, ids)
    token32 = Cast <to = 1> (token)
    factor = Constant <value_float: float = @scale> ()
    scaled = Mul (token32, factor)
    place = Gather <axis = 0> (positions, position)
    place32 = Cast <to = 1> (place)
    y32 = Add (scaled, place32)
    y = CastLike (y32, tokens)
}
"""


def token_embedding(tokens: Tensor, positions: Tensor, sequences: Tensor, position: int, scale: float) -> Tensor:
    """tokens (V, D), positions (P, D), sequences (B, S) or (B, beams, S) → (B, 1, D) or (B·beams, 1, D) in the tables'
    type, computed in FP32."""

    def inside(index: int, size: int) -> int:
        return min(max(index, 0), size - 1)

    ids = sequences[..., inside(position, sequences.shape[-1])].reshape(-1, 1).long().clamp(0, len(tokens) - 1)
    return (tokens[ids].float() * scale + positions[inside(position, len(positions))].float()).to(tokens.dtype)
