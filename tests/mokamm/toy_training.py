"""A small model under the engine's contract, and runs of it: imported by tests, and started by the deepspeed launcher.

deepspeed --num_gpus 2 tests/mokamm/toy_training.py FOLDER zero2 zero3     full, interrupted and resumed run of each
"""

from __future__ import annotations

import gc
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.dataset import MultimodalDataset
from data.ledger import Ledger
from data.schema import IGNORED, Example, Message, Sample, Text
from mokamm.adapters import Routing, set_routing
from mokamm.config import RunConfig
from mokamm.training import launch
from mokamm.training.corpus import Corpus, HeldOut
from mokamm.training.loop import fit
from mokamm.training.resume import begin
from mokamm.training.watch import read_metrics

VOCABULARY = 48
FROM_STEP_ONE = {"lr_scheduler_type": "constant", "warmup_steps": 0}  # every step changes the weights
ROOT = Path(__file__).resolve().parents[2]


class ToyLM(nn.Module):
    """A random Llama with an adapter, and one projector whose output is added at the first position, `vision`.

    draws: the projector's output is weighted by numbers drawn from all three generators, as methods that draw would.
    """

    def __init__(self, method: str, dropout: float, draws: bool = False) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        from mokamm.adapters import wrap

        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **shape))
        self.projectors = nn.ModuleDict({"vision": nn.Sequential(nn.Linear(VOCABULARY, 32), nn.Linear(32, 32))})
        self.llm = wrap(llm, method, ["text", "vision"], {"r": 4, "lora_alpha": 16, "lora_dropout": dropout})
        self.processor = None
        self.draws = draws

    def forward(self, batch: Any, answers_only: bool = False) -> dict[str, torch.Tensor]:
        ids = batch["input_ids"]
        embeddings = self.llm.get_input_embeddings()(ids)
        seen = nn.functional.one_hot(ids[:, 0], VOCABULARY).to(embeddings.dtype)
        media = self.projectors["vision"](seen)
        if self.draws and self.training:
            media = media * (random.random() + float(np.random.rand()) + torch.rand(()))
        embeddings = torch.cat([embeddings[:, :1] + media[:, None], embeddings[:, 1:]], 1)
        modality_ids = batch["attention_mask"].long() - 1
        modality_ids[:, 0] = 1
        set_routing(self.llm, Routing(modality_ids, (modality_ids == 0) & (batch["labels"] == IGNORED)))
        logits = self.llm(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], use_cache=False).logits
        targets = batch["labels"][:, 1:].flatten()
        rows = logits[:, :-1].flatten(0, 1)
        loss_sum = nn.functional.cross_entropy(rows, targets, ignore_index=IGNORED, reduction="sum")
        kept = rows[targets != IGNORED] if answers_only else logits
        return {"logits": kept, "loss_sum": loss_sum, "tokens": (targets != IGNORED).sum()}


def build(method: str = "lora", dropout: float = 0.0, seed: int = 0, draws: bool = False) -> ToyLM:
    launch.seed_everything(seed)
    return ToyLM(method, dropout, draws).train()


def parts_of(model: ToyLM) -> dict[str, list[tuple[str, nn.Parameter]]]:
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {"projector": [], "adapter": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts["projector" if name.startswith("projectors.") else "adapter"].append((name, parameter))
    return parts


def encode(sample: Sample) -> Example:
    prompt, answer = ([ord(c) % VOCABULARY for c in text] for text in (sample.messages[0].text, sample.answer))
    ids = torch.tensor(prompt + answer)
    labels = torch.where(torch.arange(len(ids)) < len(prompt), IGNORED, ids)
    return Example(ids, labels, torch.zeros_like(ids), torch.zeros_like(ids).bool(), [], sample)


def samples(number: int) -> list[Sample]:
    """Questions whose answers have 1 to 41 tokens."""
    made = []
    for i in range(number):
        question = "".join(chr(65 + (i * 7 + k * k) % 23) for k in range(2 + i % 4))
        answer = "".join(chr(65 + (i + k) % 23) for k in range(1 + (i * i * 5) % 41))
        made.append(Sample(str(i), (Message("user", (Text(question),)), Message("assistant", (Text(answer),)))))
    return made


def corpus(folder: Path, rows: int = 22, validation: int = 5) -> Corpus:
    ledger = Ledger(folder / "bad_samples.jsonl", 0.05, rows + validation)
    train = MultimodalDataset([(samples(rows), 1.0, "train")], encode, ledger)
    held_out = HeldOut([(samples(rows + validation)[rows:], 1.0, "validation")], encode, ledger)
    return Corpus(train, held_out, 0, ledger)


def config(folder: Path, adapter: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    settings = {
        "output_dir": str(folder), "learning_rate": 1e-2, "projector_learning_rate": 1e-3, "max_steps": 8,
        "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": [],
        "dataloader_num_workers": 0, "eval_steps": 4, "save_steps": 4, "warmup_steps": 2, "use_cpu": True,
    }  # fmt: skip
    return RunConfig.model_validate(
        {
            "model": {"llm": {"path": "toy"}},
            "adapter": adapter or {},
            "data": {"train": [{"source": "messages", "path": "toy.jsonl"}]},
            "training": {**settings, **training},
        }
    )


def run(
    folder: Path,
    ranks: launch.Ranks,
    dropout: float = 0.0,
    method: str = "lora",
    stop_after: int | None = None,
    draws: bool = False,
    adapter: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **training: Any,
) -> tuple[ToyLM, Path]:
    """Build and train; the model afterwards, and the checkpoint that is the result. adapter: options of the loop."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(folder, adapter, **training)
    model = build(method, dropout, settings.training.seed, draws).to(dtype)
    launch.seed_everything(settings.training.seed + ranks.rank)
    found = corpus(folder)
    best = fit(settings, model, parts_of(model), found, ranks, begin(settings, found, ranks), stop_after)
    return model, best


def alone() -> launch.Ranks:
    return launch.Ranks(0, 0, 1, torch.device("cpu"), grouped=False)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]


def main(folder: Path, stages: list[str]) -> None:
    """Every stage: a whole run without dropout (to compare with one rank), one with, one interrupted and resumed."""
    first = {"deepspeed": str(ROOT / f"configs/deepspeed/{stages[0]}.json"), "use_cpu": True, "output_dir": str(folder)}
    ranks = launch.start(config(folder, **first).training)
    for stage in stages:
        path = str(ROOT / f"configs/deepspeed/{stage}.json")
        again = partial(run, ranks=ranks, deepspeed=path, per_device_train_batch_size=2 // ranks.world, **FROM_STEP_ONE)
        again(folder / stage / "exact", max_steps=5)
        again(folder / stage / "coto", max_steps=5, adapter={"coto": {"p0": 0.2}}, gradient_checkpointing=True)
        again(folder / stage / "whole", dropout=0.2, max_steps=5, eval_steps=3)
        again(folder / stage / "halved", dropout=0.2, max_steps=5, eval_steps=3, stop_after=4)
        again(folder / stage / "halved", dropout=0.2, max_steps=5, eval_steps=3)
        launch.free_memory()
        alive = sum(isinstance(thing, ToyLM) for thing in gc.get_objects())
        if ranks.main:
            found = {name: losses(folder / stage / name) for name in ("exact", "coto", "whole", "halved")}
            (folder / f"{stage}.json").write_text(json.dumps({"ranks": ranks.world, "alive": alive, **found}))
    launch.stop(ranks)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(Path(arguments[0]), arguments[1:])
    launch.leave()
