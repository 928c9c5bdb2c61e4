"""`training.packing`: samples of a batch share rows, so that little or nothing is padded, and each is kept to itself.

    padded    aaaaaaaa    packed    aaaaaaaa    in one row    aaaaaaaabbbbbccd
              bbbbb...              bbbbbccd
              cc......
              d.......

Steps, loss and gradients are those of the padded batch; rows are only filled with what the batch holds. They are as long as
the longest sample, so that an attention which computes the whole square of a row computes no more than before; with
FlashAttention, whose kernels take lengths, all samples stand in a single row.

transformers parts a row where position_ids begin anew: a block in the attention's mask for each sample, or lengths. Not
every LLM does: those with a recurrent state, or a mask of their own, would read one sample on into the next. So the model
itself is asked before the first step. The routed adapters part it by `Routing`'s sample_ids; their attention has as many
columns as the row has keys, so in a single row T times all keys of the batch, for a moment in each layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.collate import collate, share_rows
from data.schema import IGNORED, Example, Sample, UserError
from mokamm.config import RunConfig
from mokamm.training.corpus import Join
from mokamm.training.engine import Engine

INSTEAD = "set training.packing=false; training.group_by_length=true leaves little padding, too"


def joining(config: RunConfig) -> Join:
    """How the examples of a training batch become one."""
    if not config.training.packing:
        return collate
    return partial(share_rows, one_row=config.model.llm.attention == "flash_attention_2")


@torch.no_grad()
def check_apart(engine: Engine, model: Any) -> None:
    """Raises UserError where what the LLM says of a sample depends on the one before it in its row.

    All ranks call it; leaves the engine in evaluation mode. Cost: three forwards of a dozen tokens.
    """
    if not model.takes_positions:
        raise UserError(f"training.packing needs an LLM that takes position_ids, and this one does not: {INSTEAD}")
    engine.train(False)
    words = model.processor.tokenizer.vocab_size
    first, another, second = (_text(torch.arange(n, n + length) % words) for n, length in ((7, 7), (29, 7), (51, 5)))

    def of_second(*examples: Example) -> Tensor:
        return engine(share_rows(examples, model.processor.pad_id, one_row=True))["logits"][0, -5:]

    alone, after = of_second(second), of_second(first, second)
    # the same shapes, so that rounding alone cannot differ by much (it does where experts get other numbers of tokens);
    # a sample alone is computed in others
    rounding = torch.finfo(alone.dtype).eps ** 0.5  # 0.0003 in float32, 0.09 in bfloat16
    alone, after, otherwise = alone.float(), after.float(), of_second(another, second).float()
    leaked, moved = (after - otherwise).abs().max(), (after - alone).abs().max()
    if leaked > rounding * alone.std() or moved > 0.2 * alone.std():
        raise UserError(
            "training.packing: this LLM does not keep the samples of a row apart (its logits for the second of two "
            f"samples differ by {float(max(leaked, moved) / alone.std()):.2g} standard deviations from those without, or "
            f"with another, first): {INSTEAD}"
        )


def _text(ids: Tensor) -> Example:
    none = torch.zeros_like(ids)
    return Example(ids, none + IGNORED, none, none.bool(), [], Sample("packing", ()))
