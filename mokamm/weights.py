"""The trained weights of a run on disk: what `final/` and `checkpoint-N/` hold of the model.

    adapter/                 PEFT's own format, any method; PeftModel.from_pretrained(llm, DIR/adapter) loads it
    llm/                     transformers' format, only where the whole LLM was trained
    projectors.safetensors   keys <modality>.<parameter>
    MANIFEST.json            size and sha256 of every file

Frozen weights of the base are never written. Loading accounts for every key: one missing or left over is a UserError.
Cost: the bytes are read twice (sha256, then load).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.schema import UserError, listed
from mokamm.training.disk import replacing

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("mokamm")

MANIFEST = "MANIFEST.json"
PROJECTORS = "projectors.safetensors"
ADAPTER = "adapter"
LLM = "llm"
NO_FINGERPRINT = hashlib.sha256().hexdigest()  # what older runs wrote of a base without safetensors


class WeightsError(UserError):
    """A folder of weights is missing, altered, or does not fit the model."""


# ---- manifest --------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: str | Path) -> None:
    """List every file below `folder` with size and sha256; written last, whole or not at all."""
    folder = Path(folder)
    files = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in _files(folder)}
    with replacing(folder / MANIFEST) as beside:
        beside.write_text(json.dumps({"format": 1, "files": files}, indent=1))


def manifest_problems(folder: str | Path, needed: tuple[str, ...] = ()) -> list[str]:
    """What differs between a folder and its manifest; empty when it is whole. Every listed file is read.

    needed: names that the manifest must list, so that another program's folder is not taken for ours.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        listed = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return [f"{folder / MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / MANIFEST} cannot be read: {error}"]
    problems = [f"{folder / MANIFEST} does not list {name}" for name in needed if name not in listed]
    return problems + [found for name, entry in listed.items() if (found := _file_problem(folder / name, *entry))]


def _file_problem(path: Path, size: int, digest: str) -> str | None:
    try:
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, the manifest says {size}"
        return None if sha256(path) == digest else f"{path} was altered: its sha256 is not the manifest's"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def fingerprint(folder: Path) -> str:
    """sha256 over names, sizes and the first and last MiB of a folder's weight files: quick also for large ones."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
            file.seek(-min(path.stat().st_size, 2**20), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()


def trained_fingerprint(folder: Path) -> str:
    """sha256 over what a folder of weights holds: its manifest, which loading compares, or (without one) its files."""
    path = folder / MANIFEST
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    for file in _files(folder):
        digest.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()


def share(path: Path) -> None:
    """Give a file the permissions of the user's umask: safetensors writes for its user alone, and a run may be shared."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


# ---- save ------------------------------------------------------------------------------------------------------------


