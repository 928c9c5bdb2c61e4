"""The shape of a run's model without its weights: what is counted and predicted before anything is downloaded.

    build_outline(config) -> Outline     LLM, adapter and projectors on the meta device; encoders where they lie locally

For mokamm/advise.py, mokamm/doctor.py and the memory forecast. Cost: seconds, whatever the LLM's size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from data.schema import UserError
from encoders.base import Encoder
from mokamm.adapters.masks import Mask, keep_top
from mokamm.adapters.start import factors
from mokamm.build import (
    check_answers,
    check_parts,
    encoder_of,
    from_pretrained,
    load_tokenizer,
    no_such_attention,
    processor_of,
    projector_of,
    wrapped,
)
from mokamm.config import RunConfig, find_path
from mokamm.config_sections import ModalityConfig
from mokamm.init_from import read_own_mask
from mokamm.names import DENSE
from mokamm.perception import Perception, Sense
from mokamm.processor import Processor
from mokamm.projectors import Projector
from mokamm.published_shapes import llm_config, stand_in
from mokamm.training.two_phase import SPARSITY


class Outline(nn.Module):
    """The shape of a run's model: LLM, adapter and projectors on the meta device, to be counted like a MultimodalLM.

    left_out: what could not be built here, by name, with the reason; the projector of an absent encoder is not counted.
    no_rows: why there is no processor, and so no row can be laid out: no tokenizer here, or one without a chat template.
    """

    def __init__(self, config: RunConfig, llm: Any, projectors: dict[str, Projector], perception: Perception) -> None:
        super().__init__()
        self.config = config
        self.llm, self.projectors = llm, nn.ModuleDict(projectors)
        self.perception = perception
        self.senses: dict[str, Sense] = {}
        self.processor: Processor | None = None
        self.left_out: dict[str, str] = {}
        self.tokenizer: Any = None
        self.no_rows = ""


def build_outline(config: RunConfig, offline: bool = False) -> Outline:
    """Cost: seconds, whatever the LLM's size. Encoders in local folders are read (what they make of a segment decides
    the projector's shape), the LLM's weights need not be there; of models that lie nowhere here, the published shape
    is taken where mokamm/published_shapes.py has it. offline: nothing is asked of the hub. Raises as build_model does."""
    check_parts(config)
    llm, modalities = _llm(config, offline), config.model.modalities
    found = {name: _encoder(modality) for name, modality in modalities.items()}
    encoders = {name: encoder for name, encoder in found.items() if encoder is not None}
    width = llm.get_input_embeddings().weight.shape[1]
    with torch.device("meta"):
        projectors = {name: projector_of(modalities[name], encoder, width) for name, encoder in encoders.items()}
    outline = Outline(config, llm, projectors, Perception(encoders))
    outline.senses = {name: Sense.of(name, modalities[name], e, projectors[name]) for name, e in encoders.items()}
    outline.left_out = {
        name: f"the encoder is not in a local folder ({m.encoder.path}), and its shape is not known here"
        for name, m in modalities.items()
        if name not in encoders
    }
    try:
        outline.tokenizer = load_tokenizer(config.model.llm, local_files_only=offline)
    except UserError:
        outline.no_rows = f"{config.model.llm.path} has no tokenizer that can be read"
        return outline
    try:
        outline.processor = processor_of(config, outline.tokenizer, encoders, projectors, None)
    except UserError as error:
        outline.no_rows = str(error)
    return outline


def _llm(config: RunConfig, offline: bool) -> Any:
    """The LLM under the config's method, on the meta device."""
    from transformers import AutoModelForCausalLM

    settings = config.model.llm
    shape = llm_config(settings.path) if not find_path(settings.path).exists() else None
    shape = shape or from_pretrained("AutoConfig", settings, local_files_only=offline)
    # FlashAttention asks for its package, which may be where the run will be
    attention = {} if settings.attention == "flash_attention_2" else {"attn_implementation": settings.attention}
    with torch.device("meta"):
        try:
            llm = AutoModelForCausalLM.from_config(
                shape, dtype=getattr(torch, settings.dtype), trust_remote_code=settings.trust_remote_code, **attention
            )
        except ValueError as error:
            if "attn_implementation" not in str(error):
                raise
            raise no_such_attention(settings) from error
        check_answers(llm, settings)
        llm = wrapped(llm, config)
    if config.method in DENSE:  # the sparse ones, which have nothing to train before
        llm.base_model.set_mask(_mask(llm, config))
    return llm


def _encoder(modality: ModalityConfig) -> Encoder | None:
    """The encoder of a local folder, else one of its published shape alone; None where that is not known."""
    named = modality.encoder
    return encoder_of(modality) if find_path(named.path).exists() else stand_in(named.name, named.path, named.options)


def _mask(llm: Any, config: RunConfig) -> Mask:
    """The mask of the config where its file is there; else one of as many entries as will be cut, alike in all layers."""
    named = config.adapter.mask
    if named and find_path(named).is_file():
        return read_own_mask(config)
    pairs: dict[str, Any] = factors(llm)
    shapes = {name: B.size for name, (_, B) in pairs.items()}

    def ramp(name: str) -> torch.Tensor:
        return torch.linspace(1, 2, math.prod(shapes[name])).view(shapes[name])

    return keep_top(shapes, ramp, config.adapter.sparsity or SPARSITY)
