"""Loading weights through transformers, with a clear error for each way in which that can go wrong.

`path` is a local folder, or a name on the hub (`owner/model`). Nothing here runs code from a checkpoint:
`trust_remote_code` stays false, and transformers reads pickles with `weights_only=True`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from encoders.errors import EncoderError


def read(load: Callable[..., Any], path: str | Path, what: str, **options: Any) -> Any:
    """`load(path, **options)`; every failure becomes an EncoderError that says what could not be read and why."""
    from safetensors import SafetensorError

    if not Path(path).exists() and (Path(path).parent.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path))):
        raise EncoderError(
            f"{what} is missing: no folder at '{path}' (looked at {Path(path).absolute()}); "
            "download it, or correct the encoder's `path` (a folder, or owner/model on the hub)"
        )
    try:
        return load(str(path), **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        local = (
            "" if Path(path).exists() else f" (no folder at {Path(path).absolute()}, so it was asked for on the hub)"
        )
        raise EncoderError(f"{what} could not be read from '{path}'{local}: {reason}") from error


def load_model(model_class: Any, path: str | Path, kinds: Collection[str], what: str) -> Any:
    """`model_class.from_pretrained(path)` in float32; its config must be of one of `kinds`, and no weight missing.

    Weights that the class has no use for (a text tower beside the vision tower) are left unread.
    """
    from transformers import PretrainedConfig

    config = read(PretrainedConfig.get_config_dict, path, f"{what} config.json")[0]
    found = config.get("model_type")
    if found not in kinds:
        raise EncoderError(f"'{path}' is no {what} model: its model_type is {found}, expected {' or '.join(kinds)}")
    import torch

    model, report = read(
        model_class.from_pretrained, path, f"{what} weights", output_loading_info=True, dtype=torch.float32
    )
    missing = sorted(report["missing_keys"])
    if missing:
        from encoders.base import shorten

        raise EncoderError(
            f"'{path}' is not a whole {what} checkpoint: {len(missing)} weights missing ({shorten(missing)})"
        )
    return model