def is_adapter(llm: nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(llm, PeftModel)


def saved_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """What a set of weights holds: every projector; of the LLM what is trained, or the whole of its adapter, of which
    some may be frozen (LoRI's A) or no parameter (its masks; an LLM's buffers, such as the bias of DeepSeek's routers)."""
    from mokamm.adapters.peft_bridge import saved_keys

    if is_adapter(model.llm):
        own = {f"llm.{key}" for key in saved_keys(model.llm)}
    else:
        trained = any(p.requires_grad for p in model.llm.parameters())
        own = {f"llm.{key}" for key in model.llm.state_dict()} if trained else set()
    parameters: list[tuple[str, Tensor]] = [
        (n, p) for n, p in model.named_parameters() if p.requires_grad or n.startswith("projectors.") or n in own
    ]
    return parameters + [(n, t) for n, t in model.named_buffers() if n in own]


def save_weights(model: Any, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write adapter/ or llm/ and projectors.safetensors (no manifest: the caller may add files first).

    state: the saved_tensors by their names in `model`, gathered by a sharded engine; None: read from the model.
    llm/ of a fused mixture of experts has the modules' own names, which transformers reads and the hub's files part.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if state is None:
        state = {name: t.detach().cpu() for name, t in saved_tensors(model)}
    projectors = {
        n.removeprefix("projectors."): t.contiguous() for n, t in state.items() if n.startswith("projectors.")
    }
    save_file(projectors, folder / PROJECTORS, metadata={"format": "pt"})
    llm = {n.removeprefix("llm."): t.contiguous() for n, t in state.items() if n.startswith("llm.")}
    if is_adapter(model.llm):
        model.llm.save_pretrained(folder / ADAPTER, state_dict=llm, save_embedding_layers=False)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # PEFT's template; the run has a model card
        _sort_modules(folder / ADAPTER / "adapter_config.json")
    elif llm:
        # by the module's own names, which `load_weights` reads: the hub's part what it has fused (experts)
        model.llm.save_pretrained(folder / LLM, state_dict=llm, save_original_format=False)
        tokenizer = getattr(model.processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / LLM)


def _sort_modules(path: Path) -> None:
    """PEFT writes sets of names in the order of the process's hash seed: equal runs would have unequal files."""
    config = json.loads(path.read_text())
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


# ---- load ------------------------------------------------------------------------------------------------------------


def load_weights(model: Any, folder: str | Path, verify: bool = True) -> None:
    """Load what `save_weights` wrote into a model of the same shape; WeightsError on any key or byte that differs.

    verify: compare all files with MANIFEST.json first (where there is none, the keys alone are checked).
    """
    folder = Path(folder)
    if verify and (folder / MANIFEST).is_file():
        refuse(folder, manifest_problems(folder))
    load_projectors(model, folder)
    if is_adapter(model.llm):
        load_adapter(model.llm, folder / ADAPTER)
    elif (folder / LLM).is_dir():
        _load_llm(model.llm, folder / LLM)
    elif (folder / ADAPTER).is_dir():
        refuse(
            folder,
            [f"it holds an {ADAPTER}/ and the model has none; build the model with adapter.method as in its config"],
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds. Raises WeightsError for a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error


def load_projectors(model: Any, folder: str | Path) -> None:
    """Load projectors.safetensors; every projector of the model must be there, and nothing else."""
    path = Path(folder) / PROJECTORS
    if not path.is_file():
        raise WeightsError(
            f"{path} is missing; expected a folder written by mokamm ({PROJECTORS}, {ADAPTER}/ or {LLM}/)"
        )
    _load_exactly(model.projectors, read_tensors(path), path)


def load_adapter(llm: Any, folder: Path) -> None:
    """Load PEFT's file into the adapter of a PeftModel; every key of either must be in the other.

    Raises WeightsError naming the settings that differ, or the LLM that the folder was made for, or the keys.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from mokamm.adapters import fit
    from mokamm.adapters.checks import other_mathematics, other_settings

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise WeightsError(f"{path} is missing; the configuration asks for an adapter, these weights have none")
    config = folder / "adapter_config.json"
    saved = json.loads(config.read_text()) if config.is_file() else {}
    refuse(folder, other_settings(llm.peft_config["default"], saved), "holds an adapter of other settings")
    for line in other_mathematics(llm.peft_config["default"], saved):
        log.warning("note: %s was trained with another %s", folder, line)
    state = read_tensors(path)
    fit(llm, folder, state)
    expected = get_peft_model_state_dict(llm, save_embedding_layers=False)
    refuse(
        path,
        differences(shapes_of(expected), shapes_of(state)),
        f"(made for the LLM '{saved.get('base_model_name_or_path')}') does not fit this LLM, or is not whole",
    )
    set_peft_model_state_dict(llm, state)


def _load_llm(llm: nn.Module, folder: Path) -> None:
    state: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state.update(read_tensors(shard))
    tied = {p.data_ptr(): n for n, p in llm.named_parameters(remove_duplicate=False) if n in state}
    for name, parameter in llm.named_parameters(remove_duplicate=False):
        if name not in state and parameter.data_ptr() in tied:  # an output layer tied to the embeddings is written once
            state[name] = state[tied[parameter.data_ptr()]]
    _load_exactly(llm, state, folder)


def _load_exactly(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    refuse(path, differences(shapes_of(module.state_dict()), shapes_of(state)))
    module.load_state_dict(state)


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def differences(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> list[str]:
    """A line for each name that only one of the two has, and for each that has another shape in them."""
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"unexpected: {name}" for name in found if name not in expected]
    problems += [
        f"{name} has the shape {found[name]}, the model's is {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return problems


def refuse(path: Path, problems: list[str], what: str = "does not fit the model, or is not whole") -> None:
    """Raises WeightsError with the first problems, where there are any."""
    if problems:
        raise WeightsError(listed(f"{path} {what}:", problems, most=8))
