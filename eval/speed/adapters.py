"""What an adapter costs: frozen base, PEFT's LoRA, MokA and the paper's formula written plainly, in turns, same inputs.

    python eval/speed/adapters.py [--device cpu|cuda] [--parts layer model decode] [--out FILE] [--json]

    layer     one Linear, widths 512 and 1024 (CPU) or 4096 (CUDA), forward + backward, the input's gradient too
    model     the miniature LLM (CPU), or a model of LLaMA-2-7B's shape with random weights in bfloat16 (CUDA; --layers)
    decode    tokens per second after a prompt of 730 tokens: base, MokA with its text path folded in, MokA unfolded, LoRA

Samples of 730 tokens: 320 vision, 320 audio, a question of 40 (subjects.py). Overhead = a method's step less the base's,
in the same round; printed are medians over rounds, and the ratio of overheads to LoRA's and to the plain formula's; and, for
a machine that does other work too, the same ratio between the fastest rounds of each.
Beside the seconds stand figures without noise (counting.py): operators (CUDA: kernels), waits for the device, bytes kept
for backward (less the base's own) and the step's peak bytes. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.speed.counting import operations, peak_bytes, saved_bytes, waits
from eval.speed.reporting import keep, print_tables, surroundings
from eval.speed.subjects import (
    LENGTH,
    METHODS,
    Setup,
    forward_of,
    llama_7b,
    mini_llm,
    new_linear,
    placed_tokens,
    step_of,
    subjects,
)
from eval.speed.timing import in_turns
from mokamm.arguments import at_least_one
from mokamm.quiet import stdout_kept_clean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compare(base: nn.Module, setup: Setup, batch: int, rounds: int, methods: tuple[str, ...]) -> dict[str, Any]:
    """Seconds and counts of every method on one batch."""
    embeds = not isinstance(base, nn.ModuleDict)
    width, out = sizes(base)
    torch.manual_seed(2)
    x = torch.randn(batch, LENGTH, width, device=setup.device, dtype=setup.dtype).requires_grad_()
    gradient = torch.randn(batch, LENGTH, out, device=setup.device, dtype=setup.dtype)
    made = subjects(base, setup, methods)
    for subject in made.values():
        subject.announce(*placed_tokens(batch))
    steps = {name: step_of(subject, setup, x, gradient, embeds) for name, subject in made.items()}
    forwards = {name: forward_of(subject, setup, x, embeds) for name, subject in made.items()}
    seconds = in_turns(steps, rounds)
    row: dict[str, Any] = {"width": width, "batch": batch, **_times(seconds)}
    counted = {} if setup.compile else steps  # within a compiled graph nothing can be counted this way
    row["operations"] = {name: operations(step, setup.device) for name, step in counted.items()}
    row["waits"] = {name: waits(step, setup.device) for name, step in counted.items()}
    if not setup.compile and not setup.checkpointing:
        row["saved_bytes"] = _less_base({name: saved_bytes(forward) for name, forward in forwards.items()})
    row["peak_bytes"] = {name: peak_bytes(step, setup.device) for name, step in steps.items()}
    row["ratios"].update(_byte_ratios(row))
    return row


def sizes(base: Any) -> tuple[int, int]:
    """Widths of the input and of the output."""
    if isinstance(base, nn.ModuleDict):
        return base["proj"].in_features, base["proj"].out_features  # type: ignore[return-value]
    return base.config.hidden_size, base.config.vocab_size


def compare_what_fits(
    base: nn.Module, setup: Setup, batch: int, rounds: int, methods: tuple[str, ...]
) -> dict[str, Any]:
    """As `compare`; where the device's memory does not suffice, without the plain formula, and else a row that says so."""
    try:
        return compare(base, setup, batch, rounds, methods)
    except torch.cuda.OutOfMemoryError:
        pass  # outside of the handler, whose traceback holds the tensors
    torch.cuda.empty_cache()
    if "plain" in methods:
        return compare_what_fits(base, setup, batch, rounds, tuple(m for m in methods if m != "plain"))
    return {"width": sizes(base)[0], "batch": batch, "failed": "out of memory", "ratios": {}}


