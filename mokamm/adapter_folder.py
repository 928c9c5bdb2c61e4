"""An adapter's folder read without its LLM: which layers it has, and their A and B one by one.

    folder = AdapterFolder.open(RUN or FOLDER)     LORA (also as others publish it), LORI_S, MOKA
    folder.layers                                  {name in the LLM: (shape of A, shape of B)}
    folder.a(name), folder.b(name)                 an A is drawn anew where it is not stored; a sparse B comes out dense

Cost: nothing is read before it is asked for, except from a pickle (`adapter_model.bin`), which is read whole, as
weights only. The hash of a drawn A is compared once with the one in the config.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.schema import UserError, first_line
from mokamm.adapters.frozen_a import digest, draw
from mokamm.adapters.masks import Mask, Shape, pack, unpack
from mokamm.adapters.peft_bridge import PREFIX
from mokamm.adapters.start import Source
from mokamm.weights import ADAPTER, refuse

log = logging.getLogger("mokamm")

KINDS = ("LORA", "LORI_S", "MOKA")
CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KEY = re.compile(
    rf"(?:{re.escape(PREFIX)})?(?P<layer>.+)\.(?:lora|lori|moka)_(?P<factor>[AB])(?:\.default)?"
    r"\.(?P<part>weight|values|mask|shape|frozen_mask|frozen_values)"
)
PLAIN = {
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "lora_bias": False,
    "target_parameters": None,  # fused experts: their A and B are no matrices of one layer
    "modules_to_save": [],  # whole modules, and rows of embeddings, that were trained beside A and B
    "trainable_token_indices": [],
}


def adapter_in(path: Path) -> Path | None:
    """The adapter's folder of a run, a checkpoint, `final` or itself; None where there is none."""
    folders = (path, path / ADAPTER, path / "final" / ADAPTER)
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def find_adapter(path: Path) -> Path:
    """As `adapter_in`; raises UserError where there is none."""
    if folder := adapter_in(path):
        return folder
    raise UserError(f"{path} holds no adapter: no {CONFIG} there, in {ADAPTER}/ or in final/{ADAPTER}/")


