"""A run's adapter merged into its LLM; `mokamm convert RUN OUT --to llm` calls it.

OUT is a run as full fine-tuning leaves it: infer.py, eval/run.py and training.init_from take it, and OUT/final/llm is a
plain transformers folder for any other program. LoRA, DoRA, HiRA and LoRI can be merged, under CoTo too; answers are the
adapter's, up to the rounding of W + dW to the LLM's dtype. MokA and its kin cannot: each modality has a W of its own.
Cost: the LLM's weights in memory once, and OUT as large as the LLM.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data.schema import UserError
from mokamm.build import build_model, check_base
from mokamm.config import RunConfig, load_run_config
from mokamm.config_sections import AdapterConfig
from mokamm.convert import Options, Plan
from mokamm.names import ROUTED, WITHOUT_ADAPTERS
from mokamm.weights import load_weights, save_weights, write_manifest


def plan_merged(source: Path, options: Options) -> Plan | None:
    """Where --to llm asks for it. Raises UserError for what is no run, or one without an adapter that can be merged."""
    if options.to != "llm":
        return None
    config, warnings = load_run_config(source), []
    method, base = config.method, config.model.llm.path
    if method in WITHOUT_ADAPTERS:
        whole = "its LLM is whole in final/llm" if method == "full" else "its LLM is the base itself"
        raise UserError(f"{source} holds no adapter to merge: {whole}")
    if method in ROUTED:
        raise UserError(
            f"{source} is a run of {method}, which cannot be merged: each modality has a weight of its own, and with "
            "attention a media token's update depends on the question. infer.py and eval/run.py fold its text path into the "
            "LLM by themselves, so that answers cost what the LLM's cost"
        )
    if bits := config.model.llm.quantization:
        config.model.llm.quantization = None
        warnings.append(f"the base was trained on in {bits} and is merged whole: answers may differ by that rounding")
    found = f"a run of {method} on {base}"
    return Plan(found, "llm", partial(write_merged, source, config), warnings)


def write_merged(source: Path, config: RunConfig, out: Path) -> None:
    """config: the run's own."""
    check_base(config, named=False)
    model = build_model(config, "cpu", init=False)
    load_weights(model, source / "final")
    model.llm = model.llm.merge_and_unload(safe_merge=True).requires_grad_(True)  # what trains is what is saved
    save_weights(model, out / "final")
    write_manifest(out / "final")
    config.versions["merged"] = {"run": source.resolve().name, "method": config.method}
    config.adapter = AdapterConfig(method="full", keys=config.adapter.keys)
    config.dump(out / "config.yaml")
