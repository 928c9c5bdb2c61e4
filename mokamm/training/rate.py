"""The learning rate to begin with: "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025) as a formula.

    rate = 5e-5 * factor * (2000 / hidden)^P        P = 0.781 (Llama), 0.0775 (Qwen)
    factor = 10 for LoRA, 15 for a run under 100 steps, 1 for full fine-tuning

Nearly independent of the rank (1 to 512), for W' = W + (alpha/r) B A with alpha 32, A uniform within +-1/sqrt(d_in), B
zero, trained with Adam. Llama-3.1-8B gets 2.86e-4, Qwen3-8B 4.73e-4. `mokamm advise` prints it, `learning_rate: auto`
trains with it. Outside what it was fitted to it still answers, and each reason to doubt is a note. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from mokamm.config import RunConfig
from mokamm.config_sections import AdapterConfig
from mokamm.training.stream import plan_of

FULL, LORA, SHORT = 5.0e-5, 10, 15  # the rate of full fine-tuning at width 2000; LoRA's multiples of it
FEW_STEPS = 100
EXPONENTS = {"Llama": 0.781, "Qwen": 0.0775}
ALPHA = 32.0
HIGHEST_RANK = 512
NARROWEST = 896  # hidden size of the narrowest published Llama or Qwen (Qwen2.5-0.5B)
# what papers used for methods that the formula says nothing about
PUBLISHED = {
    "moka": "its paper trained at 1e-4 (r 4, alpha 16)",
    "multi_lora": "MokA's paper trained it at 1e-4 (r 4, alpha 16)",
    "lori_d": "its paper trained at 5e-5 (r 32, alpha 64)",
    "lori_s": "its paper trained at 5e-4 (r 32, alpha 64)",
    "hira": "its paper trained at about 1e-3",
}


@dataclass(frozen=True)
class Rate:
    """value: to three digits, so that typing what is printed gives the same run. notes: where it is not calibrated."""

    value: float
    formula: str
    notes: tuple[str, ...] = ()


def family_of(model_type: str) -> str | None:
    """Llama or Qwen, by the `model_type` of a transformers config; None: another family."""
    kind = model_type.lower()
    return next((family for family in EXPONENTS if kind.startswith(family.lower())), None)


def recommend(model_type: str, hidden: int, adapter: AdapterConfig, steps: int) -> Rate:
    """The rate for an LLM of that type and width, trained by that adapter section for so many optimizer steps."""
    family = family_of(model_type)
    # another family: the more careful of the two rates
    powers = [EXPONENTS[family]] if family else list(EXPONENTS.values())
    exponent = min(powers, key=lambda power: (2000 / hidden) ** power)
    factor = 1 if adapter.method == "full" else SHORT if steps < FEW_STEPS else LORA
    value = float(f"{FULL * factor * (2000 / hidden) ** exponent:.3g}")
    formula = f"5e-5 * {factor} * (2000 / {hidden})^{exponent:g}"
    return Rate(value, formula, tuple(_notes(model_type, hidden, adapter, value)))


def _notes(model_type: str, hidden: int, adapter: AdapterConfig, value: float) -> list[str]:
    notes = []
    if family_of(model_type) is None:
        notes.append(
            f"the formula was fitted to Llama and Qwen, this is '{model_type}': taken is the lower of the two rates"
        )
    if hidden < NARROWEST:
        notes.append(f"a hidden size of {hidden} is narrower than any Llama or Qwen: the formula is extrapolated")
    if adapter.method == "full":
        return notes
    if adapter.method != "lora":
        published = PUBLISHED.get(adapter.method)
        notes.append(
            f"fitted to LoRA; for {adapter.method} it is LoRA's rate, untested"
            + (f" ({published})" if published else "")
        )
    if adapter.coto or adapter.stochastic_depth:
        notes.append("fitted to adapters that act in every step; those that sit out of some (CoTo) want a higher rate")
    if adapter.r > HIGHEST_RANK:
        notes.append(f"fitted to ranks from 1 to {HIGHEST_RANK}, here it is {adapter.r}")
    if adapter.lora_alpha != ALPHA and adapter.method != "hira":  # it has no alpha
        scaled = value * ALPHA / adapter.lora_alpha
        notes.append(
            f"fitted with alpha 32, here it is {adapter.lora_alpha:g}: the first updates grow with rate * alpha (B starts "
            f"at zero, and Adam's steps do not depend on the scale), so {scaled:.3g} would make them as large"
        )
    return notes


def resolve(config: RunConfig, llm_config: object, rows: int, ranks: int) -> str | None:
    """Put the rate in the place of `learning_rate: auto`; the line that tells of it. Does nothing where it is a number.

    rows: of the training set, which decides the number of steps.
    """
    training = config.training
    if training.learning_rate != "auto":
        return None
    steps = plan_of(training, rows, ranks).total_steps
    model_type, hidden = shape_of(llm_config)
    rate = recommend(model_type, hidden, config.adapter, steps)
    training.learning_rate = rate.value
    notes = f"; not calibrated: {'; '.join(rate.notes)}" if rate.notes else ""
    return f"learning_rate: auto = {rate.value:.3g} ({rate.formula}, {steps} steps){notes}"


def shape_of(llm_config: object) -> tuple[str, int]:
    """`model_type` and hidden size of a transformers config, or of the text part of a multimodal one."""
    text = llm_config.get_text_config()  # type: ignore[attr-defined]
    return text.model_type, int(text.hidden_size)
