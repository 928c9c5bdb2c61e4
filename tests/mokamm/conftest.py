"""Small real parts that the tests of the model share: tokenizers with the chat templates of well-known families, two
encoders of a few weights, media files, and a Llama of ~60k parameters under MokA. Nothing is mocked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mokamm.rendering import PLAIN_TEMPLATE

# the formats that these families publish, written down anew
TEMPLATES = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
        "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + "
        "message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "phi3": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "thinking": (  # Qwen3's: the last answer's turn holds a block that the generation prompt does not announce
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% set said = message['content'] %}"
        "{% set thoughts = '' %}{% if message['role'] == 'assistant' %}{% if '</think>' in said %}"
        "{% set thoughts = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% if loop.last %}{{ '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{% endif %}{% endif %}"
        "{{ said + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{% endif %}"
    ),
    "opened": (  # as of DeepSeek's R1: the generation prompt begins the thoughts, and answers are printed without theirs
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
        "{% else %}{{ '<|assistant|>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
    ),
    "bare": (  # no end-of-turn token at all
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "plain": PLAIN_TEMPLATE,
}
TRUE_CLASSES = {  # (template, whether in SentencePiece's style) -> the class that the family's checkpoints name
    ("llama2", True): "LlamaTokenizer",
    ("mistral", True): "LlamaTokenizer",
    ("phi3", True): "LlamaTokenizer",
    ("gemma", True): "GemmaTokenizer",
    ("chatml", False): "Qwen2Tokenizer",
    ("thinking", False): "Qwen2Tokenizer",
}
CONTROL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>"]
CONTROL += ["<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CORPUS = [
    "Which instrument is sounding in the video? The red square moves to the left.",
    "How many objects are seen and heard together? two three four yes no piano flute violin",
    "[INST] <<SYS>> You are a helpful assistant. <</SYS>> [/INST] user assistant system model",
]


def make_tokenizer_(template: str = "chatml", sentencepiece: bool = False) -> Any:
    """A byte-level BPE, or one in the style of Llama-2's SentencePiece (a space before every text), with a template.

    Of the family's own class where that goes with the style, else (as Llama 3's) of the general one.
    """
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=sentencepiece, unk_token="<unk>" if sentencepiece else None))
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    if sentencepiece:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet, special = ["▁"], special + [f"<0x{i:02X}>" for i in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    own: dict[str, Any] = {"tokenizer_object": tokenizer}
    if (template, sentencepiece) in TRUE_CLASSES:
        own = {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}
    wrapped = getattr(transformers, TRUE_CLASSES.get((template, sentencepiece), "PreTrainedTokenizerFast"))(
        **own, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=[AddedToken(name, normalized=False, special=True) for name in CONTROL],
    )  # fmt: skip
    if "<think>" in TEMPLATES[template]:  # tokens that are written out, as Qwen3 and DeepSeek have them
        wrapped.add_tokens([AddedToken(name, normalized=False, special=False) for name in ("<think>", "</think>")])
    wrapped.chat_template = TEMPLATES[template]
    return wrapped


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    return make_tokenizer_


@pytest.fixture(scope="session")
def media_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip.mp4 (2 s), long.wav (2.5 s), short.wav (0.7 s), picture.png, wide.png."""
    import av
    import soundfile
    from PIL import Image

    folder = tmp_path_factory.mktemp("media")
    random = np.random.default_rng(0)
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(16):
            pixels = np.full((32, 32, 3), (16 * i, 255 - 16 * i, 90), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    for name, seconds in (("long", 2.5), ("short", 0.7)):
        samples = random.normal(0, 0.1, int(16_000 * seconds)).astype(np.float32)
        soundfile.write(folder / f"{name}.wav", samples, 16_000)
    Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "picture.png")
    Image.fromarray(random.integers(0, 255, (24, 48, 3), dtype=np.uint8)).save(folder / "wide.png")
    return folder


