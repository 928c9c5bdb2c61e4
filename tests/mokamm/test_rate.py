"""The learning rate of "LoRA Without Regret": its published values, where it does not hold, and `auto` in a run."""

from __future__ import annotations

import pytest

from mokamm.config import ConfigError, load_config
from mokamm.config_sections import AdapterConfig
from mokamm.training.rate import recommend

CONFIG = """\
model: {llm: {path: x}}
adapter: {method: lora, r: 4, lora_alpha: 32}
data: {train: [{source: messages, path: x}]}
training: {output_dir: runs/x, learning_rate: auto}
"""


def lora(**options) -> AdapterConfig:
    return AdapterConfig(**{"method": "lora", "lora_alpha": 32, **options})


@pytest.mark.parametrize(
    ("model_type", "hidden", "method", "steps", "expected"),
    [
        ("llama", 4096, "lora", 1000, 2.86e-4),  # FACTS: Llama-3.1-8B
        ("qwen3", 4096, "lora", 1000, 4.73e-4),  # FACTS: Qwen3-8B
        ("llama", 4096, "full", 1000, 2.86e-5),
        ("qwen3_moe", 2048, "full", 99, 4.99e-5),
        ("llama", 2000, "lora", 100, 5e-4),
        ("llama", 2000, "lora", 99, 7.5e-4),
        ("mistral", 4096, "lora", 1000, 2.86e-4),  # another family: the lower of the two, here Llama's
        ("mistral", 1000, "lora", 1000, 5.28e-4),  # and here Qwen's
    ],
)
def test_published_values(model_type, hidden, method, steps, expected):
    rate = recommend(model_type, hidden, lora(method=method), steps)
    assert rate.value == expected
    assert eval(rate.formula.replace("^", "**")) == pytest.approx(expected, rel=2e-3)
    assert bool(rate.notes) == (model_type == "mistral")


def test_rank_changes_nothing():
    assert len({recommend("llama", 4096, lora(r=r), 500) for r in (1, 16, 512)}) == 1


@pytest.mark.parametrize(
    ("model_type", "hidden", "options", "expected"),
    [
        ("gemma3_text", 2560, {}, "fitted to Llama and Qwen, this is 'gemma3_text'"),
        ("llama", 192, {}, "192 is narrower than any Llama or Qwen"),
        ("llama", 4096, {"method": "moka"}, "for moka it is LoRA's rate, untested (its paper trained at 1e-4"),
        ("llama", 4096, {"lora_alpha": 16}, "fitted with alpha 32, here it is 16"),
        ("llama", 4096, {"coto": True}, "in every step; those that sit out of some (CoTo) want a higher"),
        ("llama", 4096, {"stochastic_depth": True}, "adapters that act in every step"),
        ("llama", 4096, {"r": 1024}, "fitted to ranks from 1 to 512, here it is 1024"),
    ],
)
def test_what_is_not_calibrated_is_said(model_type, hidden, options, expected):
    notes = recommend(model_type, hidden, lora(**options), 500).notes
    assert len(notes) == 1
    assert expected in notes[0]
    if "lora_alpha" in options:
        assert "0.000572 would make them as large" in notes[0]  # half the alpha, twice the rate


def test_nothing_is_said_of_an_alpha_that_the_method_does_not_have():
    notes = recommend("llama", 4096, lora(method="hira", lora_alpha=16), 500).notes
    assert not [note for note in notes if "alpha" in note]


def test_an_alpha_is_made_up_for_by_the_rate_in_the_first_step():
    """The hint about alpha, on PEFT's layer: alpha 16 at twice the rate moves W as alpha 32 does."""
    import torch
    from peft import LoraConfig, get_peft_model

    def first_update(alpha: float, rate: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(8, 6)), LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"])
        )
        x, layer = torch.randn(5, 8), model.base_model.model[0]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
        model(x).pow(2).sum().backward()
        optimizer.step()
        return layer.get_delta_weight("default").detach()

    torch.testing.assert_close(first_update(16, 2e-4), first_update(32, 1e-4), rtol=1e-4, atol=1e-9)
    assert not torch.allclose(first_update(16, 1e-4), first_update(32, 1e-4), rtol=1e-2, atol=1e-9)


def test_auto_in_a_configuration(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    assert load_config(path).training.learning_rate == "auto"
    for override in ("training.stage=1", "adapter.method=none"):
        with pytest.raises(ConfigError, match="nothing of the LLM is trained here: write a number"):
            load_config(path, [override])
    with pytest.raises(ConfigError, match=r"training.learning_rate \(override\): .*'auto'; found 'automatic'"):
        load_config(path, ["training.learning_rate=automatic"])
    with pytest.raises(ConfigError, match=r"greater than 0.*found 0"):
        load_config(path, ["training.learning_rate=0"])
