"""From a checked config to a model: tokenizer, LLM, frozen encoders, projectors, adapter, and weights to begin with.

    build_model(config, device, for_training) -> MultimodalLM      a new model, from `training.init_from` if set
    build_processor(config)                   -> what lays out samples, without the LLM
    load_run(run, base, device)               -> MultimodalLM      a trained one, ready to answer
    build_outline(config)                     -> Outline           its shape alone: no weight of the LLM is read
    trainable_parts(model)                    -> named parameters by part, for a learning rate each

Projectors are built in float32 whatever the LLM's dtype: they train, and bfloat16 loses small updates; the model casts
their tokens where they enter the embeddings (DeepSpeed's bf16 keeps its own float32 copy and casts the modules itself).
Cost: reading the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.media import MediaLimits, MediaLoader
from data.schema import UserError
from encoders import build_encoder
from encoders.base import Encoder
from encoders.cache import FeatureCache
from mokamm.adapter_folder import AdapterFolder
from mokamm.adapters import OPTIONS, wrap
from mokamm.adapters.start import adopt_a, start_b
from mokamm.config import LimitsConfig, LLMConfig, ModalityConfig, RunConfig, find_path, load_run_config
from mokamm.lori_mask import read_mask
from mokamm.model import MultimodalLM
from mokamm.names import LORI
from mokamm.perception import Perception, Sense
from mokamm.processor import Lookup, Processor
from mokamm.projectors import Projector, build_projector
from mokamm.weights import (
    ADAPTER,
    MANIFEST,
    PROJECTORS,
    WeightsError,
    fingerprint,
    is_adapter,
    load_adapter,
    load_weights,
    manifest_problems,
)

log = logging.getLogger("mokamm")


def build_model(
    config: RunConfig, device: torch.device | str | None = None, for_training: bool = False, init: bool = True
) -> MultimodalLM:
    """A model as the config says; `init=False` leaves out `training.init_from`.

    Raises UserError, EncoderError or AdapterError for a part that is unknown, missing or does not fit.
    """
    device = choose_device(device)
    modalities = config.model.modalities
    # the quick ones first, so that a misspelt encoder does not wait for a large LLM
    encoders = {name: _encoder(modality) for name, modality in modalities.items()}
    tokenizer = _from_pretrained("AutoTokenizer", config.model.llm)
    llm = _from_pretrained(
        "AutoModelForCausalLM",
        config.model.llm,
        dtype=getattr(torch, config.model.llm.dtype),
        attn_implementation=config.model.llm.attention,
    )
    width = llm.get_input_embeddings().weight.shape[1]
    projectors = {name: _projector(modality, encoders[name], width) for name, modality in modalities.items()}
    llm = _wrapped(llm, config)
    if init and config.training.stage == 2 and config.adapter.method in LORI:
        begin_lori(llm, config)
    cache = config.data.cache
    perception = Perception(encoders, FeatureCache(cache.dir, cache.max_gb) if cache else None)
    processor = _processor(config, tokenizer, encoders, projectors, perception.lookup)
    model = MultimodalLM(llm, projectors, perception, processor)
    model.config = config
    if init and config.training.init_folders:
        load_init(model, config.training.init_folders)
    perception.to(device)
    return model.to(device).train(for_training)


def build_processor(config: RunConfig) -> tuple[Processor, dict[str, Encoder]]:
    """What lays out the samples of a config, and its encoders, without the LLM; no feature cache is looked into.

    Of the projectors only the numbers of tokens are needed: they have no memory. Raises as `build_model` does.
    """
    encoders = {name: _encoder(modality) for name, modality in config.model.modalities.items()}
    tokenizer = _from_pretrained("AutoTokenizer", config.model.llm)
    with torch.device("meta"):
        projectors = {name: _projector(m, encoders[name], 8) for name, m in config.model.modalities.items()}
    return _processor(config, tokenizer, encoders, projectors, None), encoders


def _processor(
    config: RunConfig,
    tokenizer: Any,
    encoders: Mapping[str, Encoder],
    projectors: Mapping[str, Projector],
    lookup: Lookup | None,
) -> Processor:
    senses = {n: Sense.of(n, m, encoders[n], projectors[n]) for n, m in config.model.modalities.items()}
    loader = media_loader(config.data.media_dir, config.data.limits, config.data.allow_outside)
    return Processor(tokenizer, senses, loader, lookup, config.data.max_length, config.adapter.keys)


class Outline(nn.Module):
    """The shape of a run's model: LLM, adapter and projectors on the meta device, to be counted like a MultimodalLM.

    left_out: what could not be built here, by name, with the reason; the projector of an absent encoder is not counted.
    """

    def __init__(self, llm: Any, projectors: dict[str, Projector], perception: Perception) -> None:
        super().__init__()
        self.llm, self.projectors = llm, nn.ModuleDict(projectors)
        self.perception = perception
        self.senses: dict[str, Sense] = {}
        self.processor: Processor | None = None
        self.left_out: dict[str, str] = {}


def build_outline(config: RunConfig, offline: bool = False) -> Outline:
    """Cost: seconds, whatever the LLM's size. Encoders in local folders are read (what they make of a segment decides
    the projector's shape), the LLM's weights need not be there; of models that lie nowhere here, the published shape
    is taken where mokamm/published_shapes.py has it. offline: nothing is asked of the hub. Raises as build_model does."""
    from transformers import AutoModelForCausalLM

    from mokamm.published_shapes import llm_config, stand_in

    settings = config.model.llm
    shape = llm_config(settings.path) if not find_path(settings.path).exists() else None
    shape = shape or _from_pretrained("AutoConfig", settings, local_files_only=offline)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(
            shape, dtype=getattr(torch, settings.dtype), trust_remote_code=settings.trust_remote_code
        )
        llm = _wrapped(llm, config)
    modalities, left_out = config.model.modalities, {}
    found = {
        name: _encoder(m) if find_path(m.encoder.path).exists() else stand_in(m.encoder.name, m.encoder.path)
        for name, m in modalities.items()
    }
    encoders = {name: encoder for name, encoder in found.items() if encoder is not None}
    width = llm.get_input_embeddings().weight.shape[1]
    with torch.device("meta"):
        projectors = {name: _projector(modalities[name], encoder, width) for name, encoder in encoders.items()}
    outline = Outline(llm, projectors, Perception(encoders))
    outline.senses = {name: Sense.of(name, modalities[name], e, projectors[name]) for name, e in encoders.items()}
    for name in modalities.keys() - encoders.keys():
        left_out[name] = (
            f"the encoder is not in a local folder ({modalities[name].encoder.path}), and its shape is not known here"
        )
    try:
        tokenizer = _from_pretrained("AutoTokenizer", settings, local_files_only=offline)
        loader = media_loader(config.data.media_dir, config.data.limits)
        outline.processor = Processor(
            tokenizer, outline.senses, loader, None, config.data.max_length, config.adapter.keys
        )
    except UserError:
        left_out["tokenizer"] = f"{settings.path} has no tokenizer that can be read"
    outline.left_out = left_out
    return outline


def _wrapped(llm: Any, config: RunConfig) -> Any:
    method = "none" if config.training.stage == 1 else config.adapter.method
    return wrap(llm, method, config.model.modality_names, adapter_options(config))


def adapter_options(config: RunConfig) -> dict[str, Any]:
    """What of the `adapter` section `wrap` knows; the rest is the processor's and the run's."""
    options = {key: value for key, value in config.adapter.model_dump().items() if key in OPTIONS}
    if options["a_seed"] is None:
        options["a_seed"] = config.training.seed
    return options


def begin_lori(llm: Any, config: RunConfig) -> None:
    """A, mask and B of a LoRI as its config says.

    An adapter beside the projectors of `training.init_from` counts as `adapter.init_from` where that is not set. Raises
    UserError or AdapterError for a mask or an adapter that is none, or not this model's.
    """
    adapter, start = config.adapter, config.adapter.init_from
    if start is None:
        places = (_weights_folder(folder) / ADAPTER for folder in config.training.init_folders)
        start = next((str(place) for place in places if place.is_dir()), None)
    source = AdapterFolder.open(find_path(start)).source() if start else None
    if source:
        adopt_a(llm, source)
    if adapter.mask:
        llm.base_model.set_mask(read_mask(find_path(adapter.mask)))
    if source and not adapter.init_a_only:
        start_b(llm, source)


def choose_device(wanted: torch.device | str | None) -> torch.device:
    """The device of that name, or where none is given a GPU if there is one. Raises UserError for one that is not."""
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, no GPU of that number, a torch without CUDA
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise UserError(f"device '{wanted}' cannot be used; here are: {here} ({_first_line(error)})") from error


def media_loader(media_dir: str | Path | None, limits: LimitsConfig, allow_outside: bool = False) -> MediaLoader:
    return MediaLoader(media_dir, MediaLimits(**limits.model_dump()), allow_outside)


def load_run(run: str | Path, base: str | None = None, device: torch.device | str | None = None) -> MultimodalLM:
    """The model of a finished run. Raises UserError for a folder that is none, or whose base is not the one it was."""
    run = Path(run)
    config = load_run_config(run)
    if base is not None:
        config.model.llm.path, config.model.llm.revision = base, None
    check_base(config, named=base is not None)
    if config.data.cache and not Path(config.data.cache.dir).is_dir():
        config.data.cache = None  # a run that has moved starts no cache in someone's working directory
    model = build_model(config, device, init=False)
    load_weights(model, run / "final")
    return model


def check_base(config: RunConfig, named: bool) -> None:
    """Compare a local base with the fingerprint of the one that the run was trained on (older runs hold none).

    Another one is a UserError, or only a warning where the user named it.
    """
    trained, folder = config.versions.get("base", {}).get("fingerprint"), find_path(config.model.llm.path)
    if not trained or not folder.is_dir() or fingerprint(folder) == trained:
        return
    if named:
        log.warning("note: the base in %s is not the one that the run was trained on; answers may differ", folder)
        return
    raise UserError(
        f"model.llm.path: the base in {folder} has changed since the run was trained: its weights have another "
        "fingerprint. Bring those weights back, name a folder that holds them (--base PATH), or train the run anew"
    )


def trainable_parts(model: MultimodalLM) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Parameters that train, with their names in the model: "projector", and "adapter" or (full fine-tuning) "llm"."""
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
    rest = "adapter" if is_adapter(model.llm) else "llm"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault("projector" if name.startswith("projectors.") else rest, []).append((name, parameter))
    return parts


