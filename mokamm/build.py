"""From a checked config to a model: tokenizer, LLM, frozen encoders, projectors, adapter, and weights to begin with.

    build_model(config, device, for_training) -> MultimodalLM      a new model, from `training.init_from` if set
    build_processor(config)                   -> what lays out samples, without the LLM
    load_run(run, base, device)               -> MultimodalLM      a trained one, ready to answer
    trainable_parts(model)                    -> named parameters by part, for a learning rate each

Projectors are built in float32 whatever the LLM's dtype: they train, and bfloat16 loses small updates; the model casts
their tokens where they enter the embeddings (DeepSpeed's bf16 keeps its own float32 copy and casts the modules itself).
Cost: reading the weights.
"""

from __future__ import annotations

import inspect
import logging
import pickle
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.media import MediaLimits, MediaLoader
from data.schema import UserError, first_line, listed
from encoders import EncoderError, build_encoder
from encoders import check_options as check_encoder
from encoders.base import Encoder
from encoders.cache import FeatureCache
from encoders.pretrained import misfits
from mokamm.adapters import OPTIONS, wrap
from mokamm.config import ConfigError, RunConfig, find_path, load_run_config
from mokamm.config_sections import DataConfig, LLMConfig, ModalityConfig
from mokamm.init_from import begin_lori, load_init
from mokamm.model import MultimodalLM
from mokamm.names import LORI
from mokamm.perception import Perception, Sense
from mokamm.processor import Lookup, Processor
from mokamm.projectors import Projector, build_projector
from mokamm.projectors import check_options as check_projector
from mokamm.quantization import check_trainable, quantized
from mokamm.rendering import PLAIN_TEMPLATE, ChatRenderer
from mokamm.weights import NO_FINGERPRINT, fingerprint, is_adapter, load_weights

log = logging.getLogger("mokamm")


def build_model(
    config: RunConfig,
    device: torch.device | str | None = None,
    for_training: bool = False,
    init: bool = True,
    placed: bool = True,
) -> MultimodalLM:
    """A model as the config says; `init=False` leaves out `training.init_from`.

    placed: False leaves LLM and projectors in the computer's memory; the encoders are on the device.

    Raises UserError, EncoderError or AdapterError for a part that is unknown, missing or does not fit.
    """
    device = choose_device(device)
    modalities = config.model.modalities
    check_parts(config)
    if for_training:
        check_trainable(config)
    # the quick ones first, so that a misspelt encoder or an unfit chat template does not wait for a large LLM
    encoders = {name: encoder_of(modality) for name, modality in modalities.items()}
    tokenizer = load_tokenizer(config.model.llm)
    ChatRenderer(tokenizer, config.model.llm.chat_date, config.model.llm.thinking)
    llm = load_llm(config.model.llm, device)
    width = llm.get_input_embeddings().weight.shape[1]
    projectors = {name: projector_of(modality, encoders[name], width) for name, modality in modalities.items()}
    llm = wrapped(llm, config)
    if init and config.method in LORI:
        begin_lori(llm, config)
    cache = config.data.cache
    perception = Perception(encoders, FeatureCache(cache.dir, cache.max_gb) if cache else None)
    processor = processor_of(config, tokenizer, encoders, projectors, perception.lookup)
    model = MultimodalLM(llm, projectors, perception, processor)
    model.config = config
    if init and config.training.init_folders:
        load_init(model, config.training.init_folders)
    perception.to(device)
    return (model.to(device) if placed else model).train(for_training)


def build_processor(config: RunConfig, weights: bool = True) -> tuple[Processor, dict[str, Encoder]]:
    """What lays out the samples of a config, and its encoders, without the LLM; no feature cache is looked into.

    Of the projectors only the numbers of tokens are needed: they have no memory. `weights=False`: the same holds for the
    encoders, of which only shapes are read. Raises as `build_model` does.
    """
    check_parts(config)
    with nullcontext() if weights else torch.device("meta"):
        encoders = {name: encoder_of(modality) for name, modality in config.model.modalities.items()}
    tokenizer = load_tokenizer(config.model.llm)
    with torch.device("meta"):
        projectors = {name: projector_of(m, encoders[name], 8) for name, m in config.model.modalities.items()}
    return processor_of(config, tokenizer, encoders, projectors, None), encoders


