"""Sight: frames -> features of a vision transformer, from transformers (open_clip's stand in `vision_open_clip.py`).

`layer` counts hidden states as transformers does: 0 is the embedding, L the last block's output before the final norm,
-2 (the default, as in LLaVA and MokA) the block before the last; a list joins several, see `layers.py`. `features` is
`patch` (class token and registers dropped) or `cls`. `image_size` asks for square frames of another size than the
checkpoint's own; learned positions are interpolated to it as the architecture's authors do (bicubic), rotary ones need
nothing. All frames of a batch go through resizing, cropping, normalisation and the network in one call, as uint8
tensors on the encoder's device.

Cost: CLIP ViT-L/14 at 224 takes about 160 GFLOP a frame; twice the image size, four times the patches.

Legend: F frames, H W pixels, P patches, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from encoders.base import Encoder, EncoderError, Extent, Features, parse_dtype
from encoders.layers import Layers, check_features, choose_layers, join_states
from encoders.pretrained import drop_unread_blocks, load_model, read


class FrameEncoder(Encoder):
    """What all vision towers share: the options, masks of ones, and sizes found by encoding one blank frame."""

    modality_kind = "frames"

    def __init__(self, layer: Layers, features: str, image_size: int | None, max_batch: int) -> None:
        options = {"layer": layer, "features": features, "image_size": image_size}
        super().__init__(options=options, max_batch=max_batch)
        self.which = check_features(features)
        self.layer, self.image_size = layer, image_size

    def check_image_size(self, patch: int | Sequence[int]) -> None:
        """Raises EncoderError for an `image_size` that is not a whole number of patches."""
        sides = [patch] if isinstance(patch, int) else list(patch)
        if self.image_size is not None and (self.image_size < 1 or any(self.image_size % side for side in sides)):
            side = sides[0]
            near = max(1, round(self.image_size / side)) * side
            raise EncoderError(
                f"image_size {self.image_size}: expected a multiple of the patch size {side}; the nearest is {near}"
            )

    def finish(self, dtype: str) -> None:
        """Freeze, and learn P and C from one blank frame. (On the meta device too: its pixels are made on the CPU.)"""
        self.freeze(parse_dtype(dtype))
        with torch.no_grad():
            try:
                with torch.device("cpu"):
                    pixels = self.preprocess(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), None)
                blank = self(*(part.to(self.device) for part in pixels)).features
            except (ValueError, AssertionError) as error:  # the preprocessing's size is not the network's
                raise EncoderError(f"{type(self).__name__}: preprocessing and network disagree: {error}") from error
        self.patches, self.width = int(blank.shape[1]), int(blank.shape[2])

    def num_tokens(self, extent: Extent = None) -> int:
        return self.patches

    def select(self, states_FPC: Sequence[Tensor], chosen: Sequence[int], prefix: int) -> Features:
        """Patches or class token of the chosen states, whose first `prefix` positions are class token and registers."""
        if self.which == "cls" and prefix == 0:
            raise EncoderError("features: cls: this vision tower has no class token; use features: patch")
        states = join_states(states_FPC, chosen)
        picked = states[:, :1] if self.which == "cls" else states[:, prefix:]
        return Features(picked, torch.ones(picked.shape[:2], dtype=torch.bool, device=picked.device))


class TransformersFrameEncoder(FrameEncoder):
    """A vision model and its image processor as transformers defines them, from a folder or the hub."""

    classes: ClassVar[dict[str, str]]  # model_type of a checkpoint -> transformers class of the tower
    instead: ClassVar[dict[str, str]] = {}  # model_type of its kin that is not read here -> what to do
    class_tokens: ClassVar[int] = 1
    interpolation: ClassVar[dict[str, bool]] = {"interpolate_pos_encoding": True}  # forward's option for other sizes

    def __init__(
        self,
        path: str | Path,
        *,
        layer: Layers = -2,
        features: str = "patch",
        image_size: Annotated[int, Field(ge=1)] | None = None,
        dtype: str = "float32",
        max_batch: int = 64,
    ) -> None:
        super().__init__(layer, features, image_size, max_batch)
        what = next(iter(self.classes))
        self.model = load_model(path, self.classes, what, instead=self.instead)
        config = self.model.config
        self.check_image_size(config.patch_size)
        self.processor = _image_processor(path, what, image_size)
        self._options["preprocessing"] = self.processor.to_json_string()
        self.indices = choose_layers(layer, config.num_hidden_layers)
        drop_unread_blocks(self.model, config.num_hidden_layers, self.indices)
        self.prefix = self.class_tokens + getattr(config, "num_register_tokens", 0)
        self.extra = self.interpolation if image_size not in (None, config.image_size) else {}
        self.finish(dtype)

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor]:
        """-> pixel values (F,3,h,w)."""
        return (self.processor(images=list(segments), return_tensors="pt")["pixel_values"].to(self.dtype),)

    def forward(self, pixels: Tensor) -> Features:
        hidden = self.model(pixel_values=pixels, output_hidden_states=True, **self.extra).hidden_states
        return self.select(hidden, self.indices, self.prefix)


def _image_processor(path: str | Path, what: str, image_size: int | None) -> Any:
    """The checkpoint's image processor; with `image_size`, one that ends at that square in the same proportions."""
    from transformers import AutoImageProcessor

    name = f"{what} preprocessor_config.json"
    processor = read(AutoImageProcessor.from_pretrained, path, name)
    if image_size is None:
        return processor
    square = {"height": image_size, "width": image_size}
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    if crop is None:
        return read(AutoImageProcessor.from_pretrained, path, name, size=square)
    ratio = image_size / crop["height"]
    size = {key: round(value * ratio) for key, value in dict(processor.size).items() if value}
    return read(AutoImageProcessor.from_pretrained, path, name, size=size, crop_size=square)


class ClipEncoder(TransformersFrameEncoder):
    """CLIP's vision tower."""

    classes = {"clip": "CLIPVisionModel", "clip_vision_model": "CLIPVisionModel"}  # noqa: RUF012


class SiglipEncoder(TransformersFrameEncoder):
    """SigLIP's vision tower, and SigLIP 2's of fixed resolution, whose model_type is siglip too; no class token."""

    classes = {"siglip": "SiglipVisionModel", "siglip_vision_model": "SiglipVisionModel"}  # noqa: RUF012
    instead = {"siglip2": "that is a NaFlex checkpoint, which encoder `siglip2_naflex` reads"}  # noqa: RUF012
    class_tokens = 0


class Dinov2Encoder(TransformersFrameEncoder):
    """DINOv2, with or without registers; its positions are always interpolated to the size of the frames."""

    classes = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}  # noqa: RUF012
    interpolation: ClassVar[dict[str, bool]] = {}


class Dinov3Encoder(TransformersFrameEncoder):
    """DINOv3's vision transformers: four registers, rotary positions."""

    classes = {"dinov3_vit": "DINOv3ViTModel"}  # noqa: RUF012
    instead = {  # noqa: RUF012
        "dinov3_convnext": "that is a ConvNeXt, which has no patches to choose from; take a dinov3-vit checkpoint"
    }
    interpolation: ClassVar[dict[str, bool]] = {}
