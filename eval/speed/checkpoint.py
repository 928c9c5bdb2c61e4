"""What a checkpoint costs, beside transformers.Trainer's default:  python eval/speed/checkpoint.py [--rounds 9] [--json]

The model of configs/quickstart.yaml (or of another configuration), trained weights of one adapter method, AdamW states
after one step; on this machine's disk, one process. In turns, on the same model:

    mokamm     checkpoint.save: adapter, projectors, optimizer, generators; sha256 manifest, fsync, rename, rotation
    trainer    Trainer._save_checkpoint of the same module (LLM with adapter, and projectors), its defaults: the frozen
               weights are written too; no digests, no fsync
    peft       Trainer._save_checkpoint of the PeftModel alone: adapter and its optimizer only, without the projectors

Seconds are medians; bytes are those of one checkpoint. Nothing is downloaded; no GPU is used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.printing import stdout_kept_clean
from mokamm.config import load_config

ROOT = Path(__file__).resolve().parents[2]
Save = Callable[[int], None]  # writes the checkpoint of a step


class Trained(nn.Module):
    """What mokamm hands to an engine, as a plain module: the LLM with its adapter, and the projectors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.llm, self.projectors = model.llm, model.projectors
        self.processor = model.processor

    def forward(self, **batch: Any) -> Any:
        return self.llm(**batch)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
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
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()

    def save(step: int) -> None:
        trainer.state.global_step = step
        trainer._save_checkpoint(model, None)

    return save


def measure(config_path: str, method: str, rounds: int) -> dict[str, dict[str, float]]:
    """{"mokamm" | "trainer" | "peft": {"seconds", "bytes", "seconds_ratio", "bytes_ratio"}}; ratios to mokamm's."""
    from mokamm.build import build_model

    config = load_config(config_path, [f"adapter.method={method}", "data.cache=null"])
    model = Trained(build_model(config, "cpu", for_training=True))
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in ("mokamm", "trainer", "peft")}
        saves = {
            "mokamm": ours(model, config, folders["mokamm"]),
            "trainer": trainers(model, folders["trainer"]),
            "peft": trainers(model.llm, folders["peft"]),
        }
        times: dict[str, list[float]] = {name: [] for name in saves}
        for step in range(rounds + 1):
            for name, save in saves.items():
                began = time.perf_counter()
                save(step + 1)
                if step:  # the first of each also imports and warms up
                    times[name].append(time.perf_counter() - began)
        size = {name: _bytes(folder / f"checkpoint-{rounds + 1}") for name, folder in folders.items()}
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {
            "seconds": round(seconds[name], 4),
            "bytes": size[name],
            "seconds_ratio": round(seconds["mokamm"] / seconds[name], 3),
            "bytes_ratio": round(size["mokamm"] / size[name], 3),
        }
        for name in saves
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--methods", nargs="+", default=["moka", "lora"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with stdout_kept_clean(args.json):
        found = {method: measure(args.config, method, args.rounds) for method in args.methods}
    if args.json:
        print(json.dumps({"rounds": args.rounds, "torch": torch.__version__, "methods": found}))
        return
    for method, rows in found.items():
        for name, row in rows.items():
            beside = f"mokamm / {name}: seconds {row['seconds_ratio']:.2f}, bytes {row['bytes_ratio']:.2f}"
            print(f"{method:>6} {name:>8} {row['seconds']:8.4f} s {row['bytes']:>12,} bytes   {beside}")


if __name__ == "__main__":
    sys.exit(main())
