"""Sight: SigLIP 2 NaFlex, which keeps each picture's proportions: as many patches as fit into `max_patches`.

    (H,W) --scaled to whole patches, at most max_patches of them--> (h,w) patches, row by row --> P = h w <= max_patches

A wide picture gets a wide grid, and positions are interpolated to it, as transformers' Siglip2VisionModel has it. So the
number of patches depends on the frame's shape: `num_tokens((H,W))` tells it, and media of other shapes in the batch are
padded and masked behind it. Every projector heeds that mask; qformer and perceiver give a fixed number of tokens, pooled
and mlp one that follows the patches. There is no class token.

Cost: resizing picture by picture; the network in one call for all frames of one shape, without padding among them.

Legend: F frames, H W pixels, P patches, C width, V values of a patch (3 p^2).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from encoders.base import Encoder, Extent, Features, parse_dtype
from encoders.layers import Layers, choose_layers, join_states
from encoders.pretrained import drop_unread_blocks, load_model, read


class NaflexEncoder(Encoder):
    """`max_patches`: None is the checkpoint's own (256 in the published ones); `layer` as in `vision.py`."""

    modality_kind = "frames"

    def __init__(
        self,
        path: str | Path,
        *,
        layer: Layers = -2,
        max_patches: Annotated[int, Field(ge=1)] | None = None,
        dtype: str = "float32",
        max_batch: int = 64,
    ) -> None:
        from transformers import Siglip2ImageProcessor

        super().__init__(options={"layer": layer, "max_patches": max_patches}, max_batch=max_batch)
        classes = {"siglip2": "Siglip2VisionModel", "siglip2_vision_model": "Siglip2VisionModel"}
        instead = dict.fromkeys(
            ("siglip", "siglip_vision_model"), "its resolution is fixed: encoder `siglip2` reads it"
        )
        self.model = load_model(path, classes, "siglip2_naflex", instead=instead)
        changed = {} if max_patches is None else {"max_num_patches": max_patches}
        what = "siglip2_naflex preprocessor_config.json"
        self.processor = read(Siglip2ImageProcessor.from_pretrained, path, what, **changed)
        self._options["preprocessing"] = self.processor.to_json_string()
        config = self.model.config
        self.indices = choose_layers(layer, config.num_hidden_layers)
        drop_unread_blocks(self.model, config.num_hidden_layers, self.indices)
        self.width = config.hidden_size * len(self.indices)
        self.freeze(parse_dtype(dtype))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a frame, as the checkpoint's image processor chooses them."""
        from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

        patch = self.processor.patch_size
        pixels = get_image_size_for_max_num_patches(height, width, patch, self.processor.max_num_patches)
        return pixels[0] // patch, pixels[1] // patch

    def num_tokens(self, extent: Extent = None) -> int:
        if not isinstance(extent, tuple):
            return int(self.processor.max_num_patches)
        rows, columns = self.grid(*extent)
        return rows * columns

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> patches (F,P,V) and the grid (F,2) of each frame; all have one shape, so that the padding can go."""
        found = self.processor(images=list(segments), return_tensors="pt")
        patches = found["pixel_values"][:, : self.num_tokens((segments.shape[-2], segments.shape[-1]))]
        return patches.to(segments.device, self.dtype), found["spatial_shapes"]

    def forward(self, patches: Tensor, grid: Tensor) -> Features:
        mask = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        states = self.model(
            pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=grid, output_hidden_states=True
        ).hidden_states
        return Features(join_states(states, self.indices), mask)
