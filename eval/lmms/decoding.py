"""lmms-eval's generation_kwargs as greedy or beam decoding; what cannot be honoured is refused, not dropped.

max_new_tokens   default: the run's evaluation.max_new_tokens
num_beams        default: 1
until            texts; the answer ends before the first of them (stop_sequences: the same)
do_sample, temperature, repetition_penalty    must not ask for anything but greedy or beam search
top_p, top_k, seed     mean nothing without sampling
image_aspect_ratio     another model's preprocessing; a run has its own
max_length             has no part in it: max_new_tokens is the answer's length
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.schema import UserError, nearest

WITHOUT_MEANING = ("top_p", "top_k", "seed", "image_aspect_ratio", "max_length")
KNOWN = (
    "max_new_tokens", "num_beams", "until", "stop_sequences", "do_sample", "temperature", "repetition_penalty",
    *WITHOUT_MEANING,
)  # fmt: skip
GREEDY = "answers are greedy; add --gen_kwargs do_sample=False,temperature=0 to lmms-eval's command"


@dataclass(frozen=True, slots=True)
class Decoding:
    max_new_tokens: int | None = None
    num_beams: int = 1
    until: tuple[str, ...] = ()

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> Decoding:
        """Raises UserError for settings that cannot be honoured."""
        for name, value in kwargs.items():
            if name not in KNOWN and value is not None:
                raise UserError(f"generation_kwargs: '{name}' is not supported{nearest(name, KNOWN)}")
        temperature = float(kwargs.get("temperature") or 0.0)
        sampled = kwargs.get("do_sample")
        if (sampled and kwargs.get("temperature") is None) or (sampled is not False and temperature > 0):
            raise UserError(
                f"generation_kwargs: do_sample={sampled}, temperature={kwargs.get('temperature')} ask for sampling; "
                f"{GREEDY}"
            )
        if float(kwargs.get("repetition_penalty") or 1.0) != 1.0:
            raise UserError(f"generation_kwargs: repetition_penalty={kwargs['repetition_penalty']}; {GREEDY}")
        tokens, beams = kwargs.get("max_new_tokens"), kwargs.get("num_beams")
        for name, value in (("max_new_tokens", tokens), ("num_beams", beams)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"generation_kwargs: {name} must be a whole number of at least 1, found {value!r}")
        return cls(tokens, beams or 1, (*_texts(kwargs.get("until")), *_texts(kwargs.get("stop_sequences"))))

    def cut(self, text: str) -> str:
        """The answer up to the first of the `until` texts."""
        return text[: min((text.find(end) for end in self.until if end in text), default=len(text))].strip()


def _texts(value: Any) -> tuple[str, ...]:
    found = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    return tuple(str(text) for text in found if text)
