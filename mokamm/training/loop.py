"""The steps of a run, from the first (or a checkpoint) to the last.

    for every step:  gather the micro batches of this rank
                     count the answer tokens over all of them and over all ranks (one collective); leave if a rank
                     has been signalled (stopping.py)
                     forward, backward of loss_sum / that number, for each micro batch
                     clip, update at the schedule's rate; no update where the loss cannot be used (bad_steps.py)
    now and then:    log | validate | save

The loss is therefore the exact mean over the step's answer tokens, however they are spread over accumulation and ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.dataset import loaded
from data.schema import IGNORED
from mokamm.adapters import Coto
from mokamm.config import RunConfig
from mokamm.config_sections import TrainingConfig
from mokamm.training import checkpoint
from mokamm.training.bad_steps import BadSteps, marked
from mokamm.training.checkpoint import TrainerState
from mokamm.training.corpus import Corpus, batches
from mokamm.training.engine import Engine, build_engine
from mokamm.training.forecast import Forecast, explained
from mokamm.training.launch import Ranks
from mokamm.training.optimization import Parts, in_steps, parameter_groups, schedule
from mokamm.training.packing import check_apart, joining
from mokamm.training.resume import Beginning
from mokamm.training.stopping import SignalWatch, Stopped, agreed
from mokamm.training.stream import MicroBatches, Plan, ValidationBatches
from mokamm.training.validation import validate
from mokamm.training.watch import Watch, memory_gb
from mokamm.weights import load_weights


@dataclass
class Window:
    """Sums since the last log line, of this rank."""

    loss: float = 0.0
    answer_tokens: float = 0.0  # of all ranks
    tokens: float = 0.0
    places: float = 0.0  # tokens and padding
    waited: float = 0.0
    began: float = 0.0
    norm: float = 0.0  # of the last update's gradient

    def saved(self, now: float) -> dict[str, float]:
        """For a checkpoint between two log lines: `began` as the seconds until `now` (time.monotonic)."""
        return {**asdict(self), "began": now - self.began}

    @classmethod
    def restored(cls, values: dict[str, float]) -> Window:
        """From what `saved` gave; empty: a new window."""
        return cls(**{**values, "began": time.monotonic() - values.get("began", 0.0)})


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
    Raises Stopped, with everything saved, where a rank was signalled; BadStep where training.on_nan says so.
    """
    training, plan, state = config.training, beginning.plan, beginning.state
    engine, window = start(training, model, parameter_groups(training, parts), beginning.folder, ranks)
    if training.gradient_checkpointing:
        checkpoint_activations(model.llm)
    with SignalWatch(tell=ranks.main) as signals:
        loop = Loop(config, model, engine, corpus, ranks, plan, state, window, signals, forecast)
        try:
            loop.run(stop_after or plan.total_steps)
        finally:
            loop.close()
    engine.close()
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
) -> tuple[Engine, dict[str, float]]:
    """The engine, with the weights, optimizer and generators of a checkpoint where one is to be resumed; its window."""
    window: dict[str, float] = {}
    if folder is not None:
        load_weights(model, folder, verify=False)  # `find` has read every byte
    engine = build_engine(model, groups, training, ranks)
    if folder is not None:
        window = checkpoint.restore(folder, engine, ranks)
        if ranks.main:
            print(f"resuming from {folder}", flush=True)
    if training.packing:
        check_apart(engine, model)
    engine.train(True)
    return engine, window


