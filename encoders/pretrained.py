"""Loading weights through transformers, with a clear error for each way in which that can go wrong.

Under `with torch.device("meta")` no weights are read: the network is built from its configuration alone, without
memory, and its encoder still tells widths and exact numbers of tokens (`mokamm data check` asks for no more).

`path` is a local folder, or a name on the hub (`owner/model`). Nothing here runs code from a checkpoint:
`trust_remote_code` stays false, and transformers reads pickles with `weights_only=True`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

from encoders.errors import EncoderError


def read(load: Callable[..., Any], path: str | Path, what: str, **options: Any) -> Any:
    """`load(path, **options)`; every failure becomes an EncoderError that says what could not be read and why."""
    if not Path(path).exists() and (Path(path).parent.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path))):
        raise EncoderError(
            f"{what} is missing: no folder at '{path}' (looked at {Path(path).absolute()}); "
            "download it, or correct the encoder's `path` (a folder, or owner/model on the hub)"
        )
    try:
        return load(str(path), **options)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{what} at '{path}' were refused: the file holds Python objects (possibly code) beside tensors and was "
            "not executed; take a checkpoint in safetensors"
        ) from error
    except Exception as error:  # of many kinds: no file, no network, a broken one, a value of another type in a config
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        if not reason or not isinstance(error, OSError | ValueError | RuntimeError):
            reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
        local = (
            "" if Path(path).exists() else f" (no folder at {Path(path).absolute()}, so it was asked for on the hub)"
        )
        raise EncoderError(f"{what} could not be read from '{path}'{local}: {reason}") from error


def shapes_only() -> bool:
    """Whether networks are being built without their weights: under `with torch.device("meta")`."""
    import torch

    return torch.get_default_device().type == "meta"


def load_model(
    path: str | Path, classes: Mapping[str, str], what: str, *, instead: Mapping[str, str] | None = None, **config: Any
) -> Any:
    """The model at `path` in float32, built by the class (a name in transformers) that `classes` has for its `model_type`.

    No weight may be missing; weights that the class has no use for (a text tower beside the vision tower) are left
    unread. `instead`: model types that are near but not read here, and what to do. `config`: values laid over its own,
    and `key_mapping`, new names of keys as `from_pretrained` takes them.
    """
    import torch
    import transformers

    found = read(_model_type, path, f"{what} config.json")
    if found not in classes:
        hint = f"; {instead[found]}" if instead and found in instead else ""
        raise EncoderError(
            f"'{path}' is no {what} model: its model_type is {found}, expected {' or '.join(classes)}{hint}"
        )
    model_class = attrgetter(classes[found])(transformers)
    if shapes_only():
        config.pop("key_mapping", None)
        return model_class(read(model_class.config_class.from_pretrained, path, f"{what} config.json", **config))
    with _unreported():
        model, report = read(
            model_class.from_pretrained,
            path,
            f"{what} weights",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            dtype=torch.float32,
            **config,
        )
    if problems := misfits(report, "weights "):
        raise EncoderError(f"'{path}' is not a whole {what} checkpoint: {problems}")
    return model


def misfits(report: Mapping[str, Any], start: str) -> str:
    """The weights that a loading report of transformers has as missing or of another shape; empty: none.

    start: of each problem, such as "weights ".
    """
    from encoders.base import counted, reshaped

    shapes = sorted(reshaped(*mismatch) for mismatch in report["mismatched_keys"])
    return counted({f"{start}missing": sorted(report["missing_keys"]), f"{start}of another shape": shapes})


def _model_type(path: str) -> Any:
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(path)[0].get("model_type")


@contextmanager
def _unreported() -> Iterator[None]:
    """Without transformers' table of the weights that are left unread: a line each of a whole text tower or decoder."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


def drop_unread_blocks(model: Any, blocks: int, chosen: Collection[int]) -> None:
    """Take from a transformers model the blocks that no chosen hidden state needs: they would only cost time.

    One block more than needed stays, since the state that it reads is the same in every model and version; what the
    last block gives is normed in some.
    """
    from torch.nn import ModuleList

    needed = max(chosen) + 1
    if needed < blocks:
        lists = [module for module in model.modules() if isinstance(module, ModuleList) and len(module) == blocks]
        del lists[-1][needed:]  # convolutions, which may be as many, stand before the blocks
