"""Sight: frames -> patch features of a CLIP-like vision tower, from open_clip or from transformers.

`layer` counts hidden states as transformers does: 0 is the embedding, L the last block's output before the final norm,
-2 (the default, as in LLaVA and MokA) the block before the last. `features` is `patch` (class token dropped) or `cls`.
All frames of a batch go through resizing, cropping, normalisation and the network in one call, as uint8 tensors on the
encoder's device.

Cost: CLIP ViT-L/14 at 224 takes about 160 GFLOP a frame.

Legend: F frames, H W pixels, P patches, C width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from encoders.base import Encoder, EncoderError, Features, nearest, parse_dtype
from encoders.pretrained import load_model, read

FEATURES = ("patch", "cls")


class FrameEncoder(Encoder):
    """What all vision towers share: the options, masks of ones, and sizes found by encoding one blank frame."""

    modality_kind = "frames"

    def __init__(self, layer: int, features: str, max_batch: int) -> None:
        super().__init__(options={"layer": layer, "features": features}, max_batch=max_batch)
        if features not in FEATURES:
            raise EncoderError(f"unknown vision features '{features}'{nearest(features, FEATURES)}")
        self.layer = layer
        self.which = features

    def choose_layer(self, layers: int, first: int = 0) -> int:
        """`layer` as a hidden state's index from the front, between `first` and `layers`."""
        index = self.layer + layers + 1 if self.layer < 0 else self.layer
        if not first <= index <= layers:
            known = f"{first} to {layers}, or -1 to {first - layers - 1}"
            raise EncoderError(f"layer {self.layer}: this vision tower has hidden states {known}")
        return index

    def finish(self, dtype: str) -> None:
        """Freeze, and learn P and C from one blank frame."""
        self.freeze(parse_dtype(dtype))
        with torch.no_grad():
            try:
                blank = self(*self.preprocess(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), None)).features
            except (ValueError, AssertionError) as error:  # the preprocessing's size is not the network's
                raise EncoderError(f"{type(self).__name__}: preprocessing and network disagree: {error}") from error
        self.patches, self.width = int(blank.shape[1]), int(blank.shape[2])

    def num_tokens(self, length: int | None = None) -> int:
        return self.patches

    def select(self, hidden_FPC: Tensor, prefix: int) -> Features:
        """Patches or class token of a hidden state whose first `prefix` (0 or 1) positions are the class token."""
        if self.which == "cls" and prefix == 0:
            raise EncoderError("features: cls: this vision tower has no class token; use features: patch")
        chosen = hidden_FPC[:, :1] if self.which == "cls" else hidden_FPC[:, prefix:]
        return Features(chosen, torch.ones(chosen.shape[:2], dtype=torch.bool, device=chosen.device))


# ---- transformers ---------------------------------------------------------------------------------------------------


class TransformersFrameEncoder(FrameEncoder):
    """A vision model and its image processor as transformers defines them, from a folder or the hub."""

    model_class: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]  # model_type of the checkpoints that hold such a tower
    prefix: ClassVar[int]  # class tokens before the patches

    def __init__(
        self, path: str | Path, *, layer: int = -2, features: str = "patch", dtype: str = "float32", max_batch: int = 64
    ) -> None:
        import transformers

        super().__init__(layer, features, max_batch)
        what = self.kinds[0]
        self.model = load_model(getattr(transformers, self.model_class), path, self.kinds, what)
        self.processor = read(transformers.AutoImageProcessor.from_pretrained, path, f"{what} preprocessor_config.json")
        self._options["preprocessing"] = self.processor.to_json_string()
        self.index = self.choose_layer(self.model.config.num_hidden_layers)
        self.finish(dtype)

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor]:
        """-> pixel values (F,3,h,w)."""
        return (self.processor(images=list(segments), return_tensors="pt")["pixel_values"].to(self.dtype),)

    def forward(self, pixels: Tensor) -> Features:
        hidden = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        return self.select(hidden[self.index], self.prefix)


class ClipEncoder(TransformersFrameEncoder):
    """CLIP's vision tower."""

    model_class = "CLIPVisionModel"
    kinds = ("clip", "clip_vision_model")
    prefix = 1


class SiglipEncoder(TransformersFrameEncoder):
    """SigLIP's vision tower, and SigLIP 2's of fixed resolution; it has no class token."""

    model_class = "SiglipVisionModel"
    kinds = ("siglip", "siglip_vision_model")
    prefix = 0


# ---- open_clip ------------------------------------------------------------------------------------------------------


