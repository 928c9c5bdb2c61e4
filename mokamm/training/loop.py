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

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from data.dataset import loaded
from data.schema import IGNORED
from mokamm.config import RunConfig, SourceConfig, TrainingConfig, find_path
from mokamm.training import checkpoint
from mokamm.training.bad_steps import BadSteps, marked
from mokamm.training.checkpoint import TrainerState
from mokamm.training.corpus import Corpus, batches
from mokamm.training.disk import hold
from mokamm.training.engine import Engine, build_engine
from mokamm.training.forecast import Forecast, explained
from mokamm.training.launch import Ranks
from mokamm.training.optimization import parameter_groups, schedule
from mokamm.training.stopping import SignalWatch, Stopped, agreed
from mokamm.training.stream import MicroBatches, Plan, ValidationBatches, plan
from mokamm.training.validation import validate
from mokamm.training.watch import Watch, memory_gb
from mokamm.weights import fingerprint, load_weights, sha256

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
    norm: float = 0.0  # of the last update's gradient

    def saved(self, now: float) -> dict[str, float]:
        """For a checkpoint between two log lines: `began` as the seconds until `now` (time.monotonic)."""
        return {**asdict(self), "began": now - self.began}

    @classmethod
    def restored(cls, values: dict[str, float]) -> Window:
        """From what `saved` gave; empty: a new window."""
        return cls(**{**values, "began": time.monotonic() - values.get("began", 0.0)})


@dataclass
class Beginning:
    """Where a run begins: its steps, how far they are done, and the checkpoint that holds them (None: at step 0)."""

    shape: Plan
    state: TrainerState
    folder: Path | None
    lock: IO[str] | None  # held by rank 0 as long as this lives


def begin(config: RunConfig, corpus: Corpus, ranks: Ranks) -> Beginning:
    """Find what to go on from, and move aside what another run left in the folder; on every rank, before any writing.

    Raises UserError where the checkpoint comes from another run than the one configured.
    """
    training, run = config.training, Path(config.training.output_dir)
    shape = plan(
        len(corpus.train), training.per_device_train_batch_size, training.gradient_accumulation_steps, ranks.world,
        training.num_train_epochs, training.max_steps,
    )  # fmt: skip
    lock = hold(run) if ranks.main else None
    if ranks.main:
        checkpoint.sweep(run)
    folder = shared(lambda: checkpoint.find(run, training.resume_from_checkpoint), ranks)
    same = {**common(config, shape), "device": ranks.device.type}
    state = checkpoint.read_state(folder, same) if folder else TrainerState(same=same)
    own = folder is not None and folder.resolve().parent == run.resolve()
    if not own:
        state.best = None  # its checkpoint is not in this folder, where the result is taken from
    if training.load_best_model_at_end and shared(lambda: checkpoint.best_is_lost(run, state), ranks):
        state.best = None
    if ranks.main:
        checkpoint.set_aside(run, state.step if own else 0)
    ranks.barrier()
    return Beginning(shape, state, folder, lock)


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
    training, shape, state = config.training, beginning.shape, beginning.state
    engine, window = start(training, model, parameter_groups(training, parts), beginning.folder, ranks)
    if training.gradient_checkpointing:
        checkpoint_activations(model.llm)
    with SignalWatch(tell=ranks.main) as signals:
        loop = Loop(config, model, engine, corpus, ranks, shape, state, window, signals, forecast)
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
    engine.train(True)
    return engine, window


def shared(ask: Any, ranks: Ranks) -> Any:
    """Rank 0's answer, on every rank."""
    answer = [ask() if ranks.main else None]
    if ranks.grouped and ranks.world > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    return answer[0]


SAME = (
    "stage", "init_from", "learning_rate", "projector_learning_rate", "lr_scheduler_type", "warmup_ratio",
    "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16",
    "group_by_length", "metric_for_best_model", "seed",
)  # fmt: skip