def _times(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the overhead over the base of the same round with its quartiles; the fastest rounds, which other
    programs disturbed least, and the overhead between these; ratios of overheads by both."""
    base = seconds["base"]
    over = {
        name: [own - other for own, other in zip(times, base, strict=True)]
        for name, times in seconds.items()
        if name != "base"
    }
    overhead = {name: statistics.median(values) for name, values in over.items()}
    fastest = {name: min(seconds[name]) - min(base) for name in over}
    ratios = {}
    for other in ("lora", "plain"):
        if {"moka", other} <= set(over):
            ratios[f"overhead moka/{other}"] = overhead["moka"] / overhead[other]
            ratios[f"fastest overhead moka/{other}"] = fastest["moka"] / fastest[other]
    return {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "overhead": overhead,
        "overhead_quartiles": {name: _quartiles(values) for name, values in over.items()},
        "fastest_seconds": {name: min(times) for name, times in seconds.items()},
        "ratios": ratios,
    }


def _quartiles(values: list[float]) -> list[float]:
    """The lower and the upper one; of one round both are its value."""
    return statistics.quantiles(values, n=4)[::2] if len(values) > 1 else values * 2


def _less_base(values: dict[str, int]) -> dict[str, int]:
    return {name: value - values["base"] for name, value in values.items() if name != "base"}


def _byte_ratios(row: dict[str, Any]) -> dict[str, float]:
    return {
        f"{what} moka/lora": values["moka"] / values["lora"]
        for what, values in row.items()
        if what in ("saved_bytes", "peak_bytes") and {"moka", "lora"} <= set(values) and values["lora"]
    }


@torch.no_grad()
def decode(base: nn.Module, setup: Setup, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of `generate`, one sample, without the prompt's share."""
    made = subjects(base, setup, ("base", "lora", "moka"))
    made["moka unfolded"] = subjects(base, setup, ("moka",))["moka"]
    # folding changes the frozen weights, which all share: the folded model gets its own
    own = subjects(copy.deepcopy(base), setup, ("moka",))["moka"]
    own.module.base_model.fold_text()  # type: ignore[union-attr, operator]
    made["moka"] = own
    x = torch.randn(1, LENGTH, sizes(base)[0], device=setup.device, dtype=setup.dtype)
    mask = torch.ones(1, LENGTH, dtype=torch.int64, device=setup.device)
    for subject in made.values():
        subject.module.eval()
        subject.announce(*placed_tokens(1))

    def answer(module: Any, length: int) -> Any:
        return lambda: module.generate(
            inputs_embeds=x, attention_mask=mask, max_new_tokens=length, min_new_tokens=length, do_sample=False
        )

    turns = {(name, n): answer(subject.module, n) for name, subject in made.items() for n in (1, tokens)}
    seconds = in_turns({f"{name} {n}": turn for (name, n), turn in turns.items()}, rounds)
    speeds = {
        name: statistics.median(
            (tokens - 1) / (long - short)
            for long, short in zip(seconds[f"{name} {tokens}"], seconds[f"{name} 1"], strict=True)
        )
        for name in made
    }
    return {
        "tokens": tokens,
        "tokens_per_second": speeds,
        "ratios": {f"{name}/base": speed / speeds["base"] for name, speed in speeds.items() if name != "base"},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    setup = Setup(
        dropout=args.dropout, device=args.device, dtype=DTYPES[args.dtype], checkpointing=args.checkpointing,
        compile=args.compile, adapter_dtype=DTYPES.get(args.adapter_dtype),
    )  # fmt: skip
    methods = tuple(name for name in METHODS if name in args.methods)
    found: dict[str, Any] = {}
    if "layer" in args.parts:
        one = replace(setup, checkpointing=False)
        found["layer"] = [
            _said(compare_what_fits(new_linear(width, one), one, batch, max(1, args.rounds * 8 // batch), methods))
            for width in args.widths
            for batch in args.batches
        ]
    if {"model", "decode"} & set(args.parts):
        base = llama_7b(setup, args.layers) if args.device == "cuda" else mini_llm(setup)
        if "model" in args.parts:
            found["model"] = [
                _said(compare_what_fits(base, setup, b, args.model_rounds, methods)) for b in args.batches
            ]
        if "decode" in args.parts:
            found["decode"] = _said(decode(base, setup, args.tokens, args.model_rounds))
    return found


def _said(row: dict[str, Any]) -> dict[str, Any]:
    """A sign of life on standard error."""
    print({key: round(value, 3) for key, value in row["ratios"].items()}, file=sys.stderr, flush=True)
    return row


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument(
        "--parts", nargs="+", choices=("layer", "model", "decode"), default=["layer", "model", "decode"]
    )
    parser.add_argument("--adapter-dtype", choices=DTYPES, help="default: as PEFT makes them, float32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="base must be among them")
    parser.add_argument("--widths", nargs="+", type=int, help="default: 512 1024 on the CPU, 4096 on CUDA")
    parser.add_argument("--batches", nargs="+", type=at_least_one, default=[1, 4, 8])
    parser.add_argument("--layers", type=int, default=32, help="of the 7B shape (CUDA)")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, of the model")
    parser.add_argument("--compile", action="store_true", help="torch.compile every subject")
    parser.add_argument(
        "--rounds", type=at_least_one, default=15, help="of one layer at the batch of 8; more at smaller ones"
    )
    parser.add_argument("--model-rounds", type=at_least_one, default=7)
    parser.add_argument("--tokens", type=int, default=64, help="generated, in the part decode")
    parser.add_argument("--threads", type=int, help="default: torch's own number")
    parser.add_argument("--out", type=Path, help="write the results there too")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)
    args.widths = args.widths or ([4096] if args.device == "cuda" else [512, 1024])
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if "base" not in args.methods:
        parser.error("--methods: overheads are measured against base; name it too")
    if args.tokens < 2:
        parser.error("--tokens: the first one's time is the prompt's; expected at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with stdout_kept_clean(args.json):
        found = {**surroundings("adapters.py", args, argv), **measure(args)}
    if not keep(found, args.out, args.json):
        print_tables(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
