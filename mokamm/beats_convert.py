"""The published BEATs checkpoint (`.pt`, a pickle) to safetensors, once; `mokamm convert` calls it.

    {"cfg": {...}, "model": tensors} --every key fits the model that cfg describes--> OUT.safetensors, cfg in its metadata

Read with `weights_only=True`, so that no code in it runs. The result holds the same weights and no pickle; it appears
whole or not at all. Cost: the file is read twice, and held in memory once (360 MB for the published ones).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data.schema import UserError
from encoders.beats import BEATs, load_beats, save_beats
from mokamm.adapter_folder import load_pickle
from mokamm.convert import Options, Plan
from mokamm.training.disk import replacing
from mokamm.weights import share

PICKLES = (".pt", ".pth")


def plan_beats(source: Path, options: Options) -> Plan | None:
    """None for what is no pickle with the keys cfg and model. Raises UserError or EncoderError."""
    if source.suffix not in PICKLES or not source.is_file():
        return None
    content = load_pickle(source, "a mask or a BEATs checkpoint")
    if not isinstance(content, dict) or not {"cfg", "model"} <= content.keys():
        return None
    del content
    options.refuse_other("beats", source, "a BEATs checkpoint")
    model = load_beats(source)
    cfg, size = model.cfg, sum(p.numel() for p in model.parameters())
    head = "" if model.predictor is None else f", a predictor of {cfg.predictor_class} classes"
    found = f"BEATs, {cfg.encoder_layers} layers of width {cfg.encoder_embed_dim}{head}, {size:,} parameters"
    return Plan(found, "beats", partial(write_beats, model), check=_check_name)


def _check_name(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"the converted file must end in .safetensors, found '{out}'")


def write_beats(model: BEATs, out: Path) -> None:
    """Whole or not at all."""
    with replacing(out) as beside:
        save_beats(beside, model)
        share(beside)
