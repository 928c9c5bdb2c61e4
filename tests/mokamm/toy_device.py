"""A device that computes nothing, to see without a GPU what a GPU would refuse:  python toy_device.py MEDIA BASE

Tensors on it have shapes and dtypes alone (torch's FakeTensor). An operator that gets tensors of two devices, and whatever
waits for a value (`.item()`, an index that is a mask), raises. Tensors on the CPU are computed as ever. Prints a JSON
object: case -> "" or what was raised. In a process of its own, since torch has one such device for good.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = "pretended"
METHODS = ("moka", "multi_lora", "lora", "dora", "hira", "lori_d", "lori_moka_d", "full")


class Backend(_DummyBackendModule):
    """What gradient checkpointing asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass

    def device(self, index: Any) -> AbstractContextManager[None]:
        return nullcontext()


class Pretended(TorchDispatchMode):
    """Inside, operators whose tensors, or whose result, lie on DEVICE are not computed."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        if any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == DEVICE) for x in given):
            with self.fake:
                return func(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def moved(module: Any, dtype: torch.dtype | None = None) -> Any:
    """The module with all parameters and buffers on DEVICE. dtype: of parameters that are floating point."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=dtype or old.dtype, device=DEVICE)
                part._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        for name, old in part._buffers.items():
            if old is not None:
                part._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=DEVICE)
    return module


def layers(method: str, dtype: torch.dtype, checkpointing: bool) -> None:
    """A small LLM under a method: forward and backward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mokamm.adapters import set_routing, wrap
    from mokamm.routing import Routing
    from mokamm.training.loop import checkpoint_activations

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=20, **shape))
    options = {"r": 4, "lora_dropout": 0.0 if method == "full" else 0.1}
    model = moved(wrap(llm, method, ["text", "vision", "audio"], options), dtype).train()
    if checkpointing:
        checkpoint_activations(model)
    ids = torch.tensor([[0, 1, 1, 2, 2, 0, 0, 0], [0, 0, 1, 1, 0, 0, -1, -1]])
    keys = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    set_routing(model, Routing(ids, keys).to(DEVICE))
    x = torch.empty(2, 8, 32, dtype=dtype, device=DEVICE, requires_grad=True)
    model(inputs_embeds=x).logits.float().sum().backward()
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "embed_tokens" not in name]
    assert all(p.grad is not None for p in trained)


def whole(media: Path, base: Path, packed: bool) -> None:
    """The miniature base with open_clip, BEATs and Whisper: rows with and without media to the loss and its gradients."""
    from data.collate import collate
    from data.schema import Media, Message, Sample, Text
    from mokamm.build import build_model
    from mokamm.config import load_config
    from mokamm.training.packing import share_rows

    root = Path(__file__).resolve().parents[2]
    overrides = [f"model.llm.path={base}/llm", f"data.media_dir={media}"]
    config = load_config(root / "configs/quickstart.yaml", overrides)
    for name, place in (("vision", "vision"), ("audio", "audio.safetensors"), ("speech", "speech")):
        config.model.modalities[name].encoder.path = str(base / place)
    config.training.init_from = config.data.cache = None  # to keep features, one has to wait for them
    model = build_model(config, torch.device("cpu"), for_training=True).train()
    rows = (
        [
            Media("video", "clip.mp4", "vision"),
            Media("audio", "long.wav", "audio"),
            Media("audio", "short.wav", "speech"),
        ],
        [Media("image", "wide.png", "vision"), Media("image", "picture.png", "vision")],
        [],
    )
    question = Text("What is this?", question=True)
    samples = [Sample("s", (Message("user", (*m, question)), Message("assistant", (Text("two"),)))) for m in rows]
    examples = [model.processor(sample) for sample in samples]
    batch = (share_rows if packed else collate)(examples, model.processor.pad_id)
    for module in (model, *model.perception.encoders.values()):
        moved(module)
    model(batch, answers_only=True)["loss_sum"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def waits() -> None:
    torch.ones(3, device=DEVICE).sum().item()


def mixes() -> None:
    torch.ones(3, device=DEVICE) + torch.arange(3)


def cases(media: Path, base: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "waits", waits
    yield "mixes", mixes
    for method in METHODS:
        for dtype in (torch.float32, torch.bfloat16):
            for checkpointing in (False, True):
                name = f"{method} {str(dtype)[6:]}{' checkpointing' * checkpointing}"
                yield name, lambda m=method, d=dtype, c=checkpointing: layers(m, d, c)  # type: ignore[misc]
    yield "whole", lambda: whole(media, base, packed=False)
    yield "packed", lambda: whole(media, base, packed=True)


def main() -> None:
    _setup_privateuseone_for_python_backend(DEVICE, backend_module=Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE) is a copy from the CPU
    found = {}
    for name, case in cases(*map(Path, sys.argv[1:])):
        try:
            with Pretended():
                case()
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
