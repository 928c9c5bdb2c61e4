"""What a configuration will train, and what to set: mokamm advise CONFIG [dotted.key=value ...] [--json]

    config --> outline (LLM on the meta device) --> rate | parameters | targets | steps | rank | batch | memory | compute
                                   annotation files --tokenizer--> answer tokens --^

After "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025), with the reason beside each advice, and beside
each figure what it leaves out. No weight of the LLM is read and no medium opened: a folder with config.json and a
tokenizer is enough. Cost: seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from mokamm.arguments import above_zero, add_config_arguments, at_least_one
from mokamm.config import RunConfig, load_config
from mokamm.mistakes import tell
from mokamm.names import WITHOUT_ADAPTERS
from mokamm.quiet import quiet

if TYPE_CHECKING:
    from mokamm.information import Answers
    from mokamm.outline import Outline
    from mokamm.training.launch import Ranks

ROWS = 32  # of a step, in the papers of MokA and LoRI


class Advice(NamedTuple):
    """One subject: its name in the JSON object, lines for people, and the figures in them."""

    name: str
    lines: list[str]
    facts: dict[str, Any]


class Case(NamedTuple):
    """All that the advice is about."""

    config: RunConfig
    outline: Outline
    answers: Answers
    ranks: Ranks
    gpu_gb: float | None
    nats: float
    steps: int | None  # None: the rows are not known

    @property
    def method(self) -> str:
        return self.config.method

    def trained(self) -> dict[str, int]:
        """Trained elements by part."""
        from mokamm.build import trainable_parts
        from mokamm.training.finish import parameters_by_part

        return parameters_by_part(trainable_parts(self.outline))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mokamm advise",
        description="Learning rate, rank, targets, batch, steps and memory of a configuration, and why.",
        epilog="example: mokamm advise configs/text/instruct.yaml adapter.r=64 --ranks 8 --gpu-gb 80",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--ranks", type=at_least_one, metavar="N", help="processes of the run (default: one for each GPU here)"
    )
    parser.add_argument(
        "--gpu-gb", type=above_zero, metavar="GB", help="of a GPU that the run will have; default: this machine"
    )
    parser.add_argument("--nats", type=above_zero, metavar="X", help="information of an answer token (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_intermixed_args(argv)


# ---- the subjects ----------------------------------------------------------------------------------------------------


def advise_rate(case: Case) -> Advice:
    from mokamm.training.rate import recommend, shape_of

    written = case.config.training.learning_rate
    if case.method == "none":
        line = f"{written} as configured: only projectors train, which the formula says nothing about (the paper: 1e-4)"
        return Advice("learning_rate", [line], {"configured": written, "recommended": None})
    model_type, hidden = shape_of(case.outline.llm.config)
    rate = recommend(model_type, hidden, case.config.adapter, 1000 if case.steps is None else case.steps)
    lines = [f"{rate.value:.3g} = {rate.formula}; {_beside(written, rate.value)}"]
    if case.method != "full":
        lines.append(
            "why: LoRA's best rate is about ten times that of full fine-tuning, whatever the rank (15 times under 100 steps"
            + (", which are not known here)" if case.steps is None else ")")
        )
    lines += [f"not calibrated: {note}" for note in rate.notes]
    if "projector" in case.trained() and case.config.training.projector_learning_rate is None:
        lines.append(
            "the projectors train at the same rate, which the formula was not made for: "
            "training.projector_learning_rate sets theirs (the paper: 1e-4)"
        )
    facts = {"recommended": rate.value, "configured": written, "formula": rate.formula, "notes": list(rate.notes)}
    return Advice("learning_rate", lines, facts)


def _beside(written: float | str, value: float) -> str:
    if written == "auto":
        return "training.learning_rate=auto will use it"
    assert isinstance(written, float)
    if 0.99 < written / value < 1.01:
        return "as configured"
    more, word = (written / value, "above") if written > value else (value / written, "below")
    return f"training.learning_rate is {written:.3g}, {more:.1f} times {word} it"


def advise_parameters(case: Case) -> Advice:
    from mokamm.adapters.peft_bridge import adapter_parameters

    trained, llm = case.trained(), case.outline.llm
    own = {id(parameter) for parameter in adapter_parameters(llm)}
    whole = sum(parameter.numel() for parameter in llm.parameters() if id(parameter) not in own)
    lines = [f"{part} {count:,} ({count / whole:.3%} of the LLM's {whole:,})" for part, count in trained.items()]
    lines += [f"not counted: {name}: {why}" for name, why in case.outline.left_out.items()]
    return Advice(
        "parameters", lines or ["none"], {"trained": trained, "llm": whole, "left_out": case.outline.left_out}
    )


def advise_targets(case: Case) -> Advice:
    from mokamm.adapters import fused_experts, target_report
    from mokamm.adapters.targets import ends_in, short_name

    if case.method in WITHOUT_ADAPTERS:
        everything = case.method == "full"
        lines = ["the whole LLM" if everything else "nothing of the LLM: stage 1, or method none"]
        return Advice("targets", lines, {"adapted": {}, "attention_only": False})
    adapted, missed = _linear_layers(case.outline.llm)
    lines = [", ".join(f"{name} {count}" for name, count in target_report(case.outline.llm).items())]
    targets = case.config.adapter.target_parameters or []
    left = [name for name in fused_experts(case.outline.llm) if not any(ends_in(name, t) for t in targets)]
    missed |= dict.fromkeys(sorted(map(short_name, left)), False)
    attention_only = all(adapted.values()) and not all(missed.values())
    if attention_only:
        lines.append(
            f"warning: attention alone; left out: {', '.join(missed)}. Attention alone learns less than all layers with as "
            "many parameters: MLP and experts matter most"
        )
    elif missed:
        lines.append(f"left out: {', '.join(missed)}; all layers is best")
    else:
        lines.append("all layers: the best choice")
    facts = {"adapted": target_report(case.outline.llm), "missed": sorted(missed), "attention_only": attention_only}
    return Advice("targets", lines, facts)


def _linear_layers(llm: Any) -> tuple[dict[str, bool], dict[str, bool]]:
    """Last names of the adapted and of the other linear layers (without the head), and whether they are attention's."""
    from mokamm.adapters.targets import linear_names, tuner_layers, unfit_modules

    adapted: dict[str, bool] = {}
    missed: dict[str, bool] = {}
    modules, head = dict(llm.named_modules()), llm.get_output_embeddings()
    unfit, wrapped = unfit_modules(llm), tuner_layers(llm)
    for name in linear_names(llm):
        if modules[name] is head or name in unfit:
            continue
        where = adapted if name in wrapped else missed
        where[name.rpartition(".")[2]] = "attn" in name or "attention" in name
    return adapted, missed


