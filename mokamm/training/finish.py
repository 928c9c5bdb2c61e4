"""What a finished run leaves: final/, the evaluation's predictions, report/, a model card, a command to talk to it.

Cost: the evaluation, in a process of its own; the rest takes seconds.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from data.schema import MEDIA, UserError
from mokamm.config import ROOT, RunConfig, find_path, load_run_config
from mokamm.machine import installed
from mokamm.training.disk import replacing
from mokamm.training.launch import run_program
from mokamm.weights import ADAPTER, fingerprint

LIBRARIES = (
    "mokamm", "torch", "transformers", "peft", "accelerate", "deepspeed", "open_clip_torch", "av", "safetensors"
)  # fmt: skip


def versions(config: RunConfig, model: Any) -> dict[str, Any]:
    """For the run's config.yaml: libraries, machine, which base exactly the adapter belongs to, what was trained."""
    import torch

    from mokamm.build import trainable_parts

    found: dict[str, Any] = {"python": platform.python_version(), **installed(LIBRARIES)}
    found["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores"
    llm = config.model.llm
    base = {"llm": llm.path, "revision": llm.revision, "commit": getattr(model.base_llm.config, "_commit_hash", None)}
    if find_path(llm.path).is_dir():
        base["fingerprint"] = fingerprint(find_path(llm.path))
    found["base"] = base
    found["trained_parameters"] = parameters_by_part(trainable_parts(model))
    return found


def parameters_by_part(parts: dict[str, list[tuple[str, Any]]]) -> dict[str, int]:
    """How many numbers train: {"projector": n, "adapter" or "llm": n}; those that ZeRO-3 has sharded count whole."""
    return {part: sum(getattr(p, "ds_numel", p.numel()) for _, p in members) for part, members in parts.items()}


def evaluate(run: Path) -> int:
    """`python eval/run.py all RUN` as a process of its own (this floor may not import eval); its exit code."""
    return run_program([sys.executable, str(ROOT / "eval" / "run.py"), "all", str(run)])


def finish(config: RunConfig, run: Path) -> None:
    """Evaluation, report and model card of a run whose final/ is written; UserError where the evaluation failed."""
    code = evaluate(run) if config.evaluation.benchmarks else 0
    write_up(config, run)
    if code:
        raise UserError(
            f"the evaluation failed (exit code {code}), its message stands above; {run}/final is whole. Try again: "
            f"{shlex.join(['python', from_here('eval/run.py'), 'all', str(run)])}"
        )


def write_up(config: RunConfig, run: Path) -> None:
    """report/ and the model card, from what the run folder holds by now."""
    from mokamm.report import write_report

    report = write_report(run)
    (run / "README.md").write_text(model_card(config, run))
    command = talk_command(config, run, from_here("mokamm/infer.py"))
    print(f"\nreport: {report}\ntalk to it:\n  {command}", flush=True)


def outcome(run: Path) -> dict[str, Any]:
    """What `train.py --json` prints of a finished run; None for a figure that it does not have, or that is not finite."""
    from mokamm.report import read_results
    from mokamm.training.watch import METRICS, read_metrics

    config, records = load_run_config(run), read_metrics(run / METRICS)
    last = {record["kind"]: record for record in records}
    figures = {
        kind: _finite(last.get(kind, {}), "step", "epoch", "loss", "accuracy") for kind in ("train", "validation")
    }
    told = ("control", "rows", "score", "interval", "scale")
    return {
        "run": str(run),
        "final": str(run / "final"),
        "report": str(run / "report" / "report.md"),
        "method": config.method,
        "trained_parameters": config.versions.get("trained_parameters", {}),
        **figures,
        "benchmarks": [{"benchmark": r["name"], **{key: r[key] for key in told}} for r in read_results(run)],
    }


def _finite(record: dict[str, Any], *keys: str) -> dict[str, float | None]:
    return {key: record[key] if math.isfinite(record[key]) else None for key in keys if key in record}


# ---- the command to talk to the result -------------------------------------------------------------------------------


def from_here(program: str) -> str:
    """The path of one of this checkout's programs from the working directory."""
    return os.path.relpath(ROOT / program)


def talk_command(config: RunConfig, run: Path, program: str = "mokamm/infer.py") -> str:
    """An infer.py command for a row of the run's own sources, else one with names to fill in.

    program: where infer.py lies; by default as from the checkout, for a model card that goes elsewhere.
    """
    try:
        asked = _example(config)
    except Exception:  # an example is a courtesy; no run should fail for it
        options = {modality: option for option, (_, modality) in reversed(MEDIA.items())}  # --video before --image
        asked = [word for m in config.model.modalities if m in options for word in (f"--{options[m]}", "FILE")]
        asked.append("your question")
    return shlex.join(["python", program, str(run), *asked])


def _example(config: RunConfig) -> list[str]:
    from data.schema import Media, Text
    from data.sources import open_source

    entry = config.data.validation[0] if config.data.validation else config.data.train[0]
    path, media_dir = config.locate(entry)
    if config.data.world:  # the same file of the split that training has not seen
        test = Path(config.data.world.dir) / "test"
        path, media_dir = (test / path.name, test) if (test / path.name).is_file() else (path, media_dir)
    sample = open_source(entry.source, path, limit=1, media_dir=media_dir, **entry.options)[0]
    options: list[str] = []
    words: list[str] = []
    for part in (p for message in sample.prompt for p in message.content):
        if isinstance(part, Media):
            name = part.kind if part.kind in ("video", "image") else part.modality
            options += [f"--{name}", (media_dir / part.path).as_posix()]
            words += [f"{{{name}}}"] if words else []  # a marker where it does not come first
        elif isinstance(part, Text):
            words.append(part.text.strip())
    return [*options, " ".join(w for w in words if w)]


# ---- model card ------------------------------------------------------------------------------------------------------


def model_card(config: RunConfig, run: Path) -> str:
    """A README with the front matter that the hub reads; a folder of this machine is no base model there."""
    from mokamm.training.optimization import base_rates

    training, llm = config.training, config.model.llm
    base, adapter = config.versions.get("base", {}), _adapter(config, run)
    rates = base_rates(training, config.versions.get("trained_parameters", {}))
    front = [
        "---",
        *(["library_name: peft"] if adapter else []),
        *([] if find_path(llm.path).is_dir() else [f"base_model: {llm.path}"]),
        f"tags: [mokamm, multimodal{f', {config.method}' if adapter else ''}]",
        "---",
    ]
    what = f"`{config.adapter.method}`" if training.stage == 2 else "projectors only (stage 1)"
    if merged := config.versions.get("merged"):  # merge.py's, of a run with an adapter
        what = f"`{merged['method']}`, merged into the LLM"
    lines = [
        f"# {run.name}",
        "",
        f"Trained with mokamm: {what} on `{llm.path}`, modalities {', '.join(config.model.modality_names)}.",
        "",
        "| setting | value |",
        "|---|---|",
        f"| base | {llm.path}, revision {base.get('revision') or base.get('commit') or '-'} |",
        *([f"| adapter | {adapter} |"] if adapter else []),
        f"| encoders | "
        f"{'; '.join(f'{n}: {m.encoder.name} {m.encoder.path}' for n, m in config.model.modalities.items())} |",
        f"| data | {', '.join(f'{s.source} {s.path}' for s in config.data.train)} |",
        f"| rate | {''.join(f'{part} {rate:g}, ' for part, rate in rates.items())}{training.lr_scheduler_type}, "
        f"seed {training.seed} |",
        "",
        *_results(run),
        "## Use",
        "",
        "```bash",
        talk_command(config, run),
        "```",
        "",
        "`config.yaml` holds every setting and the versions of all libraries; `report/report.md` the curves and "
        "scores.",
        "The base is not part of this folder: `--base` names it where it lies elsewhere.",
    ]
    return "\n".join([*front, "", *lines, ""])


def _adapter(config: RunConfig, run: Path) -> str:
    """What the adapter's own file says of it: a method has no use for some of the section. Empty where there is none."""
    file = run / "final" / ADAPTER / "adapter_config.json"
    saved = json.loads(file.read_text()) if file.is_file() else {}
    called = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "attention_weight": "attention weight"}
    found = [f"{name} {saved[key]:g}" for key, name in called.items() if key in saved]
    return ", ".join([*found, *([f"keys {config.adapter.keys}"] if saved.get("attention_weight") else [])])


def _results(run: Path) -> list[str]:
    from mokamm.report import read_results, results_table

    results = read_results(run)
    return ["## Results", "", *results_table(results), ""] if results else []


def dump_config(config: RunConfig, run: Path, model: Any) -> None:
    """Write config.yaml with versions, whole or not at all."""
    config.versions = json.loads(json.dumps(versions(config, model)))
    with replacing(run / "config.yaml") as beside:
        config.dump(beside)
