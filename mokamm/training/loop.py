"""The steps of a run, from the first (or a checkpoint) to the last.

    for every step:  gather the micro batches of this rank
                     count the answer tokens over all of them and over all ranks (one collective)
                     forward, backward of loss_sum / that number, for each micro batch
                     clip, update at the schedule's rate
    now and then:    log | validate | save

The loss is therefore the exact mean over the step's answer tokens, however they are spread over accumulation and ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.dataset import loaded
from data.schema import IGNORED
from mokamm.config import RunConfig, TrainingConfig
from mokamm.training import checkpoint
from mokamm.training.checkpoint import TrainerState
from mokamm.training.corpus import Corpus, batches
from mokamm.training.engine import Engine, build_engine
from mokamm.training.forecast import Forecast, explained
from mokamm.training.launch import Ranks
from mokamm.training.optimization import parameter_groups, schedule
from mokamm.training.stream import MicroBatches, Plan, ValidationBatches, plan
from mokamm.training.validation import validate
from mokamm.training.watch import Watch, memory_gb
from mokamm.weights import load_weights

Parts = dict[str, list[tuple[str, torch.nn.Parameter]]]


@dataclass
class Window:
    """Sums since the last log line, of this rank."""

    loss: float = 0.0
    answer_tokens: float = 0.0  # of all ranks
    tokens: float = 0.0
    places: float = 0.0  # tokens and padding
    waited: float = 0.0
    began: float = 0.0


@dataclass
class Beginning:
    """Where a run begins: its steps, how far they are done, and the checkpoint that holds them (None: at step 0)."""

    shape: Plan
    state: TrainerState
    folder: Path | None


def begin(config: RunConfig, corpus: Corpus, ranks: Ranks) -> Beginning:
    """Find what to go on from, and move aside what another run left in the folder; on every rank, before any writing.

    Raises UserError where the checkpoint comes from another run than the one configured.
    """
    training, run = config.training, Path(config.training.output_dir)
    shape = plan(
        len(corpus.train), training.per_device_train_batch_size, training.gradient_accumulation_steps, ranks.world,
        training.num_train_epochs, training.max_steps,
    )  # fmt: skip
    folder = shared(lambda: checkpoint.find(run, training.resume_from_checkpoint), ranks)
    same = common(config, shape)
    state = checkpoint.read_state(folder, same) if folder else TrainerState(same=same)
    own = folder is not None and folder.resolve().parent == run.resolve()
    if not own:
        state.best = None  # its checkpoint is not in this folder, where the result is taken from
    if ranks.main:
        checkpoint.set_aside(run, state.step if own else 0)
    ranks.barrier()
    return Beginning(shape, state, folder)


def fit(
    config: RunConfig,
    model: Any,
    parts: Parts,
    corpus: Corpus,
    ranks: Ranks,
    beginning: Beginning,
    stop_after: int | None = None,
    forecast: Forecast | None = None,
) -> Path:
    """Train; returns the checkpoint whose weights are the run's result (the best one, or the last).

    parts: trainable (name, parameter) pairs by part. stop_after: leave after that step, as if interrupted (for tests).
    forecast: compared with the measured peak after the first step.
    """
    training, shape, state = config.training, beginning.shape, beginning.state
    engine = start(training, model, parameter_groups(training, parts), beginning.folder, ranks)
    if training.gradient_checkpointing:
        checkpoint_activations(model.llm)
    loop = Loop(config, model, engine, corpus, ranks, shape, state, forecast)
    try:
        loop.run(stop_after or shape.total_steps)
    finally:
        loop.close()
    best = state.best if training.load_best_model_at_end else None
    return Path(training.output_dir) / f"checkpoint-{int(best['step']) if best else state.step}"


def checkpoint_activations(llm: Any) -> None:
    """Recompute activations in the backward pass. transformers renamed the call within version 5."""
    if hasattr(llm, "activation_checkpointing_enable"):
        llm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def start(
    training: TrainingConfig, model: Any, groups: list[dict[str, Any]], folder: Path | None, ranks: Ranks
) -> Engine:
    """The engine, with the weights, optimizer and generators of a checkpoint where one is to be resumed."""
    if folder is not None:
        load_weights(model, folder, verify=False)  # `find` has read every byte
    engine = build_engine(model, groups, training, ranks)
    if folder is not None:
        checkpoint.restore(folder, engine, ranks)
        if ranks.main:
            print(f"resuming from {folder}", flush=True)
    engine.train(True)
    return engine


def shared(ask: Any, ranks: Ranks) -> Any:
    """Rank 0's answer, on every rank."""
    answer = [ask() if ranks.main else None]
    if ranks.grouped and ranks.world > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    return answer[0]


SAME = (
    "stage", "init_from", "learning_rate", "projector_learning_rate", "lr_scheduler_type", "warmup_ratio",
    "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16",
    "group_by_length", "seed",
)  # fmt: skip


