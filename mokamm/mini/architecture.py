"""The shapes of the miniature base, each in its family's own configuration class and file format.

llm/              Llama, 5 layers of width 192, byte-level BPE, a chat template
vision/           an open_clip folder: ViT, 8 x 8 patches of 8 x 8 pixels
audio.safetensors BEATs, 3 layers of width 128
speech/           Whisper, encoder of 4 layers, windows of 4 s
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import open_clip
    from tokenizers import Tokenizer
    from torch import nn
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, WhisperModel

    from encoders.beats import BEATs

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}{{ message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY = 512
SPEECH_SECONDS = 4
CLIP_TEXT_LENGTH = 48

VISION: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32, "mlp_ratio": 3.0},
    "text_cfg": {
        "context_length": CLIP_TEXT_LENGTH, "vocab_size": VOCABULARY, "width": 64, "heads": 2, "layers": 2,
        "pool_type": "eos", "eos_id": 2,
    },
}  # fmt: skip
PREPROCESS = {
    "mean": [0.25, 0.25, 0.25],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens, and the chat template of the miniature base."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[3:]),
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def new_llm(vocabulary: int) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    # heads of width 64: with six of 32, looking up was not learned in the time that three of 64 need for it
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def new_vision() -> open_clip.CLIP:
    """An open_clip CLIP model; its text tower reads the LLM's tokens and serves the contrastive training only."""
    import open_clip

    return open_clip.CLIP(VISION["embed_dim"], dict(VISION["vision_cfg"]), dict(VISION["text_cfg"]))


def new_audio() -> BEATs:
    from encoders.beats import BEATs, BeatsConfig

    return BEATs(
        BeatsConfig(
            encoder_layers=3, embed_dim=96, encoder_embed_dim=128, encoder_ffn_embed_dim=384, encoder_attention_heads=4,
            conv_pos=16, conv_pos_groups=4, num_buckets=32, max_distance=64,
        )
    )  # fmt: skip


def new_speech() -> WhisperModel:
    """A Whisper model; its decoder is the smallest possible, since only the encoder is trained and kept in use."""
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=8, num_mel_bins=80, d_model=160, encoder_layers=4, encoder_attention_heads=5, encoder_ffn_dim=480,
        decoder_layers=1, decoder_attention_heads=5, decoder_ffn_dim=32, max_source_positions=50 * SPEECH_SECONDS,
        max_target_positions=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperModel(config)


def native_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16; where it only imitates it, float32 is faster."""
    import torch

    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def save_llm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_vision(model: nn.Module, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": VISION, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def save_audio(model: BEATs, path: Path) -> None:
    import torch

    from encoders.beats import save_beats

    save_beats(path, model.to(torch.float16))


def save_speech(model: WhisperModel, folder: Path) -> None:
    from transformers import WhisperFeatureExtractor

    model.half().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80, chunk_length=SPEECH_SECONDS).save_pretrained(folder)


def write_random(folder: str | Path) -> None:
    """Write a base of the same files with random weights: for tests of everything but accuracy."""
    from data.miniworld.scene import BASE
    from mokamm.mini.text import corpus

    folder = Path(folder)
    tokenizer = train_tokenizer(corpus(200, BASE, seed=0))
    save_llm(new_llm(len(tokenizer)), tokenizer, folder / "llm")
    save_vision(new_vision(), folder / "vision")
    save_audio(new_audio(), folder / "audio.safetensors")
    save_speech(new_speech(), folder / "speech")
