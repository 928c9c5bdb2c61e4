"""What a checkpoint costs, beside transformers.Trainer's default:  python eval/speed/checkpoint.py [--rounds 9] [--json]

The model of configs/quickstart.yaml (or of another configuration), trained weights of one adapter method, AdamW states
after one step; on this machine's disk, one process. In turns:

    whole      the LLM with its adapter, and the projectors. The Trainer takes it for a plain module and writes the frozen
               weights too
    adapter    the LLM with its adapter alone, a PeftModel, of which the Trainer writes the adapter only

    mokamm     checkpoint.save: weights, optimizer, generators, state; sha256 manifest, fsync, rename, rotation
    trainer    Trainer._save_checkpoint with its defaults: the same things; no digests, no fsync, no rename

Seconds are medians, ratios are mokamm's over the Trainer's; bytes are those of one checkpoint. Nothing is downloaded, no
GPU is used. The result is also written to eval/speed/results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.speed.reporting import RESULTS, keep, surroundings
from eval.speed.timing import in_turns
from mokamm.arguments import at_least_one
from mokamm.config import find_path, load_config
from mokamm.quiet import stdout_kept_clean

Save = Callable[[int], None]  # writes the checkpoint of a step


class Trained(nn.Module):
    """What mokamm hands to an engine, as a plain module: the LLM with its adapter, and the projectors (or none)."""

    def __init__(self, model: Any, projectors: nn.ModuleDict) -> None:
        super().__init__()
        self.llm, self.projectors, self.processor = model.llm, projectors, model.processor

    def forward(self, **batch: Any) -> Any:
        return self.llm(**batch)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Tied weights once: the Trainer writes this as it is, and safetensors refuses the same tensor twice."""
        once = {tensor.data_ptr(): name for name, tensor in super().state_dict(*args, **options).items()}
        state = super().state_dict(*args, **options)
        return {name: tensor for name, tensor in state.items() if once[tensor.data_ptr()] == name}


def fill_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)


def ours(model: Trained, config: Any, folder: Path) -> Save:
    from mokamm.build import trainable_parts
    from mokamm.training import checkpoint
    from mokamm.training.engine import build_engine
    from mokamm.training.launch import Ranks
    from mokamm.training.optimization import parameter_groups

    ranks = Ranks(0, 0, 1, torch.device("cpu"), grouped=False)
    training = config.training.model_copy(update={"deepspeed": None})
    engine = build_engine(model, parameter_groups(training, trainable_parts(model)), training, ranks)  # type: ignore[arg-type]
    fill_gradients(model)
    engine.step(1.0)

    def save(step: int) -> None:
        checkpoint.save(folder, checkpoint.TrainerState(step=step), model, engine, ranks, keep=1)

    return save


def trainers(model: nn.Module, folder: Path) -> Save:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], save_total_limit=1, disable_tqdm=True)
    trainer = Trainer(model=model, args=arguments)
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    fill_gradients(model)
    assert trainer.optimizer is not None
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()

    def save(step: int) -> None:
        trainer.state.global_step = step
        trainer._save_checkpoint(model, None)

    return save


def measure(config_path: str, method: str, rounds: int) -> dict[str, dict[str, float]]:
    """{"whole" | "adapter": {"seconds", "bytes", "trainer_seconds", "trainer_bytes", "seconds_ratio", "bytes_ratio"}}"""
    from mokamm.build import build_model

    config = load_config(find_path(config_path), [f"adapter.method={method}", "data.cache=null"])
    model = build_model(config, "cpu", for_training=True)
    whole, alone = Trained(model, model.projectors), Trained(model, nn.ModuleDict())
    with tempfile.TemporaryDirectory() as place:
        names = [(what, who) for what in ("whole", "adapter") for who in ("mokamm", "trainer")]
        folders = {name: Path(place) / "-".join(name) for name in names}
        saves = {
            ("whole", "mokamm"): ours(whole, config, folders["whole", "mokamm"]),
            ("whole", "trainer"): trainers(whole, folders["whole", "trainer"]),
            ("adapter", "mokamm"): ours(alone, config, folders["adapter", "mokamm"]),
            ("adapter", "trainer"): trainers(alone.llm, folders["adapter", "trainer"]),
        }
        steps = {name: count(1) for name in saves}  # a checkpoint of its own each time
        calls = {name: partial(_next, save, steps[name]) for name, save in saves.items()}
        seconds = {name: statistics.median(times) for name, times in in_turns(calls, rounds).items()}
        size = {name: _bytes(folder / f"checkpoint-{rounds + 1}") for name, folder in folders.items()}
    return {what: _beside(what, seconds, size) for what in ("whole", "adapter")}


def _next(save: Save, steps: Iterator[int]) -> None:
    save(next(steps))


def _beside(what: str, seconds: dict[tuple[str, str], float], size: dict[tuple[str, str], int]) -> dict[str, float]:
    ours, theirs = (what, "mokamm"), (what, "trainer")
    return {
        "seconds": round(seconds[ours], 4),
        "trainer_seconds": round(seconds[theirs], 4),
        "seconds_ratio": round(seconds[ours] / seconds[theirs], 3),
        "bytes": size[ours],
        "trainer_bytes": size[theirs],
        "bytes_ratio": round(size[ours] / size[theirs], 3),
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("--methods", nargs="+", default=["moka", "lora"])
    parser.add_argument("--rounds", type=at_least_one, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with stdout_kept_clean(args.json):
        methods = {method: measure(args.config, method, args.rounds) for method in args.methods}
        found = {**surroundings("checkpoint.py", args), "methods": methods}
    if keep(found, RESULTS / "checkpoint.json", args.json):
        return
    for method, rows in methods.items():
        for what, row in rows.items():
            print(
                f"{method:>6} {what:>8}   mokamm {row['seconds']:.4f} s {row['bytes']:>11,} bytes   "
                f"trainer {row['trainer_seconds']:.4f} s {row['trainer_bytes']:>11,} bytes   "
                f"ratio: {row['seconds_ratio']:.2f} of the seconds, {row['bytes_ratio']:.2f} of the bytes"
            )


if __name__ == "__main__":
    main()
