"""Where a run's weights begin: `training.init_from` and, for LoRI, `adapter.init_from` and `adapter.mask`.

    stage-1 folders, runs or checkpoints --load_init--> projectors, each from one folder; the adapter, if both have one
    an adapter and a mask --begin_lori--> A, mask and B of a LoRI

Every key is accounted for; what does not fit is a UserError that names it. Cost: reading the files, and their hashes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.schema import UserError, listed
from mokamm.adapter_folder import AdapterFolder
from mokamm.adapters.masks import Mask
from mokamm.adapters.start import adopt_a, start_b
from mokamm.config import RunConfig, find_path
from mokamm.lori_mask import read_mask
from mokamm.model import MultimodalLM
from mokamm.names import LORI
from mokamm.weights import (
    ADAPTER,
    LLM,
    MANIFEST,
    PROJECTORS,
    WeightsError,
    differences,
    is_adapter,
    load_adapter,
    manifest_problems,
    read_tensors,
    shapes_of,
)

log = logging.getLogger("mokamm")


def load_init(model: MultimodalLM, folders: str | Path | Sequence[str | Path]) -> None:
    """Begin from the projectors (and the adapter, if both have one) of stage-1 folders, runs or checkpoints.

    Every key is accounted for: each modality of the config must be there whole, in one of the folders; one that only
    the files have is skipped with a note. Raises UserError naming every key that does not fit.
    """
    state: dict[str, torch.Tensor] = {}
    where: dict[str, Path] = {}  # modality -> file
    folders = [folders] if isinstance(folders, str | Path) else folders
    for folder in map(weights_folder, folders):
        _check_llm(folder, getattr(model, "config", None))
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
    _load_projectors(model, state, where)
    adapter, config = adapter_among(folders), getattr(model, "config", None)
    if adapter and not (config and config.method in LORI):  # begin_lori reads theirs
        _init_adapter(model, adapter)


def adapter_among(folders: Sequence[str | Path]) -> Path | None:
    """The adapter that lies in one of the folders. UserError where several have one."""
    found = [place for folder in folders if (place := weights_folder(folder) / ADAPTER).is_dir()]
    if len(found) > 1:
        raise UserError(f"training.init_from: {found[0]} and {found[1]} are two adapters; name one of them")
    return found[0] if found else None


def weights_folder(named: str | Path) -> Path:
    folder = find_path(str(named))
    return folder / "final" if (folder / "final" / PROJECTORS).is_file() else folder


def _check_llm(folder: Path, config: RunConfig | None) -> None:
    """Raises UserError where a folder holds a whole LLM that the run does not begin from."""
    trained = folder / LLM
    if trained.is_dir() and config and find_path(config.model.llm.path).resolve() != trained.resolve():
        raise UserError(
            f"training.init_from: {folder} holds an LLM that was trained whole, and its projectors belong to it: begin from "
            f"it, too, with model.llm.path={trained}"
        )


def _projectors_in(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / PROJECTORS
    if not path.is_file():
        raise UserError(f"training.init_from: {path} is missing; expected a folder that stage 1 wrote ({PROJECTORS})")
    if (folder / MANIFEST).is_file() and (altered := manifest_problems(folder)):
        raise UserError(listed(f"training.init_from: {folder} is not whole:", altered))
    return read_tensors(path)


def _load_projectors(model: MultimodalLM, state: dict[str, torch.Tensor], where: dict[str, Path]) -> None:
    absent = [name for name in model.projectors if name not in where]
    if absent:
        raise UserError(
            f"training.init_from has no projector for {', '.join(absent)}; it has {', '.join(sorted(where)) or 'none'}. "
            "Train stage 1 with that modality, or leave it out of model.modalities"
        )
    problems = differences(shapes_of(model.projectors.state_dict()), shapes_of(state))
    if problems:
        files = ", ".join(str(folder / PROJECTORS) for folder in dict.fromkeys(where.values()))
        told = listed(f"training.init_from: {files} does not fit model.modalities:", problems, most=8)
        raise UserError(listed(told, _width_notes(model, state)))
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


def read_own_mask(config: RunConfig) -> Mask:
    """The file of `adapter.mask`. Raises UserError where `adapter.sparsity` says another one than it has."""
    named, wanted = config.adapter.mask, config.adapter.sparsity
    assert named is not None
    mask = read_mask(find_path(named))
    exactly = 0.001 + 1 / mask.total  # published ones are not cut to the entry
    if wanted is not None and abs(mask.sparsity - wanted) > exactly:
        raise UserError(
            f"adapter.sparsity is {wanted:g}, and adapter.mask ({named}) has {mask.sparsity:.4g}: leave sparsity out, or "
            "cut another mask (mokamm lori-mask)"
        )
    return mask


def begin_lori(llm: Any, config: RunConfig) -> None:
    """A, mask and B of a LoRI as its config says.

    An adapter beside the projectors of `training.init_from` counts as `adapter.init_from` where that is not set. Raises
    UserError or AdapterError for a mask or an adapter that is none, or not this model's.
    """
    adapter = config.adapter
    start = find_path(adapter.init_from) if adapter.init_from else adapter_among(config.training.init_folders)
    source = AdapterFolder.open(start).source() if start else None
    if source:
        adopt_a(llm, source)
    if adapter.mask:
        llm.base_model.set_mask(read_own_mask(config))
    if source and not adapter.init_a_only:
        start_b(llm, source)