def advise_rank(case: Case) -> Advice:
    from mokamm.information import BITS_PER_PARAMETER, rank_for

    answers, rank, adapter = case.answers, case.config.adapter.r, case.trained().get("adapter")
    facts: dict[str, Any] = {"configured": rank, "answer_tokens": answers.tokens, "rows": answers.rows}
    if adapter is None:
        return Advice("rank", ["no adapter"], facts)
    capacity = BITS_PER_PARAMETER * adapter
    lines = [f"r {rank} can hold about {_bits(capacity)} ({adapter:,} parameters of 2 bits)"]
    facts["capacity_bits"] = capacity
    if answers.tokens is None:
        why = "see steps" if answers.problems else case.outline.no_rows
        return Advice("rank", [*lines, f"the answers were not counted: {why}"], facts)
    bits = answers.bits(case.nats)
    needed = rank_for(bits, adapter, rank)
    how = "all counted" if answers.exact else f"extrapolated from {answers.read:,} rows"
    lines.append(
        f"the answers hold at most {_bits(bits)}: {answers.tokens:,.0f} tokens of {answers.distinct:,} rows ({how}), "
        f"{case.nats:g} nat each, an assumption (--nats; the loss of a run's first epoch is the figure)"
    )
    if needed > rank:
        lines.append(
            f"too small: adapter.r={1 << (needed - 1).bit_length()} can hold them; below it LoRA learns more slowly than "
            "full fine-tuning"
        )
    else:
        lines.append(
            f"enough: r {needed} could hold them. A larger rank costs memory and little else; rate and quality hardly "
            "depend on it while the data fit"
        )
    if answers.bad:
        lines.append(f"{answers.bad} of the rows read cannot be used")
    return Advice("rank", lines, {**facts, "information_bits": bits, "needed": needed, "exact": answers.exact})


def advise_batch(case: Case) -> Advice:
    training = case.config.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * case.ranks.world
    product = f"{training.per_device_train_batch_size} x {training.gradient_accumulation_steps} accumulated"
    lines = [f"{rows} rows a step ({product} x {case.ranks.world} processes)"]
    if case.method not in WITHOUT_ADAPTERS:
        verdict = f"{ROWS} (the papers of MokA and LoRI) would be safer" if rows > ROWS else "this one is small"
        lines.append(f"large batches hurt LoRA more than full fine-tuning, whatever the rank: {verdict}")
    return Advice("batch", lines, {"rows_per_step": rows, "large": rows > ROWS})


def advise_steps(case: Case) -> Advice:
    from mokamm.training.optimization import warmup_steps

    training = case.config.training
    if case.steps is None:
        lines = ["not known, since not all rows are here", *case.answers.problems]
        return Advice("steps", lines, {"total": None, "warmup": None})
    warmup = warmup_steps(training, case.steps)
    lines = [
        f"{case.steps:,} ({case.answers.rows:,} rows an epoch), {warmup} of them warm-up, then {training.lr_scheduler_type}"
    ]
    if not warmup:
        lines.append("the first step runs at the full rate; training.warmup_ratio=0.03 (MokA's paper) is gentler")
    return Advice("steps", lines, {"total": case.steps, "warmup": warmup})


