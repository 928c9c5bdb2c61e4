"""What lmms-eval finds under the entry point group `lmms_eval.models`: the model `mokamm`, a chat model.

Imported whenever lmms-eval starts, whatever model was asked for, so that it must cost nothing.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """lmms-eval's ModelManifest of `--model mokamm`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mokamm", chat_class_path="eval.lmms.model.Mokamm")