def load_init(model: MultimodalLM, folders: str | Path | Sequence[str | Path]) -> None:
    """Begin from the projectors (and the adapter, if both have one) of stage-1 folders, runs or checkpoints.

    Every key is accounted for: each modality of the config must be there whole, in one of the folders; one that only
    the files have is skipped with a note. Raises UserError naming every key that does not fit.
    """
    state: dict[str, torch.Tensor] = {}
    where: dict[str, Path] = {}  # modality -> file
    for folder in map(_weights_folder, [folders] if isinstance(folders, str | Path) else folders):
        found = _projectors_in(folder)
        for name in sorted({key.split(".", 1)[0] for key in found}):
            if name not in model.projectors:
                log.warning("note: %s also holds a projector for '%s', which this config does not use", folder, name)
            elif name in where:
                raise UserError(
                    f"training.init_from: {where[name]} and {folder} both hold a projector for '{name}'; name one of them"
                )
            else:
                where[name] = folder
        state |= {key: tensor for key, tensor in found.items() if where.get(key.split(".", 1)[0]) == folder}
        config = getattr(model, "config", None)
        if (folder / ADAPTER).is_dir() and not (config and config.adapter.method in LORI):  # begin_lori reads theirs
            _init_adapter(model, folder / ADAPTER)
    _load_projectors(model, state, where)


