"""Fine-tune, evaluate, report:  deepspeed mokamm/train.py CONFIG [dotted.key=value ...] [--json]

    config --> (miniature world) --> model --> corpus --> steps --> final/ --> evaluation --> report/

Also starts as `python`, `torchrun` or `accelerate launch`. `--json` leaves one JSON object on standard output and all else
on standard error (the `deepspeed` launcher's own lines stand on standard output, around it).
Exit codes: 0 done; 2 a mistake in the configuration or the data, or a step that cannot be used, told in one message; 75
another rank went away, the same command goes on; 130 or 143 stopped by Ctrl-C or SIGTERM, with everything saved (1 from
launchers that were signalled themselves); others are bugs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mokamm.arguments import add_config_arguments
from mokamm.config import ConfigError, RunConfig, load_config
from mokamm.mistakes import is_users
from mokamm.quiet import outlive_readers, quiet, stdout_kept_clean
from mokamm.training.launch import leave, rank_here
from mokamm.training.stopping import BadStep, Stopped, command_to_go_on

if TYPE_CHECKING:
    from mokamm.training.launch import Ranks
    from mokamm.training.stream import Plan


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mokamm/train.py",
        description="Fine-tune a multimodal LLM as a YAML file says; evaluate and report at the end.",
        epilog="example: deepspeed mokamm/train.py configs/quickstart.yaml training.seed=1 data.max_length=512",
    )
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="at the end, one JSON object on standard output")
    # the deepspeed launcher adds it
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    with stdout_kept_clean(args.json):
        folder = _run_as_told(args)
    if args.json and rank_here() == 0:
        from mokamm.training.finish import outcome

        print(json.dumps(outcome(folder)), flush=True)


def _run_as_told(args: argparse.Namespace) -> Path:
    """The run's folder, once all is done; whatever ends it earlier ends the process with its exit code."""
    config: RunConfig | None = None
    try:
        config = load_config(args.config, args.overrides)
        config.check_files()
        run(config)
        return Path(config.training.output_dir)
    except (Stopped, KeyboardInterrupt) as stopped:  # Ctrl-C before the steps or after them: there is nothing to save
        auto = config is not None and config.training.resume_from_checkpoint == "auto"
        if rank_here() == 0:
            again = command_to_go_on(args.config, args.overrides, auto)
            print(f"{str(stopped) or 'stopped'}; to go on:\n  {again}", flush=True)
        code = getattr(stopped, "code", 128 + signal.SIGINT)
        leave(code)
        sys.exit(code)
    except Exception as error:
        if not is_users(error):
            raise
        auto = config.training.resume_from_checkpoint == "auto" if config else True
        _tell(error, "" if auto else "\nnote: the same command goes on with training.resume_from_checkpoint=auto")
        sys.stdout.flush()
        code = getattr(error, "exit_code", 2)
        if _in_group():
            os._exit(code)  # peers may wait in a collective: do not wait for them
        sys.exit(code)


