"""Padding is never attended: a row's logits and answer do not depend on what shares its batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.schema import Media, Message, Sample, Text
from encoders.cache import FeatureCache
from mokamm.model import MultimodalLM
from mokamm.perception import Perception

STEPS = 6
ROWS = [
    ("va", "How many things sound in this long question, which pads all the others by a good deal?"),
    ("", "Red?"),
    ("s", ""),  # a spoken question and not one word
    ("i", "Is there a ring?"),
    ("", "Which of the five names in this sentence without any picture, sound or voice is the third?"),
    ("a", "What sounds?"),
    ("v", "What moves?"),
    ("ias", "And all of them?"),
]


def sample(number: int, kinds: str, question: str) -> Sample:
    files = {
        "v": Media("video", f"videos/{number % 3}.mp4", "vision"),
        "a": Media("audio", f"audio/{number % 3}.wav", "audio"),
        "s": Media("audio", f"speech/{number % 3}.wav", "speech"),
        "i": Media("image", f"images/{number % 2}.png", "vision"),
    }
    texts = [Text(question, question=True)] if question else []
    return Sample(str(number), (Message("user", (*(files[kind] for kind in kinds), *texts)),))


SAMPLES = [sample(number, *row) for number, row in enumerate(ROWS)]


@pytest.fixture(params=["float32", "float64"])
def model(request: pytest.FixtureRequest, small_run: Path, tmp_path: Path) -> MultimodalLM:
    """With a feature cache, as runs have: encoders may round otherwise in another batch, and that is not the question.

    In float32 with an adapter of a trained one's size; in float64, where rounding is out of the way, as it is.
    """
    model = MultimodalLM.from_run(small_run, device="cpu")
    model.perception = Perception(model.perception.encoders, FeatureCache(tmp_path / "cache", 1.0))
    model.processor.lookup = model.perception.lookup
    model.perception.fill(model.prompt_batch(SAMPLES))
    if request.param == "float32":
        for name, parameter in model.named_parameters():
            if "moka_B" in name:
                parameter.data *= 0.1
        return model
    for projector in model.projectors.values():
        projector.register_forward_pre_hook(lambda module, given: (given[0].double(), *given[1:]))
    return model.double()


@torch.no_grad()
def logits_of(model: MultimodalLM, samples: list[Sample]) -> list[torch.Tensor]:
    """The logits (N,V) of each row at all its own prompt's tokens and at every step of its answer, by the KV cache."""
    batch = model.prompt_batch(samples)
    prompt = model(batch)["logits"]
    plan = model._generation_config(STEPS, 1)
    plan.output_logits = plan.return_dict_in_generate = True
    found: Any = model.llm.generate(
        inputs_embeds=model.embed(batch), attention_mask=batch["attention_mask"], generation_config=plan
    )
    steps = torch.stack(found.logits, dim=1)  # (B,steps,V)
    results = []
    for row, ids in enumerate(found.sequences):
        ends = [i for i, token in enumerate(ids.tolist()) if token in model.end_ids]
        length = ends[0] + 1 if ends else len(ids)
        own = batch["attention_mask"][row].bool()
        results.append(torch.cat([prompt[row, own], steps[row, :length]]))
    return results


def in_batches(model: MultimodalLM, size: int) -> list[torch.Tensor]:
    return [found for i in range(0, len(SAMPLES), size) for found in logits_of(model, SAMPLES[i : i + size])]


@pytest.mark.parametrize("folded", [False, True])
def test_logits_and_answers_are_those_of_the_row_alone(model: MultimodalLM, folded: bool) -> None:
    from contextlib import nullcontext

    assert not model.prompt_batch(SAMPLES)["attention_mask"][1, 0]  # padded, on the left
    assert model.prompt_batch(SAMPLES)["attention_mask"][:, -1].all()
    with model.folded() if folded else nullcontext():
        alone = in_batches(model, 1)
        answers = [model.generate([one], STEPS, folded=False)[0] for one in SAMPLES]
        assert len(set(answers)) > 2
        limit = 1e-5 if alone[0].dtype == torch.float32 else 1e-10
        for size in (3, 8):
            for number, (one, other) in enumerate(zip(alone, in_batches(model, size), strict=True)):
                torch.testing.assert_close(other, one, rtol=0, atol=limit, msg=lambda m, n=number: f"row {n}: {m}")
            batches = [SAMPLES[i : i + size] for i in range(0, len(SAMPLES), size)]
            assert [text for batch in batches for text in model.generate(batch, STEPS, folded=False)] == answers


def test_the_test_would_see_attended_padding(model: MultimodalLM) -> None:
    batch = model.prompt_batch([SAMPLES[0], SAMPLES[1]])
    kept = model(batch)["logits"][1, -1]
    seen = model({**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})["logits"][1, -1]
    assert (seen - kept).abs().max() > 1e-3
