"""GreedyChoice: one step of greedy decoding behind the logits, all of it on the device.

    token = argmax of the logits, without those of tokens with position < allowed_from;  forced[position], if there is
    one;  pad, in finished rows
    sequences[:, position + 1] = token;  position += 1;  finished |= token ∈ ends

The first of equal logits wins.  A NaN counts as the highest for PyTorch, numpy and the kernel; for ONNX anything may be
chosen then.
"""

from __future__ import annotations

import torch
from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
GreedyChoice <pad, plugin_version, plugin_namespace>
    (logits, sequences, position, finished, allowed_from, forced, ends)
    => (next_sequences, next_position, next_finished)
{
    logits32 = Cast <to = 1> (logits)
    zero = Constant <value_float = 0.0> ()
    least = Log (zero)
    early = Less (position, allowed_from)
    scores = Where (early, least, logits32)
    best = ArgMax <axis = 1, keepdims = 1> (scores)
    best32 = Cast <to = 6> (best)

    none = Constant <value_int = 0> ()
    none32 = Cast <to = 6> (none)
    one = Constant <value_int = 1> ()
    one32 = Cast <to = 6> (one)
    positions = Size (forced)
    last = Sub (positions, one)
    now = Cast <to = 7> (position)
    index = Min (now, last)
    forced_now = Gather (forced, index)
    is_forced = GreaterOrEqual (forced_now, none32)
    allowed = Where (is_forced, forced_now, best32)

    columns = Constant <value_ints = [1]> ()
    was_finished = Greater (finished, none32)
    was = Unsqueeze (was_finished, columns)
    padding = Constant <value_int: int = @pad> ()
    padding32 = Cast <to = 6> (padding)
    token = Where (was, padding32, allowed)

    is_end = Equal (token, ends)
    is_end32 = Cast <to = 6> (is_end)
    ended = ReduceMax <axes = [1], keepdims = 0> (is_end32)
    next_finished = Max (finished, ended)
    next_position = Add (position, one32)

    capacity = Shape <start = 1, end = 2> (sequences)
    end = Squeeze (capacity)
    slots = Range (none, end, one)
    after = Add (now, one)
    here = Equal (slots, after)
    next_sequences = Where (here, token, sequences)
}
"""


def greedy_choice(
    logits: Tensor,
    sequences: Tensor,
    position: int,
    finished: Tensor,
    allowed_from: Tensor,
    forced: Tensor,
    ends: Tensor,
    pad: int,
) -> tuple[Tensor, int, Tensor]:
    """logits (B, V), sequences (B, S), finished (B,), allowed_from (V,) or (1,), forced (P,), ends (E,)
    → next_sequences, next_position, next_finished."""
    token = torch.where(position < allowed_from, -torch.inf, logits.float()).argmax(dim=1).int()
    forced_token = int(forced[min(position, len(forced) - 1)])
    if forced_token >= 0:
        token[:] = forced_token
    token[finished > 0] = pad
    next_sequences = sequences.clone()
    if position + 1 < sequences.shape[1]:
        next_sequences[:, position + 1] = token
    return next_sequences, position + 1, torch.maximum(finished, torch.isin(token, ends).int())