def _weights_folder(named: str | Path) -> Path:
    folder = find_path(str(named))
    return folder / "final" if (folder / "final" / PROJECTORS).is_file() else folder


def _projectors_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = folder / PROJECTORS
    if not path.is_file():
        raise UserError(f"training.init_from: {path} is missing; expected a folder that stage 1 wrote ({PROJECTORS})")
    if (folder / MANIFEST).is_file() and (altered := manifest_problems(folder)):
        raise UserError("\n  - ".join([f"training.init_from: {folder} is not whole:", *altered]))
    return load_file(path)


def _load_projectors(model: MultimodalLM, state: dict[str, torch.Tensor], where: dict[str, Path]) -> None:
    absent = [name for name in model.projectors if name not in where]
    if absent:
        raise UserError(
            f"training.init_from has no projector for {', '.join(absent)}; it has {', '.join(sorted(where)) or 'none'}. "
            "Train stage 1 with that modality, or leave it out of model.modalities"
        )
    own = {name: tuple(tensor.shape) for name, tensor in model.projectors.state_dict().items()}
    problems = [f"missing: {key}" for key in own if key not in state]
    problems += [f"unexpected: {key}" for key in state if key not in own]
    problems += [
        f"{key} has the shape {tuple(state[key].shape)}, the config's is {shape}"
        for key, shape in own.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if problems:
        files = ", ".join(str(folder / PROJECTORS) for folder in dict.fromkeys(where.values()))
        shown = problems[:8] + [f"... and {len(problems) - 8} more"] * (len(problems) > 8)
        shown += _width_notes(model, state)
        raise UserError("\n  - ".join([f"training.init_from: {files} does not fit model.modalities:", *shown]))
    model.projectors.load_state_dict(state)


def _width_notes(model: MultimodalLM, state: dict[str, torch.Tensor]) -> list[str]:
    """What to do about projectors that were trained on features of another width than the encoder's."""
    notes = []
    for name, projector in model.projectors.items():
        norm = state.get(f"{name}.norm.weight")
        if norm is not None and len(norm) != projector.in_features:
            notes.append(
                f"model.modalities.{name}.encoder gives features of width {projector.in_features}, this projector was "
                f"trained on width {len(norm)}: name the encoder, and its layer, that stage 1 had"
            )
    return notes


def _init_adapter(model: MultimodalLM, folder: Path) -> None:
    if is_adapter(model.llm):
        try:
            load_adapter(model.llm, folder)
        except WeightsError as error:
            raise WeightsError(f"training.init_from: {error}") from None
    else:
        log.warning("note: %s is not used: the model has no adapter", folder)


def _encoder(modality: ModalityConfig) -> Encoder:
    encoder = modality.encoder
    return build_encoder(encoder.name, str(find_path(encoder.path)), **encoder.options)


def _projector(modality: ModalityConfig, encoder: Encoder, width: int) -> Projector:
    projector = modality.projector
    return build_projector(projector.name, encoder.width, width, modality.boundaries, **projector.options)


def _from_pretrained(kind: str, llm: LLMConfig, **options: Any) -> Any:
    """AutoTokenizer's or AutoModelForCausalLM's `from_pretrained`, its errors told in one message."""
    import transformers
    from safetensors import SafetensorError

    path = str(find_path(llm.path))
    try:
        return getattr(transformers, kind).from_pretrained(
            path, revision=llm.revision or "main", trust_remote_code=llm.trust_remote_code, **options
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"model.llm.path: {kind} cannot load '{path}': {_first_line(error)}\n  expected a local folder with an LLM "
            "in Hugging Face format, or a hub id (which needs the network, or a downloaded copy); for a run, "
            "--base PATH names another place"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
