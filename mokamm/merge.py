"""A run's adapter merged into its LLM; `mokamm convert RUN OUT --to llm` calls it.

OUT is a run as full fine-tuning leaves it: infer.py, eval/run.py and training.init_from take it, and OUT/final/llm is a
plain transformers folder for any other program. LoRA, DoRA, HiRA and LoRI can be merged, under CoTo too; answers are the
adapter's, up to the rounding of W + dW to the LLM's dtype. MokA and its kin cannot: each modality has a W of its own; nor
can an adapter of an output head that is tied to the embeddings.
Cost: the LLM's weights in memory once, and OUT as large as the LLM.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data.schema import UserError
from mokamm.adapters.peft_bridge import tied_layers
from mokamm.build import load_run
from mokamm.config import load_run_config
from mokamm.config_sections import AdapterConfig
from mokamm.convert import Options, Plan
from mokamm.names import ROUTED, WITHOUT_ADAPTERS
from mokamm.quiet import quiet
from mokamm.training.finish import model_card
from mokamm.weights import save_weights, write_manifest


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
        warnings.append(f"the run has its base in {bits}, OUT has it whole: answers may differ by that rounding")
    found = f"a run of {method} on {options.base or base}"
    return Plan(found, "llm", partial(write_merged, source, options.base), warnings, partial(_check_place, source))


def _check_place(source: Path, out: Path) -> None:
    if (source / "final").resolve() in out.resolve().parents:
        raise UserError(f"{out} lies in {source / 'final'}, which is the run's own; choose a name beside the run")


def write_merged(source: Path, base: str | None, out: Path) -> None:
    """base: as of infer.py. Raises UserError where the sum would be no LLM."""
    quiet()
    model = load_run(source, base, "cpu", whole=True)
    if tied := tied_layers(model.base_llm):
        raise UserError(
            f"{source} cannot be merged: its adapter changes {tied[0]}, whose weight is another module's too (tied "
            "embeddings), and the sum would change both"
        )
    try:
        model.llm = model.llm.merge_and_unload(safe_merge=True).requires_grad_(True)  # what trains is what is saved
    except ValueError as error:  # PEFT's, of a sum that is not finite
        raise UserError(f"{source} cannot be merged: {error}") from error
    save_weights(model, out / "final")
    write_manifest(out / "final")
    config = model.config
    assert config is not None
    config.versions["merged"] = {"run": source.resolve().name, "method": config.method}
    if base:  # OUT's base is that one
        config.versions.get("base", {}).pop("fingerprint", None)
    config.adapter = AdapterConfig(method="full", keys=config.adapter.keys)
    config.dump(out / "config.yaml")
    (out / "README.md").write_text(model_card(config, out))