def run(config: RunConfig, finishing: bool = True) -> None:
    """The whole of it; on every rank. finishing: evaluate and report, too."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked
    from mokamm.build import check_parts
    from mokamm.training import finish, launch, peers, watch, world
    from mokamm.training.disk import writing

    quiet()
    watch.check_report_to(config.training.report_to)
    check_parts(config)
    ranks = launch.start(config.training)
    folder = Path(config.training.output_dir)
    if ranks.main:
        with writing(folder, "choose another training.output_dir"):
            folder.mkdir(parents=True, exist_ok=True)
        if config.data.world:
            world.make_world(config.data.world)
    ranks.barrier()
    launch.check_shared(folder, ranks)
    config.check_files(world_is_made=True)  # a wrong name of a file in it is found before training
    try:
        with peers.told(ranks, lambda said: peers.message(ranks, config.training, said)):
            train(config, folder, ranks)
    except Stopped:
        launch.stop(ranks)  # all ranks raise it
        raise
    launch.stop(ranks)
    if ranks.main and finishing:
        launch.free_memory()  # the evaluation is a process of its own, on the same GPU (ZeRO-3 keeps its share: engine.py)
        with writing(folder, f"{folder / 'final'} is whole: make room, then start the same command again"):
            finish.finish(config, folder)


def train(config: RunConfig, folder: Path, ranks: Ranks) -> None:
    """Build, fit, write final/; a LoRI-S without a mask first trains its LoRI-D in the same way and cuts one."""
    from data.dataset import lost_workers_told
    from mokamm.build import build_model, trainable_parts
    from mokamm.training import checkpoint, finish, launch, rate, two_phase
    from mokamm.training.corpus import build_corpus
    from mokamm.training.disk import writing
    from mokamm.training.engine import shards_weights
    from mokamm.training.forecast import Forecast, explained
    from mokamm.training.loop import fit
    from mokamm.training.optimization import moving
    from mokamm.training.resume import begin

    if two_phase.needs_mask(config):
        two_phase.calibrate(config, folder, ranks, train)
    with explained(None):
        model = build_model(config, ranks.device, for_training=True, placed=not shards_weights(config.training))
    parts = trainable_parts(model)
    corpus = build_corpus(config, model.processor)
    chosen = rate.resolve(config, model.llm.config, len(corpus.train), ranks.world)
    parts = moving(config.training, parts)
    beginning = begin(config, corpus, ranks)
    model.processor.renderer.day = config.model.llm.chat_date
    forecast = Forecast.of(model, config, ranks)
    if ranks.main:
        with writing(folder, "make room or mend the disk, then start the same command again"):
            two_phase.record(config, folder)
            finish.dump_config(config, folder, model)
        lines = [
            _summary(config, parts, corpus, beginning.plan, ranks),
            *([chosen] if chosen else []),
            forecast.table(),
        ]
        print(*lines, sep="\n", flush=True)
    launch.seed_everything(config.training.seed + ranks.rank)  # the same weights on every rank, dropout of its own
    with explained(forecast), lost_workers_told():
        best = fit(config, model, parts, corpus, ranks, beginning, forecast=forecast)
    if ranks.main:
        checkpoint.write_final(folder, best)
        print(f"{folder / 'final'} holds the weights of {best.name}", flush=True)
    ranks.barrier()


def _summary(config: RunConfig, parts: dict, corpus: tuple, plan: Plan, ranks: Ranks) -> str:
    from mokamm.training.finish import parameters_by_part

    trained = ", ".join(f"{part} {count:,}" for part, count in parameters_by_part(parts).items())
    validation = f", {len(corpus[1])} for validation" if corpus[1] is not None else ""
    often = "; more than there are, so that some stand in a step twice" if plan.rows_per_step > plan.rows else ""
    how = Path(config.training.deepspeed).stem if config.training.deepspeed else "plain PyTorch"
    return (
        f"{config.adapter.method if config.training.stage == 2 else 'stage 1'} on {config.model.llm.path} ({how}, "
        f"{ranks.world} process{'es' if ranks.world > 1 else ''}, {ranks.device.type})\n"
        f"  trained parameters: {trained}\n  samples: {len(corpus[0])}{validation}\n"
        f"  steps: {plan.total_steps}, {plan.epoch(plan.total_steps):.2f} epochs, of {plan.rows_per_step} samples{often}\n"
        f"  run folder: {config.training.output_dir}"
    )


def _tell(error: Exception, note: str = "") -> None:
    """note: for an error that speaks of the same command."""
    rank = rank_here()
    if rank and isinstance(error, ConfigError | BadStep):
        # rank 0 has mostly found the same, and its launcher stops all; another host may have mistakes of its own
        time.sleep(3)
        if isinstance(error, BadStep):
            return
    note = note if "same command" in str(error) else ""
    print(f"error{f' (rank {rank})' if rank else ''}: {error}{note}", file=sys.stderr, flush=True)


def _in_group() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized())


if __name__ == "__main__":
    outlive_readers()
    main()
    leave()
