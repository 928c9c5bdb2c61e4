"""What CoTo saves of a whole run's time:  python eval/speed/coto.py [--device cpu] [--rounds 3] [--json] [--out FILE]

Training steps (forward, backward, AdamW) of an LLM with random weights on the same inputs, which require a gradient, so
that the frozen LLM alone has a backward pass too. In turns within one process: the frozen LLM, and per method the adapter
whole and under CoTo. A run has STEPS steps and is gone through `rounds` times; its time is the sum over its steps of the
median time of all those in which as many blocks act. On a CPU with one thread (OMP_NUM_THREADS=1) the process's own CPU
time counts, so that other programs do not. Two LLMs: the miniature one (5 layers of width 192), a wider one (4 of 512).

    saved              1 - with CoTo / without              beside what the source reports for LLaMA-2-7B on a GPU
    overhead_saved     the same, of what the adapter adds to the frozen LLM
    skipped            share of blocks that sat out: 37.5 % in a long run; at least one block acts in every step
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.speed.reporting import keep, surroundings
from eval.speed.timing import in_turns
from mokamm.adapters import Coto, Routing, set_routing, wrap
from mokamm.adapters.coto import rising
from mokamm.arguments import at_least_one
from mokamm.quiet import stdout_kept_clean

STEPS = 16
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "dora": ("dora", {}),
    "moka": ("moka", {}),
    "hira, PEFT's two matmuls": ("hira", {"one_matmul": False}),
    "hira, one matmul": ("hira", {}),
}
REPORTED = {"lora": 0.072, "dora": 0.237, "hira, PEFT's two matmuls": 0.242}  # arXiv 2506.05713
MODALITIES = ["text", "vision", "audio"]


def miniature() -> nn.Module:
    from mokamm.mini.architecture import VOCABULARY, new_llm

    return new_llm(VOCABULARY)


def wide() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        )
    )  # fmt: skip


LLMS: dict[str, Callable[[], nn.Module]] = {"miniature": miniature, "wide": wide}


def routing(batch: int, length: int, device: str) -> Routing:
    """Media in the proportions of the paper's batches: 320 + 320 of 730 tokens, and a question of 40."""
    media, question = length * 320 // 730, max(1, length * 40 // 730)
    ids = torch.zeros(batch, length, dtype=torch.long)
    ids[:, :media], ids[:, media : 2 * media] = 1, 2
    keys = torch.zeros(batch, length, dtype=torch.bool)
    keys[:, 2 * media : 2 * media + question] = True
    return Routing(ids, keys).to(torch.device(device))


def step_of(llm: nn.Module, inputs: Tensor, coto: Coto | None = None) -> Callable[[], None]:
    """One training step at each call; under CoTo the steps of a run one after the other, and again from the first."""
    trained = [p for p in llm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    coto = coto or Coto(llm, None)
    steps = count(-1)  # the first call warms up

    def step() -> None:
        with coto.step(next(steps) % STEPS):
            logits = llm(inputs_embeds=inputs.detach().requires_grad_(), use_cache=False).logits
            coto.attached(logits.float().square().mean()).backward()
            if optimizer:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return step


def measure(build: Callable[[], nn.Module], args: argparse.Namespace) -> dict[str, Any]:
    """Rows by method, and the frozen LLM's seconds a step."""
    steps: dict[str, Callable[[], None]] = {}
    cotos: dict[str, Coto] = {}
    inputs = torch.empty(0)
    for name, (method, options) in {"frozen": ("none", {}), **METHODS}.items():
        torch.manual_seed(0)
        llm = wrap(build(), method, MODALITIES, {"r": args.rank, "lora_alpha": 16, **options}).to(args.device).train()
        width = llm.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        inputs = torch.randn(args.batch, args.length, width, device=args.device)
        set_routing(llm, routing(args.batch, args.length, args.device))
        steps[name] = step_of(llm, inputs)
        if method != "none":
            cotos[name] = Coto(llm, partial(rising, total_steps=STEPS), seed=0)
            steps[f"{name} + coto"] = step_of(llm, inputs, cotos[name])
    own_time = args.device == "cpu" and torch.get_num_threads() == 1
    seconds = in_turns(steps, STEPS * args.rounds, time.process_time if own_time else time.perf_counter)
    return {name: _row(name, seconds, cotos[name]) for name in METHODS}


def _row(name: str, seconds: dict[str, list[float]], coto: Coto) -> dict[str, Any]:
    acting = [sum(coto.active(t)) for t in range(STEPS)]
    skipped = 1 - sum(acting) / (STEPS * len(coto.blocks))
    frozen, whole = statistics.median(seconds["frozen"]), statistics.median(seconds[name])
    under = _run(seconds[f"{name} + coto"], acting)
    return {
        "seconds_frozen": round(frozen, 5),
        "seconds": round(whole, 5),
        "seconds_with_coto": round(under, 5),
        "overhead": round(whole / frozen - 1, 4),
        "skipped": round(skipped, 4),
        "overhead_saved": round((whole - under) / (whole - frozen), 4),
        "saved": round(1 - under / whole, 4),
        "reported": REPORTED.get(name),
    }


def _run(seconds: list[float], acting: list[int]) -> float:
    """Mean seconds a step of a run; steps in which equally many blocks act cost the same, and are taken together."""
    by_number = {n: [s for t, s in enumerate(seconds) if acting[t % STEPS] == n] for n in set(acting)}
    return sum(statistics.median(by_number[n]) for n in acting) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--llms", nargs="+", choices=LLMS, default=list(LLMS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    with stdout_kept_clean(args.json):
        found: dict[str, Any] = {
            **surroundings("coto.py", args),
            "steps": STEPS,
            "llms": {name: measure(LLMS[name], args) for name in args.llms},
        }
    if keep(found, args.out, args.json):
        return
    for name, result in found["llms"].items():
        for method, row in result.items():
            reported = f" (source: {row['reported']:.1%})" if row["reported"] else ""
            print(
                f"{name}, {method}: {row['seconds'] * 1000:.1f} ms a step, overhead {row['overhead']:.0%}; CoTo skips "
                f"{row['skipped']:.1%} and saves {row['overhead_saved']:.0%} of the overhead, {row['saved']:.1%} of the "
                f"time{reported}"
            )


if __name__ == "__main__":
    main()