class Loop:
    """The state of a running loop; `run` is its main path."""

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        engine: Engine,
        corpus: Corpus,
        ranks: Ranks,
        plan: Plan,
        state: TrainerState,
        window: dict[str, float],
        signals: SignalWatch,
        forecast: Forecast | None = None,
    ) -> None:
        self.forecast = forecast
        self.training: TrainingConfig = config.training
        self.model, self.engine, self.corpus = model, engine, corpus
        self.ranks, self.plan, self.state = ranks, plan, state
        self.folder = Path(self.training.output_dir)
        self.join = joining(config)
        self.factor = schedule(self.training, plan.total_steps)
        adapter = config.adapter.model_dump() if self.training.stage == 2 else {}
        self.coto = Coto.of(model.llm, adapter, plan.total_steps, self.training.seed)
        self.watch = Watch(self.folder, plan.total_steps, state.step, self.training.report_to) if ranks.main else None
        self.window = Window.restored(window)
        self.signals, self.bad_steps = signals, BadSteps(self.training, state, ranks)
        self.saved = -1  # the last step that was saved

    def run(self, until: int) -> None:
        if self.state.unvalidated:
            paused = time.monotonic()
            self._validate()
            self._save(paused)
            self.window.began += time.monotonic() - paused
        micro_batches, training = iter(self._training_batches()), self.training
        while self.state.step < until:
            gathered = self._gather(micro_batches)
            with self.coto.step(self.state.step):
                self._step(gathered)
            step = self.state.step
            if self.watch:
                self.watch.advance(step)
                if self.forecast and step == self.watch.first + 1:
                    print(self.forecast.compared(gathered), flush=True)
            if self._due(None, training.logging_steps) or (step == 1 and training.logging_first_step):
                self._log()
            paused = time.monotonic()
            improved = self._due(training.eval_strategy, training.eval_steps) and self._validate()
            if improved or self._due(training.save_strategy, training.save_steps) or step == self.plan.total_steps:
                self._save(paused)
            self.window.began += time.monotonic() - paused
        self._heed(self.ranks.sum(self.signals.votes()))  # one that came in the last step

    def close(self) -> None:
        if self.watch:
            self.watch.close()

    def _save(self, paused: float) -> None:
        """paused: since when the training stands still; that time is not the window's."""
        if self.watch:
            self.watch.sync()
        window = self.window.saved(paused)
        keep = None if self.state.bad_in_a_row else self.training.save_total_limit  # older weights may be the good ones
        checkpoint.save(self.folder, self.state, self.model, self.engine, self.ranks, keep, window)
        self.saved = self.state.step

    def _heed(self, votes: list[float]) -> None:
        """Save and raise Stopped where a rank was signalled. votes: summed over all ranks."""
        number = agreed(votes)
        if number is None:
            return
        if self.saved != self.state.step or self.state.unvalidated:
            self._save(time.monotonic())
        raise Stopped(number, self.state.step, self.folder / f"checkpoint-{self.state.step}")

    def _heed_validating(self) -> None:
        votes = self.ranks.sum(self.signals.votes())
        self.state.unvalidated = any(votes)
        self._heed(votes)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _training_batches(self) -> Iterator[Any]:
        training, length = self.training, self.corpus.train.length
        rows = MicroBatches(
            self.plan, training.seed, self.ranks.rank, self.state.step, length if training.group_by_length else None
        )
        workers = training.dataloader_num_workers
        return loaded(batches(self.corpus.train, rows, self.corpus.pad_id, workers, self.join))

    def _gather(self, micro_batches: Iterator[Any]) -> list[Any]:
        began = time.monotonic()
        gathered = [next(micro_batches) for _ in range(self.plan.accumulation)]
        self.window.waited += time.monotonic() - began
        return gathered

    def _step(self, micro_batches: list[Any]) -> None:
        """One optimizer step."""
        window, factor = self.window, self.factor(self.state.step)
        answers = float(sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in micro_batches))
        total, *votes = self.ranks.sum([answers, *self.signals.votes()])
        self._heed(votes)
        losses: list[torch.Tensor] = []
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            loss_sum = self.engine(batch, last, answers_only=True)["loss_sum"]
            losses.append(loss_sum.detach())
            usable = not last or self.bad_steps.usable(losses, total)
            with self.engine.gather(self.coto.idle):  # their gradients must find them whole
                self.engine.backward(self.coto.attached(marked(loss_sum / max(total, 1.0), usable)), last)
            window.tokens += int(batch["attention_mask"].sum())
            window.places += batch["attention_mask"].numel()
        norm = self.engine.step(factor)
        self.state.step += 1
        if not math.isfinite(norm):
            self._without_update(micro_batches, losses)
            return
        self.bad_steps.passed()
        window.loss += float(torch.stack(losses).double().sum())
        window.answer_tokens += total
        window.norm = norm

    def _without_update(self, micro_batches: list[Any], losses: list[torch.Tensor]) -> None:
        """Tell of a step that the engine left out; BadStep where the run may not go on."""
        step = self.state.step
        head = {"step": step, "epoch": round(self.plan.epoch(step), 4)}
        record = {**head, **self.bad_steps.record(micro_batches, losses)}
        if self.watch:
            self.watch.record("bad_step", record)
        self.bad_steps.check(record)

    # ---- now and then ------------------------------------------------------------------------------------------------

    def _due(self, strategy: str | None, every: float | None) -> bool:
        """Whether it is time for what is done `every` so many steps (None: epochs), and at the end; by `no` it never is."""
        step, total = self.state.step, self.plan.total_steps
        if strategy in ("no", "best"):
            return False
        return step == total or (step % in_steps(every, total) == 0 if every else self.plan.ends_epoch(step))

    def _log(self) -> None:
        w, step = self.window, self.state.step
        if not w.answer_tokens:
            return  # no update since the last line
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
                    "grad_norm": w.norm,
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
        self.state.unvalidated = False
        if self.corpus.validation is None:
            return False
        rows = ValidationBatches(
            len(self.corpus.validation), self.training.eval_batch_size, self.ranks.rank, self.ranks.world
        )
        loader = batches(self.corpus.validation, rows, self.corpus.pad_id, self.training.dataloader_num_workers)
        with explained(self.forecast, validating=True):
            found = validate(self.engine, loaded(loader), rows, self.ranks, self._heed_validating)
        if self.watch:
            self.watch.record(
                "validation", {"step": self.state.step, "epoch": round(self.plan.epoch(self.state.step), 4), **found}
            )
        if not better(found, self.state.best, self.training.metric_for_best_model):
            return False
        self.state.best = {"step": self.state.step, "loss": found["loss"], "accuracy": found["accuracy"]}
        return self.training.load_best_model_at_end


def better(found: dict[str, float], best: dict[str, float] | None, metric: str) -> bool:
    """By the chosen metric; between equals the other one decides. A loss that is not a number is the worst."""

    def key(values: dict[str, float]) -> tuple[float, float]:
        accuracy, loss = values["accuracy"], -math.inf if math.isnan(values["loss"]) else -values["loss"]
        return (accuracy, loss) if metric == "accuracy" else (loss, accuracy)

    return best is None or key(found) > key(best)