def make_encoders_() -> dict[str, Any]:
    """vision: 4 patches of a frame; audio: one patch for each begun tenth of a second, up to 10."""
    import torch
    from torch import nn

    from encoders.base import Encoder, Features

    class Frames(Encoder):
        modality_kind, width = "frames", 12

        def __init__(self) -> None:
            super().__init__(options={})
            self.linear = nn.Linear(3, 12)
            self.freeze()

        def num_tokens(self, length: int | None = None) -> int:
            return 4

        def preprocess(self, segments: Any, lengths: Any) -> tuple[Any]:
            return (nn.functional.adaptive_avg_pool2d(segments.float() / 255, 2).flatten(2).transpose(1, 2),)

        def forward(self, pixels: Any) -> Features:
            return Features(self.linear(pixels), torch.ones(pixels.shape[:2], dtype=torch.bool))

    class Sound(Encoder):
        modality_kind, width = "waveform", 8

        def __init__(self) -> None:
            super().__init__(options={})
            self.linear = nn.Linear(1600, 8)
            self.freeze()

        def num_tokens(self, length: int | None = None) -> int:
            return -(-(length or 0) // 1600)

        def preprocess(self, segments: Any, lengths: Any) -> tuple[Any, Any]:
            return segments.unflatten(1, (-1, 1600)), (lengths + 1599) // 1600

        def forward(self, x: Any, patches: Any) -> Features:
            mask = torch.arange(x.shape[1]) < patches[:, None]
            return Features(self.linear(x) * mask[..., None], mask)

    torch.manual_seed(1)
    return {"vision": Frames(), "audio": Sound()}


def make_model_(
    media_dir: Path,
    method: str = "moka",
    template: str = "chatml",
    cache_dir: Path | None = None,
    boundaries: bool = True,
    **processing: Any,
) -> Any:
    """A whole MultimodalLM: Llama of two layers, a Q-Former for vision (3 tokens), an MLP for audio (stride 2)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from data.media import MediaLoader
    from encoders.cache import FeatureCache
    from mokamm.adapters import wrap
    from mokamm.config_sections import ModalityConfig
    from mokamm.model import MultimodalLM
    from mokamm.perception import Perception, Sense
    from mokamm.processor import Processor
    from mokamm.projectors import build_projector

    tokenizer, encoders = make_tokenizer_(template), make_encoders_()
    torch.manual_seed(0)
    llm: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    llm = wrap(llm, method, ["text", "vision", "audio"], {"r": 3, "lora_alpha": 6})
    for name, parameter in llm.named_parameters():
        if "moka_B" in name:  # zero at the start, which would hide every mistake of the routing
            torch.nn.init.normal_(parameter, std=0.2)
    projectors = {
        "vision": build_projector("qformer", 12, 32, boundaries, tokens=3, hidden=16, heads=2, layers=2),
        "audio": build_projector("mlp", 8, 32, boundaries, stride=2),
    }
    configs = {
        "vision": {"encoder": {"name": "clip", "path": "x"}, "segments": 2, "boundaries": boundaries},
        "audio": {"encoder": {"name": "beats", "path": "x"}, "segments": 3, "seconds": 1.0, "boundaries": boundaries},
    }
    senses = {
        name: Sense.of(name, ModalityConfig.model_validate(config), encoders[name], projectors[name])
        for name, config in configs.items()
    }
    perception = Perception(encoders, FeatureCache(cache_dir, 1.0) if cache_dir else None)
    processor = Processor(tokenizer, senses, MediaLoader(media_dir), perception.lookup, **processing)
    return MultimodalLM(llm, projectors, perception, processor).eval()


@pytest.fixture(scope="session")
def make_model(media_dir: Path) -> Callable[..., Any]:
    return lambda *args, **options: make_model_(media_dir, *args, **options)


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Any]:
    """A sample from content: str, or ("video"|"image"|"audio", file), with an answer."""
    from data.schema import Media, Message, Sample, Text

    modalities = {"video": "vision", "image": "vision", "audio": "audio"}

    def make(*content: Any, answer: str | None = "two red squares", history: Any = (), question: bool = True) -> Sample:
        parts = tuple(
            Text(part, question=question) if isinstance(part, str) else Media(part[0], part[1], modalities[part[0]])
            for part in content
        )
        end = () if answer is None else (Message("assistant", (Text(answer),)),)
        return Sample(id="s", messages=(*history, Message("user", parts), *end))

    return make