def processor_of(
    config: RunConfig,
    tokenizer: Any,
    encoders: Mapping[str, Encoder],
    projectors: Mapping[str, Projector],
    lookup: Lookup | None,
) -> Processor:
    """encoders, projectors: of the config's modalities, or of some of them."""
    modalities = {name: m for name, m in config.model.modalities.items() if name in encoders}
    senses = {n: Sense.of(n, m, encoders[n], projectors[n]) for n, m in modalities.items()}
    loader = media_loader(config.data.media_dir, config.data)
    keys, llm = config.adapter.keys, config.model.llm
    return Processor(tokenizer, senses, loader, lookup, config.data.max_length, keys, llm.chat_date, llm.thinking)


def wrapped(llm: Any, config: RunConfig) -> Any:
    """The LLM under the config's method; frozen in stage 1."""
    return wrap(llm, config.method, config.model.modality_names, adapter_options(config))


def adapter_options(config: RunConfig) -> dict[str, Any]:
    """What of the `adapter` section `wrap` knows; the rest is the processor's and the run's."""
    options = {key: value for key, value in config.adapter.model_dump().items() if key in OPTIONS}
    if options["a_seed"] is None:
        options["a_seed"] = config.training.seed
    return options


def choose_device(wanted: torch.device | str | None) -> torch.device:
    """The device of that name, or where none is given a GPU if there is one. Raises UserError for one that is not."""
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, no GPU of that number, a torch without CUDA
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise UserError(f"device '{wanted}' cannot be used; here are: {here} ({first_line(error)})") from error


def media_loader(media_dir: str | Path | None, data: DataConfig) -> MediaLoader:
    """What opens media of that folder under the limits of a configuration."""
    return MediaLoader(media_dir, MediaLimits(**data.limits.model_dump()), data.allow_outside)


def load_run(
    run: str | Path, base: str | None = None, device: torch.device | str | None = None, whole: bool = False
) -> MultimodalLM:
    """The model of a finished run. Raises UserError for a folder that is none, or whose base is not the one it was.

    whole: the LLM in full, also where the run has it in 4 or 8 bits.
    """
    config = load_run_config(run)
    if whole:
        config.model.llm.quantization = None
    settle(config, base)
    model = build_model(config, device, init=False)
    load_weights(model, Path(run) / "final")
    return model


def settle(config: RunConfig, base: str | None) -> None:
    """Make a finished run's configuration fit where the run lies now; base: replaces its LLM. Raises as `check_base`."""
    if base is not None:
        config.model.llm.path, config.model.llm.revision = base, None
    check_base(config, named=base is not None)
    if config.data.cache and not Path(config.data.cache.dir).is_dir():
        config.data.cache = None  # a run that has moved starts no cache in someone's working directory


def check_base(config: RunConfig, named: bool) -> None:
    """Compare a local base with the fingerprint of the one that the run was trained on (older runs hold none).

    Another one is a UserError, or only a warning where the user named it.
    """
    trained, folder = config.versions.get("base", {}).get("fingerprint"), find_path(config.model.llm.path)
    if not trained or trained == NO_FINGERPRINT or not folder.is_dir() or fingerprint(folder) == trained:
        return
    if named:
        log.warning("note: the base in %s is not the one that the run was trained on; answers may differ", folder)
        return
    raise UserError(
        f"model.llm.path: the base in {folder} has changed since the run was trained: its weights have another "
        "fingerprint. Bring those weights back, name a folder that holds them (--base PATH), or train the run anew"
    )


