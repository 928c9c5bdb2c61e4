"""What `eval/speed/adapters.py` compares: the same frozen weights under each method, and steps to run on them.

    base     nothing added                          lora     PEFT's LoRA
    moka     mokamm.adapters, attention on          plain    the paper's formula as it reads (plain_moka.py)

Every sample has the shape of the paper's audio-visual setting: 730 tokens, of which 320 vision, 320 audio and a question
of 40. Adapters are random, B too, so that nothing is zero. All methods share the frozen weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eval.speed.plain_moka import Tokens, wrap_plain
from mokamm.adapters import MokaConfig, Routing, set_routing
from mokamm.adapters.targets import match_targets

METHODS = ("base", "lora", "moka", "plain")
TEXT, VISION, AUDIO, QUESTION, ANSWER = 10, 320, 320, 40, 40  # in this order
LENGTH = TEXT + VISION + AUDIO + QUESTION + ANSWER
MINI_LLM = Path(__file__).resolve().parents[2] / "mokamm" / "mini" / "llm"


@dataclass(frozen=True)
class Setup:
    """r, alpha and dropout as in the paper's setting, but for dropout."""

    r: int = 4
    alpha: int = 16
    dropout: float = 0.0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None  # None: as PEFT makes them, float32 on a bfloat16 base
    checkpointing: bool = False
    compile: bool = False


@dataclass
class Subject:
    """A wrapped module, and how a batch of another size is announced to it."""

    module: nn.Module
    announce: Callable[[Tensor, Tensor], None]


def placed_tokens(batch: int) -> tuple[Tensor, Tensor]:
    """modality_ids and key_mask (B,T) of `batch` equal samples."""
    ids = torch.zeros(batch, LENGTH, dtype=torch.int64)
    keys = torch.zeros(batch, LENGTH, dtype=torch.bool)
    ids[:, TEXT : TEXT + VISION] = 1
    ids[:, TEXT + VISION : TEXT + VISION + AUDIO] = 2
    keys[:, LENGTH - ANSWER - QUESTION : LENGTH - ANSWER] = True
    return ids, keys


def new_linear(width: int, setup: Setup) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"proj": nn.Linear(width, width, bias=False, device=setup.device, dtype=setup.dtype)})


def mini_llm(setup: Setup) -> nn.Module:
    from transformers import AutoModelForCausalLM

    llm: Any = AutoModelForCausalLM.from_pretrained(MINI_LLM, dtype=setup.dtype)
    return llm.to(setup.device).train()


def llama_7b(setup: Setup, layers: int) -> nn.Module:
    """LLaMA-2-7B's shape with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(setup.dtype)
    try:
        with torch.device(setup.device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(default)


def subjects(base: nn.Module, setup: Setup, methods: tuple[str, ...] = METHODS) -> dict[str, Subject]:
    """The base under each method, by name."""
    base.requires_grad_(False)
    made = {method: WRAP[method](_twin(base), setup) for method in methods}
    for subject in made.values():
        subject.module.train()
        _randomise(subject.module, setup)
        if setup.checkpointing:
            subject.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return made


def step_of(subject: Subject, setup: Setup, x: Tensor, gradient: Tensor, embeds: bool) -> Callable[[], None]:
    """Forward and backward; the input's gradient too, so that the frozen base has a backward pass. Leaves nothing behind."""
    forward = forward_of(subject, setup, x, embeds)
    trained = [x, *subject.module.parameters()]

    def step() -> None:
        forward().backward(gradient)
        for tensor in trained:
            tensor.grad = None

    return step


def forward_of(subject: Subject, setup: Setup, x: Tensor, embeds: bool) -> Callable[[], Tensor]:
    """One layer's output, or a model's logits."""
    module: Any = torch.compile(subject.module) if setup.compile else subject.module
    if not embeds:
        return lambda: module(x)
    return lambda: module(inputs_embeds=x, use_cache=False).logits


def _twin(base: nn.Module) -> nn.Module:
    """A copy of the modules over the same weights."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def _randomise(module: nn.Module, setup: Setup) -> None:
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
            parameter.data = parameter.data.to(setup.adapter_dtype or parameter.dtype)


def _base(module: nn.Module, setup: Setup) -> Subject:
    return Subject(_only(module), lambda ids, keys: None)


def _lora(module: nn.Module, setup: Setup) -> Subject:
    targets = ["proj"] if isinstance(module, nn.ModuleDict) else "all-linear"
    config = LoraConfig(r=setup.r, lora_alpha=setup.alpha, lora_dropout=setup.dropout, target_modules=targets)
    model = get_peft_model(module, config)  # type: ignore[arg-type]
    return Subject(_only(model), lambda ids, keys: None)


def _moka(module: nn.Module, setup: Setup) -> Subject:
    config = MokaConfig(r=setup.r, lora_alpha=setup.alpha, lora_dropout=setup.dropout)
    model = get_peft_model(module, config)  # type: ignore[arg-type]
    return Subject(
        _only(model), lambda ids, keys: set_routing(model, Routing(ids, keys).to(setup.device, non_blocking=False))
    )


def _plain(module: nn.Module, setup: Setup) -> Subject:
    found = match_targets(module, MokaConfig())
    tokens = Tokens(torch.empty(0), torch.empty(0))
    names = [name for matched in found.values() for name in matched]
    wrap_plain(module, names, tokens, setup.r, setup.alpha, 3, setup.dropout)

    def announce(ids: Tensor, keys: Tensor) -> None:
        tokens.modality_ids, tokens.key_mask = ids.to(setup.device), keys.to(setup.device)

    return Subject(_only(module), announce)


def _only(module: nn.Module) -> nn.Module:
    """The wrapped Linear itself, where the module is but a holder of one."""
    for holder in module.modules():
        if isinstance(holder, nn.ModuleDict) and set(holder) == {"proj"}:
            return holder["proj"]
    return module


WRAP: dict[str, Callable[[nn.Module, Setup], Subject]] = {
    "base": _base, "lora": _lora, "moka": _moka, "plain": _plain,
}  # fmt: skip