def advise_memory(case: Case) -> Advice:
    from mokamm.adapters import fused_experts
    from mokamm.training.forecast import Forecast

    capacity = None if case.gpu_gb is None else case.gpu_gb * 2**30
    forecast = Forecast.of(case.outline, case.config, case.ranks, capacity)
    lines = forecast.table().splitlines()
    chosen = forecast.stages()[forecast.setting.stage]
    if forecast.network is None:
        return Advice("memory", lines, {"bytes": {}, "chosen": chosen, "capacity": forecast.capacity})
    if case.ranks.device.type == "cpu":
        lines.append("for a run on a CPU, without Python and its libraries (about 1 GB); --gpu-gb 80 asks for a GPU")
    if fused_experts(case.outline.llm):
        lines.append("rough in activations: the formulas are those of dense LLMs, this one has experts")
    lines += [f"not in it: {name}: {why}" for name, why in case.outline.left_out.items()]
    found = {stage: forecast.memory(stage=stage) for stage in forecast.stages()}
    stages = {name: {**asdict(found[s]), "total": found[s].total} for s, name in forecast.stages().items()}
    return Advice("memory", lines, {"bytes": stages, "chosen": chosen, "capacity": forecast.capacity})


def advise_compute(case: Case) -> Advice:
    """Of a step's matrix products: 2 N forward, 2 N for the inputs' gradients, and 2 N for the weights' if they train."""
    from torch.nn import Linear

    from mokamm.adapters import fused_experts
    from mokamm.adapters.peft_bridge import adapter_parameters

    if case.method in WITHOUT_ADAPTERS:
        return Advice("compute", ["not compared: no adapter"], {"share_of_full": None})
    llm, adapter = case.outline.llm, case.trained()["adapter"]
    added, fused = list(adapter_parameters(llm)), set(fused_experts(llm))
    own, frozen = {id(parameter) for parameter in added}, sum(p.numel() for p in added if not p.requires_grad)
    linear = {id(module.weight) for module in llm.modules() if isinstance(module, Linear)}
    base = sum(
        parameter.numel()
        for name, parameter in llm.named_parameters()
        if (id(parameter) in linear or name.replace(".base_layer", "") in fused) and id(parameter) not in own
    )
    again = 2 if case.config.training.gradient_checkpointing else 0
    share = ((4 + again) * (base + frozen) + (6 + again) * adapter) / ((6 + again) * base)
    line = f"{share:.3f} of full fine-tuning's: the frozen weights need no gradient of their own"
    if again:
        line += " (2/3 and a little without gradient_checkpointing, which repeats the forward pass in both)"
    return Advice("compute", [line], {"share_of_full": share})


SUBJECTS = (
    advise_rate,
    advise_parameters,
    advise_targets,
    advise_steps,
    advise_rank,
    advise_batch,
    advise_memory,
    advise_compute,
)


def _bits(count: float) -> str:
    for unit, size in (("Gbit", 1e9), ("Mbit", 1e6), ("kbit", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bit"


# ---- the command -----------------------------------------------------------------------------------------------------


def collect(args: argparse.Namespace) -> Case:
    """Everything that is read. Raises UserError, EncoderError or AdapterError."""
    import torch

    from mokamm.information import NATS_PER_TOKEN, count_answers
    from mokamm.outline import build_outline
    from mokamm.training.launch import Ranks
    from mokamm.training.stream import plan_of

    config = load_config(args.config, args.overrides)
    quiet(errors_alone=True)
    outline = build_outline(config)
    answers = count_answers(config, outline.processor)
    gpus = 0 if config.training.use_cpu else torch.cuda.device_count()
    device = "cuda" if (args.gpu_gb or gpus) and not config.training.use_cpu else "cpu"
    world = args.ranks or max(1, gpus)
    ranks = Ranks(0, 0, world, torch.device(device), grouped=False)
    known = answers.rows or config.training.max_steps > 0
    steps = plan_of(config.training, answers.rows or 1, world).total_steps if known else None
    return Case(config, outline, answers, ranks, args.gpu_gb, args.nats or NATS_PER_TOKEN, steps)


def show(case: Case, advice: list[Advice], path: str) -> None:
    print(f"{path}: {case.method} on {case.config.model.llm.path}\n")
    for name, lines, _ in advice:
        for i, line in enumerate(lines):
            head = f"{name.replace('_', ' ') if i == 0 else '':15}"
            wrap = textwrap.wrap(line, 104) if name != "memory" else [line]
            print(head + wrap[0], *(" " * 17 + rest for rest in wrap[1:]), sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        case = collect(args)
        advice = [subject(case) for subject in SUBJECTS]
    except Exception as error:
        sys.exit(tell(error))
    if args.json:
        print(json.dumps({"config": args.config, "method": case.method} | {a.name: a.facts for a in advice}))
    else:
        show(case, advice, args.config)


if __name__ == "__main__":
    main()
