"""What LoRI trains and stores, beside LoRA:  python eval/speed/lori.py [--rank 32] [--sparsity 0.9] [--json] [--out FILE]

An LLM of Llama-3-8B's proportions (an eighth as wide, a few layers) with random weights takes one step of AdamW under each
method. Counted are trained parameters, bytes of their gradients and of AdamW's states (scalars left out), and bytes of the
adapter's folder. LoRI-S keeps the largest entries of a random B. Nothing depends on the machine or its speed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from eval.speed.reporting import keep, surroundings
from mokamm.adapters import wrap
from mokamm.adapters.masks import keep_top
from mokamm.adapters.start import factors
from mokamm.quiet import stdout_kept_clean

METHODS = ("lora", "lori_d", "lori_s")


def measure(rank: int, sparsity: float, layers: int) -> dict[str, dict[str, int]]:
    """trained, gradient_and_optimizer_bytes and file_bytes by method."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=512, intermediate_size=1792, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=1,
    )  # fmt: skip
    return {
        method: _measured(wrap(LlamaForCausalLM(config), method, ["text"], {"r": rank}), sparsity) for method in METHODS
    }


def _measured(model: Any, sparsity: float) -> dict[str, int]:
    if hasattr(model.base_model, "set_mask"):
        pairs: dict[str, Any] = factors(model)
        shapes = {name: B.size for name, (_, B) in pairs.items()}
        model.base_model.set_mask(keep_top(shapes, lambda name: torch.randn(shapes[name]), sparsity))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    states = [tensor for entry in optimizer.state.values() for tensor in entry.values() if tensor.numel() > 1]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {
        "trained": sum(parameter.numel() for parameter in trained),
        "gradient_and_optimizer_bytes": sum(
            t.numel() * t.element_size() for t in [*states, *(p.grad for p in trained)]
        ),
        "file_bytes": files,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    with stdout_kept_clean(args.json):
        torch.manual_seed(0)
        sizes = measure(args.rank, args.sparsity, args.layers)
    ratios = {m: {key: round(size / sizes["lora"][key], 4) for key, size in row.items()} for m, row in sizes.items()}
    found = {**surroundings("lori.py", args), "sizes": sizes, "of_lora": ratios}
    if keep(found, args.out, args.json):
        return
    for method, row in sizes.items():
        print(f"{method}: " + ", ".join(f"{key} {size:,} ({ratios[method][key]:.1%})" for key, size in row.items()))


if __name__ == "__main__":
    main()