class AdapterFolder:
    """See the head of this file."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        keys: list[str],
        read: Callable[[str], Tensor],
        shape_of: Callable[[str], Sequence[int]],
    ) -> None:
        self.folder, self.config, self.read, self.shape_of = folder, config, read, shape_of
        self.keys: dict[str, dict[str, str]] = {}  # layer -> {"A.weight": key, ...}
        self.other: list[str] = []  # keys that are no factor of a layer
        for key in keys:
            match = KEY.fullmatch(key)
            if match:
                self.keys.setdefault(match["layer"], {})[f"{match['factor']}.{match['part']}"] = key
            else:
                self.other.append(key)

    @classmethod
    def open(cls, path: str | Path) -> AdapterFolder:
        """Raises UserError for what is no adapter, or one that a newer mokamm has written (AdapterError)."""
        from peft import PeftConfig

        import mokamm.adapters  # noqa: F401 - makes its types known to PEFT

        folder = find_adapter(Path(path))
        try:
            config = json.loads((folder / CONFIG).read_text())
            if config["peft_type"] in KINDS:  # `layers` refuses the others by their name
                PeftConfig.from_pretrained(str(folder))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{folder / CONFIG} cannot be read as an adapter's: {error}") from error
        return cls(folder, config, *_tensors(folder))

    @property
    def kind(self) -> str:
        """PEFT's type: "LORA", "LORI_S", "MOKA", ..."""
        return str(self.config["peft_type"])

    @property
    def scaling(self) -> float:
        return float(self.config["lora_alpha"]) / int(self.config["r"])

    @cached_property
    def layers(self) -> dict[str, tuple[Shape, Shape]]:
        """Shapes of A and B by layer. Raises UserError where a layer lacks one of them, or the adapter is no plain LoRA."""
        if self.kind not in KINDS:
            raise UserError(f"{self.folder} is a {self.kind} adapter; expected {' or '.join(KINDS)}")
        of_no_layer = [
            t for t in self.config.get("target_parameters") or [] if t.removesuffix(".weight") not in self.keys
        ]
        config = {**self.config, "target_parameters": of_no_layer or None}
        odd = [key for key, plain in PLAIN.items() if config.get(key, plain) not in (plain, None)]
        if odd:
            raise UserError(f"{self.folder} is no plain LoRA: its config sets {', '.join(odd)}")
        if embeddings := [key for key in self.other if ".lora_embedding_" in key]:
            raise UserError(f"{self.folder} is no plain LoRA: it adapts embeddings, by {', '.join(embeddings)}")
        absent = [
            f"{name} has no {factor}"
            for name, parts in self.keys.items()
            for factor in ("A", "B")
            if not {f"{factor}.weight", f"{factor}.shape"} & set(parts)
        ]
        refuse(self.folder, absent, "is not whole")
        found = {name: (self._shape(name, "A"), self._shape(name, "B")) for name in self.keys}
        if not found:
            raise UserError(f"{self.folder} holds no A and B of any layer")
        return found

    def _shape(self, name: str, factor: str) -> Shape:
        parts = self.keys[name]
        if f"{factor}.shape" in parts:
            first, second = self.read(parts[f"{factor}.shape"]).tolist()
        else:
            first, second = self.shape_of(parts[f"{factor}.weight"])
        return int(first), int(second)

    def a(self, name: str) -> Tensor:
        """A (rows, in_features)."""
        parts = self.keys[name]
        if "A.weight" in parts:
            return self.read(parts["A.weight"])
        return draw(name, self.layers[name][0], int(self.config["a_seed"]), int(self.config["a_version"]))

    def b(self, name: str) -> Tensor:
        """B (out_features, columns), dense."""
        parts, (_, shape) = self.keys[name], self.layers[name]
        if "B.weight" in parts:
            return self.read(parts["B.weight"])
        entries = shape[0] * shape[1]
        B = torch.zeros(entries)
        for mask, values in (("B.mask", "B.values"), ("B.frozen_mask", "B.frozen_values")):
            kept = unpack(self.read(parts[mask]), entries) if mask in parts else torch.zeros(entries, dtype=torch.bool)
            found = self.read(parts[values]) if values in parts else torch.zeros(0)
            if int(kept.sum()) != len(found):
                problem = f"{name} has {len(found)} {values}, its {mask} keeps {int(kept.sum())}"
                refuse(self.folder, [problem], "is not whole")
            if values in parts:
                B = B.to(found.dtype)
                B[kept] = found
        return B.view(shape)

    @cached_property
    def a_hash(self) -> str:
        """sha256 of A. Raises UserError where a drawn A is not the one that the config records."""
        found, recorded = digest((name, self.a(name)) for name in self.layers), self.config.get("a_hash")
        if recorded and found != recorded and not any("A.weight" in parts for parts in self.keys.values()):
            raise UserError(
                f"{self.folder}: A cannot be remade: drawn from seed {self.config['a_seed']} it has the hash {found[:12]}, "
                f"its config says {recorded[:12]}; one of the two was changed"
            )
        return found

    def mask(self) -> Mask:
        """Which entries a sparse B trains; of a dense one those that are not zero (as LoRI-S is published)."""
        bits = {}
        for name, parts in self.keys.items():
            bits[name] = self.read(parts["B.mask"]) if "B.mask" in parts else pack(self.b(name) != 0)
        return Mask(bits, {name: shapes[1] for name, shapes in self.layers.items()}, self.a_hash)

    @property
    def warnings(self) -> list[str]:
        """What of the file has no use here."""
        if not self.other:
            return []
        shown = ", ".join(self.other[:3]) + (", ..." if len(self.other) > 3 else "")
        return [
            f"{len(self.other)} tensors of {self.folder} are not LoRA's and are left out: {shown}. Embedding rows of an "
            "added pad token act on nothing here; if they are trained words, use the original folder instead"
        ]

    def source(self) -> Source:
        """To go on from; the hash of A is checked, and what is left out is told."""
        assert self.a_hash
        for warning in self.warnings:
            log.warning("note: %s", warning)
        return Source(str(self.folder), self.layers, self.scaling, self.a, self.b, self.config)


def load_pickle(path: Path, what: str, mmap: bool = False) -> Any:
    """torch.load as weights only, on the CPU. UserError for what is no such file, or holds more than tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} cannot be read as {what}: it holds Python objects (possibly code) beside tensors, or is no pickle; "
            "no code in it was run"
        ) from error
    except Exception as error:  # torch raises many kinds
        kind = type(error).__name__  # a KeyError says "101"
        raise UserError(f"{path} cannot be read as {what}: {kind}: {first_line(error)}") from error


def _tensors(folder: Path) -> tuple[list[str], Callable[[str], Tensor], Callable[[str], Sequence[int]]]:
    """The keys of an adapter's file, and readers of one tensor and of its shape alone."""
    from safetensors import SafetensorError, safe_open

    if (folder / TENSORS).is_file():
        try:
            file = safe_open(folder / TENSORS, "pt")
            return list(file.keys()), file.get_tensor, lambda key: file.get_slice(key).get_shape()
        except SafetensorError as error:
            raise UserError(f"{folder / TENSORS} cannot be read: {error}") from error
    if (folder / PICKLE).is_file():
        state = load_pickle(folder / PICKLE, "an adapter")
        return list(state), state.__getitem__, lambda key: state[key].shape
    raise UserError(f"{folder} has a {CONFIG}, but neither {TENSORS} nor {PICKLE}")