def trainable_parts(model: Any) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Parameters that train, with their names in the model: "projector", and "adapter" or (full fine-tuning) "llm"."""
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
    rest = "adapter" if is_adapter(model.llm) else "llm"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault("projector" if name.startswith("projectors.") else rest, []).append((name, parameter))
    return parts


def check_parts(config: RunConfig) -> None:
    """Raises ConfigError naming every encoder's and projector's option that it does not know, or whose value it is not."""
    problems = []
    for name, modality in config.model.modalities.items():
        for key, part, check in (
            ("encoder", modality.encoder, check_encoder),
            ("projector", modality.projector, check_projector),
        ):
            try:
                check(part.name, part.options)
            except (EncoderError, UserError) as error:
                problems.append(f"model.modalities.{name}.{key}: {error}")
    if problems:
        raise ConfigError(listed("the configuration's parts cannot be built:", problems))


def encoder_of(modality: ModalityConfig) -> Encoder:
    encoder = modality.encoder
    return build_encoder(encoder.name, str(find_path(encoder.path)), **encoder.options)


def projector_of(modality: ModalityConfig, encoder: Encoder, width: int) -> Projector:
    projector = modality.projector
    return build_projector(projector.name, encoder.width, width, modality.boundaries, **projector.options)


def load_tokenizer(settings: LLMConfig, **options: Any) -> Any:
    """The LLM's tokenizer, under the template that the settings give to one without. Raises UserError.

    Of a folder without a vocabulary transformers makes tokenizers of special tokens alone, for which all text is nothing.
    """
    tokenizer = from_pretrained("AutoTokenizer", settings, **options)
    special = {*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values())}
    if set(tokenizer.get_vocab()) <= special:
        raise UserError(
            f"model.llm.path: '{settings.path}' holds no vocabulary of its tokenizer (tokenizer.json or the like); fetch or "
            "copy it again"
        )
    if settings.chat_template and not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def load_llm(settings: LLMConfig, device: torch.device) -> Any:
    """The LLM with its weights, all of them. Raises UserError for one that is not so, or that `check_answers` refuses."""
    llm, report = from_pretrained(
        "AutoModelForCausalLM",
        settings,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=settings.attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told below, by name
        **quantized(settings, device),
    )
    parameters = {name for name, _ in llm.named_parameters(remove_duplicate=False)}  # buffers are computed
    report["missing_keys"] = set(report["missing_keys"]) & parameters
    if problems := misfits(report, "weights are "):
        raise UserError(
            f"model.llm.path: '{settings.path}' is not a whole {type(llm).__name__}: {problems}, and would be random. Fetch "
            "or copy it again; a checkpoint without its output head, or of another architecture, is no LLM to begin from"
        )
    check_answers(llm, settings)
    return llm


def check_answers(llm: Any, settings: LLMConfig) -> None:
    """Raises UserError for a multimodal model that cannot generate from embeddings; tells of such a language model."""
    prepare = getattr(llm, "prepare_inputs_for_generation", None)
    if prepare and "inputs_embeds" in inspect.signature(prepare).parameters:
        return
    what = f"model.llm.path: '{settings.path}' is a {type(llm).__name__}, which does not generate from embeddings"
    if llm.config is not llm.config.get_text_config():
        raise UserError(f"{what}, as media need it; use a checkpoint of its language model alone")
    log.warning("note: %s: it trains, but evaluation and infer.py cannot ask it", what)


def from_pretrained(kind: str, llm: LLMConfig, **options: Any) -> Any:
    """AutoTokenizer's or AutoModelForCausalLM's `from_pretrained`, its errors told in one message."""
    import transformers
    from safetensors import SafetensorError

    path = str(find_path(llm.path))
    try:
        return getattr(transformers, kind).from_pretrained(
            path, revision=llm.revision or "main", trust_remote_code=llm.trust_remote_code, **options
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model.llm.path: a file of '{path}' holds Python objects (possibly code) beside tensors and was not executed; "
            "take the checkpoint in safetensors"
        ) from error
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if "attn_implementation" in str(error) and options.get("attn_implementation") != "eager":
            raise no_such_attention(llm) from error
        raise UserError(
            f"model.llm.path: {kind} cannot load '{path}': {first_line(error)}\n  expected a local folder with an LLM "
            "in Hugging Face format, or a hub id (which needs the network, or a downloaded copy); for a run, "
            "--base PATH names another place"
        ) from error


def no_such_attention(llm: LLMConfig) -> UserError:
    others = ", ".join(name for name in ("sdpa", "eager") if name != llm.attention)
    return UserError(f"model.llm.attention: the LLM of '{llm.path}' has no {llm.attention}; set another ({others})")