def common(config: RunConfig, shape: Plan) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on from, for its steps to be the same."""
    training = config.training
    return {
        "rows": shape.rows,
        "ranks": shape.world,
        "training.per_device_train_batch_size": shape.batch,
        "training.gradient_accumulation_steps": shape.accumulation,
        "total steps": shape.total_steps,
        **{f"training.{key}": getattr(training, key) for key in SAME},
        "training.deepspeed": Path(training.deepspeed).name if training.deepspeed else None,
        "adapter": config.adapter.model_dump(mode="json", exclude_none=True),
        # pairs, because the order of the modalities counts
        "model.modalities": [[name, entry.model_dump(mode="json")] for name, entry in config.model.modalities.items()],
        "data.max_length": config.data.max_length,
        "data.train": [entry.model_dump(mode="json", exclude={"media_dir"}) for entry in config.data.train],
    }


class Loop:
    """The state of a running loop; `run` is its main path."""

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        engine: Engine,
        corpus: Corpus,
        ranks: Ranks,
        shape: Plan,
        state: TrainerState,
        forecast: Forecast | None = None,
    ) -> None:
        self.forecast = forecast
        self.training: TrainingConfig = config.training
        self.model, self.engine, self.corpus = model, engine, corpus
        self.ranks, self.plan, self.state = ranks, shape, state
        self.folder = Path(self.training.output_dir)
        self.factor = schedule(self.training, shape.total_steps)
        self.watch = Watch(self.folder, shape.total_steps, state.step, self.training.report_to) if ranks.main else None
        self.window = Window()

    def run(self, until: int) -> None:
        micro_batches = iter(self._training_batches())
        self.window = Window(began=time.monotonic())
        while self.state.step < until:
            gathered = self._gather(micro_batches)
            norm = self._step(gathered)
            step = self.state.step
            if self.watch:
                self.watch.advance(step)
                if self.forecast and step == self.watch.first + 1:
                    print(self.forecast.compared(gathered), flush=True)
            if step % self.training.logging_steps == 0 or step == self.plan.total_steps:
                self._log(norm)
            paused = time.monotonic()
            improved = self._due(self.training.eval_steps) and self._validate()
            if improved or self._due(self.training.save_steps):
                checkpoint.save(
                    self.folder, self.state, self.model, self.engine, self.ranks, self.training.save_total_limit
                )
            self.window.began += time.monotonic() - paused

    def close(self) -> None:
        if self.watch:
            self.watch.close()

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _training_batches(self) -> Iterator[Any]:
        training, length = self.training, self.corpus.train.length
        rows = MicroBatches(
            self.plan, training.seed, self.ranks.rank, self.state.step, length if training.group_by_length else None
        )
        return loaded(batches(self.corpus.train, rows, self.corpus.pad_id, self.training.dataloader_num_workers))

    def _gather(self, micro_batches: Iterator[Any]) -> list[Any]:
        began = time.monotonic()
        gathered = [next(micro_batches) for _ in range(self.plan.accumulation)]
        self.window.waited += time.monotonic() - began
        return gathered

    def _step(self, micro_batches: list[Any]) -> float:
        """One optimizer step; returns the gradient norm."""
        window, factor = self.window, self.factor(self.state.step)
        answers = float(sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in micro_batches))
        (total,) = self.ranks.sum([answers])
        losses = []
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            loss_sum = self.engine(batch, last)["loss_sum"]
            self.engine.backward(loss_sum / max(total, 1.0), last)
            losses.append(loss_sum.detach())
            window.tokens += int(batch["attention_mask"].sum())
            window.places += batch["attention_mask"].numel()
        norm = self.engine.step(factor)
        window.loss += float(torch.stack(losses).double().sum())
        window.answer_tokens += total
        self.state.step += 1
        return norm

    # ---- now and then ------------------------------------------------------------------------------------------------

    def _due(self, every: int | None) -> bool:
        step = self.state.step
        return step == self.plan.total_steps or (step % every == 0 if every else self.plan.ends_epoch(step))

    def _log(self, norm: float) -> None:
        w, step = self.window, self.state.step
        seconds = max(time.monotonic() - w.began, 1e-9)
        loss, tokens, places, waited = self.ranks.sum([w.loss, w.tokens, w.places, w.waited / self.ranks.world])
        factor = self.factor(step - 1)
        if self.watch:
            self.watch.record(
                "train",
                {
                    "step": step,
                    "epoch": round(self.plan.epoch(step), 4),
                    "loss": loss / max(w.answer_tokens, 1.0),
                    "learning_rate": {part: rate * factor for part, rate in self._base_rates().items()},
                    "grad_norm": norm,
                    "tokens_per_second": round(tokens / seconds, 1),
                    "padding_share": round(1 - tokens / places, 4),
                    "data_wait_share": round(waited / seconds, 4),
                    "memory_gb": round(memory_gb(), 3),
                    "seconds": round(seconds, 3),
                },
            )
        self.window = Window(began=time.monotonic())

    def _base_rates(self) -> dict[str, float]:
        return {group["part"]: group["base_lr"] for group in self.engine.groups()}

    def _validate(self) -> bool:
        """Validate and log; whether the checkpoint of this step is the best so far and is to be kept."""
        if self.corpus.validation is None:
            return False
        rows = ValidationBatches(
            len(self.corpus.validation), self.training.eval_batch_size, self.ranks.rank, self.ranks.world
        )
        loader = batches(self.corpus.validation, rows, self.corpus.pad_id, self.training.dataloader_num_workers)
        with explained(self.forecast, validating=True):
            found = validate(self.engine, loaded(loader), rows, self.ranks)
        if self.watch:
            self.watch.record(
                "validation", {"step": self.state.step, "epoch": round(self.plan.epoch(self.state.step), 4), **found}
            )
        if not better(found, self.state.best, self.training.metric_for_best_model):
            return False
        self.state.best = {"step": self.state.step, "loss": found["loss"], "accuracy": found["accuracy"]}
        return self.training.load_best_model_at_end


def better(found: dict[str, float], best: dict[str, float] | None, metric: str) -> bool:
    """By the chosen metric; between equals the other one decides."""

    def key(values: dict[str, float]) -> tuple[float, float]:
        accuracy, loss = values["accuracy"], -values["loss"]
        return (accuracy, loss) if metric == "accuracy" else (loss, accuracy)

    return best is None or key(found) > key(best)
