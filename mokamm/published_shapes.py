"""The shapes of models that recipes name, so that a recipe can be counted where nothing can be downloaded.

    llm_config("Qwen/Qwen3-8B")  -> a transformers config, as the model's own config.json has it (shape only)
    stand_in("clip", "openai/clip-vit-large-patch14", {}) -> an encoder on the meta device: width, patches, parameters

Figures: the published config.json of each model. Nothing here can encode or answer; what needs weights says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from encoders import check_options
from encoders.base import Encoder, Extent, parse_dtype

LLMS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-chat-hf": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Qwen/Qwen2-7B-Instruct": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "Qwen/Qwen2.5-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
}  # fmt: skip
LLMS["meta-llama/Llama-3.1-8B-Instruct"] = LLMS["meta-llama/Meta-Llama-3-8B-Instruct"]


def llm_config(path: str) -> Any | None:
    """The transformers config of a published LLM; None for one that is not listed here."""
    from transformers import AutoConfig

    if path not in LLMS:
        return None
    shape = dict(LLMS[path])
    return AutoConfig.for_model(shape.pop("model_type"), tie_word_embeddings=False, **shape)


class StandIn(Encoder):
    """An encoder without weights: what it would make of a segment, and how many parameters it has.

    window: its own window in samples, and the longest that it reads; None: any length.
    """

    def __init__(
        self, kind: str, width: int, patches: Callable[[int], int], network: nn.Module, window: int | None = None
    ) -> None:
        super().__init__()
        self.modality_kind, self.width, self._patches = kind, width, patches
        self.network = network.requires_grad_(False)
        if window is not None:
            self.window_samples = self.max_samples = window

    def num_tokens(self, extent: Extent = None) -> int:
        return self._patches(extent if isinstance(extent, int) else 0)


def _clip_large() -> StandIn:
    """CLIP ViT-L/14 at 224 pixels: 16 x 16 patches of width 1024."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    return StandIn("frames", 1024, lambda _: 256, CLIPVisionModel(config))


def _beats() -> StandIn:
    """BEATs iter3+: 12 layers of width 768, 8 patches for every 16 frames of 10 ms; without the tagging head."""
    from encoders.beats import BEATs, BeatsConfig
    from encoders.fbank import num_frames

    network = BEATs(BeatsConfig(finetuned_model=False))
    return StandIn("waveform", 768, lambda n: max(1, num_frames(n) // 16) * 8, network)


def _whisper_large() -> StandIn:
    """Whisper large-v3's encoder: 32 layers of width 1280, a position for every 20 ms of at most 30 s."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128
    )
    patches = lambda n: min(1500, max(1, math.ceil(n / 320)))  # noqa: E731
    return StandIn("waveform", 1280, patches, WhisperEncoder(config), window=480_000)


SHAPES: dict[tuple[str, str], Callable[[], StandIn]] = {
    ("clip", "openai/clip-vit-large-patch14"): _clip_large,
    ("whisper", "openai/whisper-large-v3"): _whisper_large,
}


def stand_in(name: str, path: str, options: Mapping[str, Any]) -> StandIn | None:
    """The encoder of a published model on the meta device, under its options; BEATs whatever the file's name.

    None: not listed here, or an option that makes another number of patches of a frame. Raises EncoderError for wrong
    options, as the encoder itself would.
    """
    make = SHAPES.get((name, path)) or (_beats if name == "beats" else None)
    check_options(name, options)
    if make is None or options.get("image_size") is not None or options.get("features", "patch") != "patch":
        return None
    with torch.device("meta"):
        encoder = make()
    layer = options.get("layer")
    encoder.width *= len(layer) if isinstance(layer, list) else 1
    return encoder.to(parse_dtype(options.get("dtype", "float32")))
