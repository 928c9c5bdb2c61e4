"""Small checkpoints of the true architectures, as files, at the very names that the recipes give them.

    meta-llama/Meta-Llama-3-8B-Instruct   LlamaForCausalLM, byte-level BPE without a pad token, Llama-3's headers
    Qwen/Qwen3-8B                         Qwen3ForCausalLM, Qwen2Tokenizer, ChatML with a block of thinking
    Qwen/Qwen2-7B-Instruct                Qwen2ForCausalLM, Qwen2Tokenizer, ChatML with a system turn of its own
    openai/clip-vit-large-patch14         CLIPVisionModel + CLIPImageProcessor, the miniature base's trained tower
    google/siglip2-base-patch16-224       SiglipVisionModel + SiglipImageProcessor, random
    weights/BEATs_iter3_plus_AS2M.pt      BEATs in the published layout, the miniature base's
    openai/whisper-large-v3               WhisperModel + WhisperFeatureExtractor of the published 30 s, random

A recipe that is started in that folder finds them by its own paths. The LLMs are random; `tests/recipes/run.py` trains
them on text first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.mokamm.conftest import TEMPLATES

BASE = Path(__file__).resolve().parents[2] / "mokamm" / "mini"
WIDTH = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3}
LLAMA3 = "meta-llama/Meta-Llama-3-8B-Instruct"
QWEN2, QWEN3 = "Qwen/Qwen2-7B-Instruct", "Qwen/Qwen3-8B"
CLIP, SIGLIP, WHISPER = "openai/clip-vit-large-patch14", "google/siglip2-base-patch16-224", "openai/whisper-large-v3"
BEATS = "weights/BEATs_iter3_plus_AS2M"
QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# ---- LLMs ------------------------------------------------------------------------------------------------------------


def write_llm(path: str, folder: Path, texts: list[str]) -> None:
    """A random LLM of that family, and its tokenizer trained on `texts`."""
    import transformers as t

    tokenizer = llama3_tokenizer(texts) if path == LLAMA3 else qwen_tokenizer(texts, path)
    shared = {**WIDTH, "num_key_value_heads": 1, "max_position_embeddings": 2048, "vocab_size": len(tokenizer)}
    shared |= {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    if path == LLAMA3:
        llm: Any = t.LlamaForCausalLM(t.LlamaConfig(**{**shared, "rope_theta": 500_000.0}))
        ends = ["<|end_of_text|>", "<|eot_id|>"]
        llm.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(end) for end in ends]
    elif path == QWEN3:
        llm = t.Qwen3ForCausalLM(t.Qwen3Config(**shared, head_dim=64))
    else:
        llm = t.Qwen2ForCausalLM(t.Qwen2Config(**shared))
    llm.to(torch.bfloat16).save_pretrained(folder / path)
    tokenizer.save_pretrained(folder / path)


def llama3_tokenizer(texts: list[str]) -> Any:
    """As published: no pad token, the text's begin put before every text, <|eot_id|> ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = _bpe(texts)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(special)
    begin = (special[0], tokenizer.token_to_id(special[0]))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[begin])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[4])
    wrapped.chat_template = TEMPLATES["llama3"]
    return wrapped


def qwen_tokenizer(texts: list[str], path: str) -> Any:
    from transformers import Qwen2Tokenizer

    vocabulary, merges = _bpe(texts)
    tokenizer = Qwen2Tokenizer(
        vocabulary, merges, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATES["thinking"] if path == QWEN3 else QWEN2_TEMPLATE
    return tokenizer


def _bpe(texts: list[str], size: int = 512) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


# ---- encoders --------------------------------------------------------------------------------------------------------


def write_clip(folder: Path) -> None:
    """The miniature base's open_clip tower under CLIP's own names: it is the same architecture."""
    import json

    from safetensors.torch import load_file
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    cfg = json.loads((BASE / "vision" / "open_clip_config.json").read_text())
    shape, look = cfg["model_cfg"]["vision_cfg"], cfg["preprocess_cfg"]
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=shape["width"], intermediate_size=round(shape["width"] * shape["mlp_ratio"]),
            num_hidden_layers=shape["layers"], num_attention_heads=shape["width"] // shape["head_width"],
            image_size=shape["image_size"], patch_size=shape["patch_size"], hidden_act="gelu",
        )
    )  # fmt: skip
    state = load_file(BASE / "vision" / "open_clip_model.safetensors")
    model.load_state_dict(clip_state({k: v.float() for k, v in state.items()}, model.state_dict()))
    model.save_pretrained(folder / CLIP)
    size = {"height": shape["image_size"], "width": shape["image_size"]}
    CLIPImageProcessor(size=size, do_center_crop=False, image_mean=look["mean"], image_std=look["std"]).save_pretrained(
        folder / CLIP
    )


def clip_state(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's tensors of the vision tower by the names that transformers' CLIP gives them (`own`)."""
    blocks = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    outside = {
        "class_embedding": "class_embedding", "patch_embedding.weight": "conv1.weight",
        "position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post",
    }  # fmt: skip
    found = {}
    for name in own:
        if ".layers." not in name:
            there = next(
                name.partition(k)[1] and name[name.index(k) :].replace(k, v) for k, v in outside.items() if k in name
            )
            found[name] = state[f"visual.{there}"]
            continue
        number, _, rest = name.partition(".layers.")[2].partition(".")
        block = f"visual.transformer.resblocks.{number}."
        part, _, kind = rest.rpartition(".")
        if part[-6:] in ("q_proj", "k_proj", "v_proj"):
            joint = state[f"{block}attn.in_proj_{kind}"]
            found[name] = joint.chunk(3)["qkv".index(part[-6])].clone()
        else:
            found[name] = state[f"{block}{blocks[part]}.{kind}"]
    return found


def write_siglip(folder: Path) -> None:
    """SigLIP 2's fixed resolution has SigLIP's architecture; weights of the usual scale, not of the library's tiny one."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
    SiglipVisionModel(SiglipVisionConfig(**shape, image_size=64, patch_size=8)).save_pretrained(folder / SIGLIP)
    SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / SIGLIP)


def write_beats(folder: Path) -> None:
    """The published form: a pickle of cfg and tensors, which `mokamm convert` makes the recipe's safetensors of."""
    from encoders.beats import load_beats, save_beats

    (folder / BEATS).parent.mkdir(parents=True, exist_ok=True)
    save_beats(folder / f"{BEATS}.pt", load_beats(BASE / "audio.safetensors"))


def write_whisper(folder: Path) -> None:
    """128 mel bins and 1500 positions, as large-v3 has them; random, since the miniature base's hears 4 s only."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=8, num_mel_bins=128, d_model=96, encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=192,
        decoder_layers=1, decoder_attention_heads=3, decoder_ffn_dim=32, max_source_positions=1500,
        max_target_positions=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(folder / WHISPER)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(folder / WHISPER)
