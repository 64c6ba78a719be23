"""TrOCR: text recognition by a vision transformer and a text decoder (Li et al., AAAI 2023).

Parts: `encoder` once for each image, `prefill` once for each image (keys and values of the cross-attention), `step`
once for each token with a K/V cache of fixed capacity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from models.spec import Bar, ModelSpec
from models.trocr import images, metric, pipeline, samples

if TYPE_CHECKING:
    from models.spec import LoadedModel


def load(weights: str, num_beams: Optional[int] = None) -> LoadedModel:
    from models.trocr import network  # brings PyTorch and transformers

    return network.load(weights, num_beams)


SPEC = ModelSpec(
    name="trocr",
    title="TrOCR",
    load=load,
    load_options=("num_beams",),
    read=images.read,
    prepare=pipeline.prepare,
    run=pipeline.run,
    workloads=pipeline.workloads,
    batch_size=32,
    writer=pipeline.writer,
    samples=samples.samples,
    write_samples=samples.write_samples,
    labelled=samples.labelled,
    score=metric.score,
    difference=metric.difference,
    badness=metric.badness,
    describe=metric.describe,
    bars={
        "fp32": (Bar("part max abs", 1e-3), Bar("differing outputs", 0)),
        # No bar on texts: random weights leave two tokens within FP16's rounding often, and then a whole text differs.
        "fp16": (Bar("part max abs", 0.1),),
    },
)
