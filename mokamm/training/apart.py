"""`training.padding_free`: the samples of a batch stand one after another in one row, and nothing is padded.

transformers parts such a row where position_ids begin anew: a block in the attention's mask for each sample, or lengths
for FlashAttention's kernels. Not every LLM does: those with a recurrent state, or with a mask of their own, would read one
sample on into the next. So the model itself is asked before the first step.

Loss and gradients are those of the padded batch. FlashAttention never looks at another sample's tokens; others compute
the whole square of the row and drop what is not a sample's own, so that the row should not be long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data.collate import joined
from data.schema import IGNORED, Example, Sample, UserError
from mokamm.training.engine import Engine

INSTEAD = "set training.padding_free=false; training.group_by_length=true leaves little padding, too"


@torch.no_grad()
def check_apart(engine: Engine, model: Any) -> None:
    """Raises UserError where what the LLM says of a sample depends on the one before it in its row.

    All ranks call it; leaves the engine in evaluation mode. Cost: three forwards of a dozen tokens.
    """
    if not model.takes_positions:
        raise UserError(f"training.padding_free needs an LLM that takes position_ids, and this one does not: {INSTEAD}")
    engine.train(False)
    words = model.processor.tokenizer.vocab_size
    first, another, second = (_text(torch.arange(n, n + length) % words) for n, length in ((7, 5), (29, 5), (51, 7)))

    def of_second(*examples: Example) -> Tensor:
        return engine(joined(examples))["logits"][0, -7:].float()

    alone, after = of_second(second), of_second(first, second)
    # the same shapes, so that rounding alone cannot differ by much; a sample alone is computed in others
    leaked, moved = (after - of_second(another, second)).abs().max(), (after - alone).abs().max()
    if leaked > 0.01 * alone.std() or moved > 0.2 * alone.std():
        raise UserError(
            "training.padding_free: this LLM does not keep the samples of a row apart (its logits for the second of two "
            f"samples change by {float(max(leaked, moved) / alone.std()):.2g} standard deviations with the first): {INSTEAD}"
        )


def _text(ids: Tensor) -> Example:
    none = torch.zeros_like(ids)
    return Example(ids, none + IGNORED, none, none.bool(), [], Sample("padding_free", ()))