def common(config: RunConfig, shape: Plan) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on from, for its steps to be the same.

    The base goes by its weights, wherever they lie; annotation files and the DeepSpeed JSON by name and content. What is
    not named here leaves the steps as they are: how often to log, validate and save, workers, caches, reports.
    """
    training, llm = config.training, config.model.llm
    base = find_path(llm.path)
    deepspeed = find_path(training.deepspeed) if training.deepspeed else None
    return {
        "rows": shape.rows,
        "ranks": shape.world,
        "training.per_device_train_batch_size": shape.batch,
        "training.gradient_accumulation_steps": shape.accumulation,
        "total steps": shape.total_steps,
        **{f"training.{key}": getattr(training, key) for key in SAME},
        "training.deepspeed": deepspeed.name if deepspeed else None,
        "the DeepSpeed JSON": json.loads(deepspeed.read_text()) if deepspeed else None,
        "model.llm": llm.model_dump(mode="json", exclude={"path", "trust_remote_code"}),
        "the base's weights": fingerprint(base) if base.is_dir() else llm.path,
        "adapter": config.adapter.model_dump(mode="json", exclude_none=True),
        # pairs, because the order of the modalities counts
        "model.modalities": [[name, entry.model_dump(mode="json")] for name, entry in config.model.modalities.items()],
        "data.max_length": config.data.max_length,
        "data.limits": config.data.limits.model_dump(mode="json"),
        "data.allow_outside": config.data.allow_outside,
        **{f"data.{split}": _described(entries) for split, entries in _sources(config)},
        **{f"the files of data.{split}": _digests(config, entries) for split, entries in _sources(config)},
    }


def _sources(config: RunConfig) -> list[tuple[str, list[SourceConfig]]]:
    return [("train", config.data.train), ("validation", config.data.validation)]


def _described(entries: list[SourceConfig]) -> list[dict[str, Any]]:
    return [entry.model_dump(mode="json", exclude={"media_dir"}) for entry in entries]


def _digests(config: RunConfig, entries: list[SourceConfig]) -> list[str | None]:
    paths = [config.locate(entry)[0] for entry in entries]
    return [sha256(path) if path.is_file() else None for path in paths]


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
        window: dict[str, float],
        signals: SignalWatch,
        forecast: Forecast | None = None,
    ) -> None:
        self.forecast = forecast
        self.training: TrainingConfig = config.training
        self.model, self.engine, self.corpus = model, engine, corpus
        self.ranks, self.plan, self.state = ranks, shape, state
        self.folder = Path(self.training.output_dir)
        self.factor = schedule(self.training, shape.total_steps)
        self.watch = Watch(self.folder, shape.total_steps, state.step, self.training.report_to) if ranks.main else None
        self.window, self.began_with = Window(), window
        self.signals, self.bad_steps = signals, BadSteps(self.training, state, ranks)
        self.saved = -1  # the last step that was saved

    def run(self, until: int) -> None:
        self.window = Window.restored(self.began_with)
        if self.state.unvalidated:
            paused = time.monotonic()
            self._validate()
            self._save(paused)
            self.window.began += time.monotonic() - paused
        micro_batches = iter(self._training_batches())
        while self.state.step < until:
            gathered = self._gather(micro_batches)
            self._step(gathered)
            step = self.state.step
            if self.watch:
                self.watch.advance(step)
                if self.forecast and step == self.watch.first + 1:
                    print(self.forecast.compared(gathered), flush=True)
            if step % self.training.logging_steps == 0 or step == self.plan.total_steps:
                self._log()
            paused = time.monotonic()
            improved = self._due(self.training.eval_steps) and self._validate()
            if improved or self._due(self.training.save_steps):
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
        return loaded(batches(self.corpus.train, rows, self.corpus.pad_id, self.training.dataloader_num_workers))

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
            loss_sum = self.engine(batch, last)["loss_sum"]
            losses.append(loss_sum.detach())
            usable = not last or self.bad_steps.usable(losses, total)
            self.engine.backward(marked(loss_sum / max(total, 1.0), usable), last)
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

    def _due(self, every: int | None) -> bool:
        step = self.state.step
        return step == self.plan.total_steps or (step % every == 0 if every else self.plan.ends_epoch(step))

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