class OpenClipEncoder(FrameEncoder):
    """A vision transformer of open_clip: a local folder (`open_clip_config.json` + weights), or name + `pretrained`.

    `pretrained` is one of open_clip's tags, or a file. Runs no block past the chosen layer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        pretrained: str | None = None,
        layer: int = -2,
        features: str = "patch",
        dtype: str = "float32",
        max_batch: int = 64,
    ) -> None:
        super().__init__(layer, features, max_batch)
        self.visual = _load_open_clip(path, pretrained)
        self.preprocessing = dict(self.visual.preprocess_cfg)
        self._options["preprocessing"] = sorted(self.preprocessing.items())
        if not hasattr(self.visual, "forward_intermediates"):
            raise EncoderError(f"'{path}': its vision tower ({type(self.visual).__name__}) gives no hidden states")
        self.index = self.choose_layer(self._count_blocks(), first=1)
        self.finish(dtype)

    def _count_blocks(self) -> int:
        size = self.preprocessing["size"]
        blank = torch.zeros(1, 3, *((size, size) if isinstance(size, int) else size))
        with torch.no_grad():
            return len(self.visual.forward_intermediates(blank, intermediates_only=True)["image_intermediates"])

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor]:
        """-> pixel values (F,3,h,w), as open_clip's own evaluation transform gives for a picture."""
        return (open_clip_transform(segments, self.preprocessing).to(self.dtype),)

    def forward(self, pixels: Tensor) -> Features:
        found = self.visual.forward_intermediates(
            pixels,
            indices=[self.index - 1],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        prefixes = found.get("image_intermediates_prefix")
        patches = found["image_intermediates"][0]
        if prefixes is None or prefixes[0].shape[1] == 0:
            return self.select(patches, prefix=0)
        return self.select(torch.cat([prefixes[0][:, :1], patches], dim=1), prefix=1)


def _load_open_clip(path: str | Path, pretrained: str | None) -> Any:
    """The vision tower alone, with its `preprocess_cfg`."""
    import open_clip

    name = str(path)
    if Path(path).is_dir():
        name, pretrained = f"local-dir:{path}", None
        if not (Path(path) / "open_clip_config.json").is_file():
            raise EncoderError(f"open_clip folder '{path}' has no open_clip_config.json")
    elif pretrained is None and not name.startswith("hf-hub:"):
        raise EncoderError(
            f"open_clip weights are missing: no folder at '{path}' (looked at {Path(path).absolute()}); set `path` to "
            f"a folder with open_clip_config.json, or to a model's name with its `pretrained` tag"
        )
    elif pretrained is not None and name not in open_clip.list_models():
        raise EncoderError(f"unknown open_clip model '{name}'{nearest(name, open_clip.list_models())}")
    try:
        model = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
    except Exception as error:  # open_clip raises bare RuntimeErrors, and its readers whatever they like
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise EncoderError(f"open_clip weights could not be read from '{path}': {' '.join(lines[:4])[:600]}") from error
    return model.visual


def open_clip_transform(frames: Tensor, cfg: dict[str, Any]) -> Tensor:
    """Resize, crop and normalise uint8 (F,3,H,W) on its device: open_clip's evaluation transform, batched.

    `cfg` is open_clip's `preprocess_cfg`. Resizing rounds to uint8 as it does for a picture.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    size = cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    old_height, old_width = frames.shape[-2:]
    mode = InterpolationMode.BILINEAR if cfg["interpolation"] == "bilinear" else InterpolationMode.BICUBIC
    resized = [height, width]
    if cfg["resize_mode"] == "longest":
        ratio = max(old_height / height, old_width / width)
        resized = [round(old_height / ratio), round(old_width / ratio)]
    elif cfg["resize_mode"] == "shortest" and height == width:
        resized = [height]  # the shorter side
    elif cfg["resize_mode"] == "shortest":
        ratio = min(old_height / height, old_width / width)
        resized = [round(old_height / ratio), round(old_width / ratio)]
        mode = InterpolationMode.BICUBIC  # open_clip leaves its `interpolation` unread here
    frames = tv.resize(frames, resized, mode, antialias=True)
    if cfg["resize_mode"] == "longest":
        frames = _pad_to(frames, height, width, cfg["fill_color"])
    frames = tv.center_crop(frames, [height, width])
    return tv.normalize(tv.to_dtype(frames, torch.float32, scale=True), list(cfg["mean"]), list(cfg["std"]))


def _pad_to(frames: Tensor, height: int, width: int, fill: int) -> Tensor:
    from torchvision.transforms.v2 import functional as tv

    missing_height, missing_width = height - frames.shape[-2], width - frames.shape[-1]
    left, top = missing_width // 2, missing_height // 2
    return tv.pad(frames, [left, top, missing_width - left, missing_height - top], fill=fill)
