"""Sight: any vision tower of open_clip, its own or one of timm's. Options as in `vision.py`, layers from 1 on.

A transformer's hidden states are its blocks'. A tower of stages (ConvNeXt, ResNet, FastViT, Swin) gives its stages' feature
maps, position by position and row by row: each stage has a grid and a width of its own, and there is no class token.

Cost: no block past the last chosen layer runs.

Legend: F frames, H W pixels, P patches, C width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from encoders.base import EncoderError, Features, nearest
from encoders.layers import Layers, choose_layers
from encoders.pretrained import shapes_only
from encoders.vision import FrameEncoder


class OpenClipEncoder(FrameEncoder):
    """A vision tower of open_clip: a local folder (`open_clip_config.json` + weights), or name + `pretrained`.

    `pretrained` is one of open_clip's tags, or a file. Runs no block past the chosen layer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        pretrained: str | None = None,
        layer: Layers = -2,
        features: str = "patch",
        image_size: Annotated[int, Field(ge=1)] | None = None,
        dtype: str = "float32",
        max_batch: int = 64,
    ) -> None:
        super().__init__(layer, features, image_size, max_batch)
        self.visual = _load_open_clip(path, pretrained, image_size)
        self.check_image_size(_patch_size(self.visual))
        self.preprocessing = dict(self.visual.preprocess_cfg)
        self._options["preprocessing"] = sorted(self.preprocessing.items())
        if not hasattr(self.visual, "forward_intermediates"):
            raise EncoderError(f"'{path}': its vision tower ({type(self.visual).__name__}) gives no hidden states")
        self.indices = choose_layers(layer, self._count_blocks(), first=1)
        self.stages = _has_stages(self.visual)
        if self.stages and len(self.indices) > 1:
            raise EncoderError(f"layer {layer}: the stages of '{path}' differ in their grids; choose one of them")
        self.finish(dtype)

    def _count_blocks(self) -> int:
        size = self.preprocessing["size"]
        blank = torch.zeros(1, 3, *((size, size) if isinstance(size, int) else size), device=self.device)
        with torch.no_grad():
            return len(self.visual.forward_intermediates(blank, intermediates_only=True)["image_intermediates"])

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor]:
        """-> pixel values (F,3,h,w), as open_clip's own evaluation transform gives for a picture."""
        return (open_clip_transform(segments, self.preprocessing).to(self.dtype),)

    def forward(self, pixels: Tensor) -> Features:
        blocks = sorted({index - 1 for index in self.indices})
        form = {} if self.stages else {"output_fmt": "NLC", "output_extra_tokens": True}
        found = self.visual.forward_intermediates(
            pixels, indices=blocks, stop_early=True, intermediates_only=True, **form
        )
        if self.stages:
            return self.select([grid.flatten(2).transpose(1, 2) for grid in found["image_intermediates"]], [0], 0)
        states, prefixes = found["image_intermediates"], found.get("image_intermediates_prefix")
        prefix = 0 if prefixes is None else prefixes[0].shape[1]
        if prefix:
            states = [torch.cat(pair, dim=1) for pair in zip(prefixes, states, strict=True)]
        return self.select(states, [blocks.index(index - 1) for index in self.indices], prefix)


def _load_open_clip(path: str | Path, pretrained: str | None, image_size: int | None) -> Any:
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
    elif pretrained is not None and not (Path(pretrained).is_file() or open_clip.get_pretrained_cfg(name, pretrained)):
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise EncoderError(
            f"open_clip weights could not be read: '{pretrained}' is no file, and no tag of '{name}'"
            f"{nearest(pretrained, tags)}"
        )
    try:
        return _at_size(partial(_create, name, pretrained), image_size).visual
    except Exception as error:  # open_clip raises bare RuntimeErrors, and its readers whatever they like
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise EncoderError(f"open_clip weights could not be read from '{path}': {' '.join(lines[:4])[:600]}") from error


def _at_size(create: Callable[[int | None], Any], image_size: int | None) -> Any:
    """The model for pictures of that size (None: its own).

    open_clip resizes the position embedding of its own towers in the precision of the file, which a CPU cannot where
    that is float16: they are read at their own size into float32, and resized by open_clip's function then.
    """
    from open_clip.model import resize_pos_embed

    if image_size is None or shapes_only():
        return create(image_size)
    with torch.device("meta"):
        model = create(image_size)
    if not hasattr(model.visual, "grid_size"):  # one of timm's, which open_clip resizes when it has been read
        return create(image_size)
    whole = create(None)
    state = whole.state_dict()
    resize_pos_embed(state, model)
    model.load_state_dict(state, assign=True)
    size = model.visual.preprocess_cfg["size"]
    model.visual.preprocess_cfg = {**whole.visual.preprocess_cfg, "size": size}  # mean and std came with the tag
    return model


def _create(name: str, pretrained: str | None, image_size: int | None) -> Any:
    import open_clip

    weights, silenced = not shapes_only(), logging.root.manager.disable
    if not weights:  # that they are missing is meant so
        logging.disable(max(silenced, logging.WARNING))
    try:
        return open_clip.create_model(
            name,
            pretrained=pretrained if weights else None,  # a tag's would be fetched even if they are not to be loaded
            pretrained_text=False,
            load_weights=weights,
            require_pretrained=weights,
            device=torch.get_default_device(),
            force_image_size=image_size,
        )
    finally:
        logging.disable(silenced)


def _has_stages(visual: Any) -> bool:
    """Whether a tower gives feature maps (F,C,h,w) of its stages, and no tokens beside them."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:  # open_clip's own: a transformer has one grid
        return not hasattr(visual, "grid_size")
    return "return_prefix_tokens" not in signature(trunk.forward_intermediates).parameters


def _patch_size(visual: Any) -> int | Sequence[int]:
    """In pixels; 1 where the tower has no patches of one size."""
    embedding = getattr(getattr(visual, "trunk", visual), "patch_embed", visual)
    found: int | Sequence[int] = getattr(embedding, "patch_size", 1)
    return found


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
