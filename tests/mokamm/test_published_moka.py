"""Published MokA checkpoints, made here with the published names: read, written, and equal to the plain formula."""

from __future__ import annotations

import json
import math
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, LlamaConfig, LlamaForCausalLM

from data.schema import UserError
from mokamm.adapters import wrap
from mokamm.convert import main as convert
from mokamm.projectors import build_projector
from mokamm.published_moka import ADAPTER_FILE, OTHER_FILE, published_files, read_published, write_published
from mokamm.routing import Routing
from mokamm.weights import load_adapter, manifest_problems

R, ALPHA = 4, 16
IDS = torch.tensor([[0, 1, 1, 0, 2, 2, 0, 0, 0], [0, 2, 1, 1, 0, 0, 0, 0, 0]])
KEYS = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1, 1, 0]]).bool()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def linears(llm: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in llm.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def adapter_state(llm: nn.Module, factors: dict[str, bool]) -> dict[str, Tensor]:
    """Random matrices with published names; factors: name -> whether it is an A."""
    torch.manual_seed(1)
    return {
        f"base_model.model.{name}.lora_{factor}.weight": torch.randn(
            (R, m.in_features) if is_a else (m.out_features, R), dtype=torch.float64
        )
        * 0.1
        for name, m in linears(llm).items()
        for factor, is_a in factors.items()
    }


AUDIO_VISUAL = {"A0": True, "A1": True, "A2": True, "B0": False}
VISUAL_TEXT = {"A.text": True, "A.image": True, "B.text": False}


def publish(folder: Path, adapter: dict[str, Tensor], other: dict[str, Tensor]) -> Path:
    folder.mkdir()
    if adapter:
        torch.save(adapter, folder / ADAPTER_FILE)
        (folder / "adapter_config.json").write_text('{"r": "444", "lora_alpha": 16, "lora_dropout": 0.05}')
    torch.save(other, folder / OTHER_FILE)
    return folder


def attended(query: Tensor, keys: Tensor, over: int = R) -> Tensor:
    """One token's softmax over the keys, in a loop: (R,)."""
    scores = torch.stack([torch.exp(query @ key / math.sqrt(over)) for key in keys])
    return sum((score / scores.sum() * key for score, key in zip(scores, keys, strict=True)), torch.zeros(R).double())


def audio_visual_update(state: dict[str, Tensor], name: str, x: Tensor, by_keys: bool = False) -> Tensor:
    """B (s A_m x + attention over s A_text x_q): s before the attention."""
    A = [state[f"base_model.model.{name}.lora_A{i}.weight"] for i in range(3)]
    B, s = state[f"base_model.model.{name}.lora_B0.weight"], ALPHA / R
    out = torch.zeros(*x.shape[:2], len(B)).double()
    for b in range(len(x)):
        keys = torch.stack([s * A[0] @ x[b, q] for q in range(x.shape[1]) if KEYS[b, q]])
        for t in range(x.shape[1]):
            z = s * A[int(IDS[b, t])] @ x[b, t]
            out[b, t] = B @ (z + attended(z, keys, len(keys) if by_keys else R) if IDS[b, t] else z)
    return out


def visual_text_update(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """s B (A_m x + 0.05 attention) in layer 0; every token through A_text in the others."""
    text, image, B = (state[f"base_model.model.{name}.lora_{f}.weight"] for f in ("A.text", "A.image", "B.text"))
    if ".layers.0." not in name:
        return ALPHA / R * x @ text.T @ B.T
    out = torch.zeros(*x.shape[:2], len(B)).double()
    for b in range(len(x)):
        keys = torch.stack([text @ x[b, q] for q in range(x.shape[1]) if KEYS[b, q]])
        for t in range(x.shape[1]):
            z = (image if IDS[b, t] else text) @ x[b, t]
            out[b, t] = ALPHA / R * B @ (z + 0.05 * attended(z, keys) if IDS[b, t] else z)
    return out


@pytest.mark.parametrize(
    ("factors", "update", "ids", "by_keys"),
    [
        (AUDIO_VISUAL, audio_visual_update, IDS, False),
        (AUDIO_VISUAL, partial(audio_visual_update, by_keys=True), IDS, True),
        (VISUAL_TEXT, visual_text_update, IDS.clamp(max=1), False),
    ],
    ids=["audio-visual", "audio-visual of before 2025-12-28", "visual-text"],
)
def test_the_converted_adapter_computes_what_the_published_one_did(factors, update, ids, by_keys, tmp_path):
    state = adapter_state(llama(), factors)
    published = publish(tmp_path / "published", state, {})
    assert published_files(published)
    read = read_published(published, by_keys)
    untrained = {key for key in state if ".layers.0." not in key and ".lora_A.image." in key}
    assert set(read.left_out) == untrained
    assert set(read.used) == set(state) - untrained
    write_published(read, tmp_path / "ours")

    plain = llama()
    for name, module in linears(plain).items():
        module.register_forward_hook(lambda _, inputs, h, name=name: h + update(state, name, inputs[0]))
    model = PeftModel.from_pretrained(llama(), str(tmp_path / "ours" / "adapter")).eval()
    model.base_model.set_routing(Routing(ids, KEYS))
    x = torch.randn(*IDS.shape, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = plain(inputs_embeds=x).logits, model(inputs_embeds=x).logits
    assert (expected - llama()(inputs_embeds=x).logits).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the file's float32


WIDTH, HIDDEN, OUT, TOKENS = 20, 16, 12, 5


def published_projector(prefix: str, word: str) -> tuple[dict[str, Tensor], nn.ModuleDict]:
    """A projector in the published naming, and the modules of transformers that compute what it says."""
    torch.manual_seed(3)
    config = Blip2QFormerConfig(
        vocab_size=7, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=12, intermediate_size=4 * HIDDEN,
        cross_attention_frequency=1, encoder_hidden_size=WIDTH,
    ).to_dict() | {"num_attention_heads": 4}  # fmt: skip
    parts = nn.ModuleDict(
        {
            "ln": nn.LayerNorm(WIDTH),
            "qformer": Blip2QFormerModel(Blip2QFormerConfig(**config)).eval(),
            "proj": nn.Sequential(nn.Linear(HIDDEN, OUT), nn.GELU(), nn.Linear(OUT, OUT)),
        }
    )
    for parameter in parts.parameters():
        nn.init.normal_(parameter, std=0.3)
    parts.tokens = nn.Parameter(torch.randn(1, TOKENS, HIDDEN))
    state = {f"{word}_ln.{k}": v for k, v in parts["ln"].state_dict().items()}
    state |= {f"{word}_proj.{k}": v for k, v in parts["proj"].state_dict().items()}
    state[f"{word}_query_tokens"] = parts.tokens.detach()
    for key, value in parts["qformer"].state_dict().items():
        bert = key.replace("attention.attention.", "attention.self.")
        bert = bert.replace("layernorm.", "embeddings.LayerNorm.") if bert.startswith("layernorm") else bert
        state[f"{word}_Qformer.bert.{bert}"] = value
    for layer in (0, 1):  # the text branch, saved but never run
        state[f"{word}_Qformer.bert.encoder.layer.{layer}.intermediate.dense.weight"] = torch.randn(64, HIDDEN)
        state[f"{word}_Qformer.bert.encoder.layer.{layer}.output.LayerNorm.bias"] = torch.randn(HIDDEN)
    state[f"{word}_Qformer.bert.embeddings.position_ids"] = torch.arange(9)[None]
    return {f"{prefix}.{key}": value for key, value in state.items()}, parts


def test_projectors_compute_what_the_published_ones_did(tmp_path):
    visual, parts = published_projector("model.vl_projector", "visual")
    audio, _ = published_projector("base_model.model.model.al_projector", "audio")
    boundary = {"model.embed_tokens.weight": torch.randn(3, OUT)}
    read = read_published(publish(tmp_path / "published", {}, {**visual, **audio, **boundary}))
    write_published(read, tmp_path / "ours")
    state = load_file(tmp_path / "ours" / "projectors.safetensors")
    assert set(read.used) | set(read.left_out) == {*visual, *audio, *boundary}
    assert len(read.left_out) == 2 * 5 + 1

    ours = build_projector("qformer", WIDTH, OUT, False, tokens=TOKENS, hidden=HIDDEN, heads=4).eval()
    for modality in ("vision", "audio"):
        ours.load_state_dict({k.partition(".")[2]: v for k, v in state.items() if k.startswith(modality)})
    ours.load_state_dict({k.partition(".")[2]: v for k, v in state.items() if k.startswith("vision")})
    features = torch.randn(3, 7, WIDTH)
    with torch.no_grad():
        hidden = parts["qformer"](parts.tokens.expand(3, -1, -1), encoder_hidden_states=parts["ln"](features))
        expected = parts["proj"](hidden.last_hidden_state)
        found = ours(features, torch.ones(3, 7).bool())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_run_that_computes_otherwise_than_the_checkpoint_is_told(tmp_path, caplog):
    write_published(read_published(publish(tmp_path / "p", adapter_state(llama(), VISUAL_TEXT), {})), tmp_path / "ours")
    options = {"r": 4, "lora_alpha": 16, "attention_weight": 0.05, "scale_logits": False}
    model = wrap(llama(), "moka", ["vision"], options)
    load_adapter(model, tmp_path / "ours" / "adapter")
    assert "attention_weight: 0.0 there, 0.05 in the configuration" in caplog.text
    assert "attention_weight_pattern" in caplog.text
    assert "scale_logits" not in caplog.text


def test_what_is_not_understood_is_an_error_that_names_it(tmp_path):
    state = adapter_state(llama(), AUDIO_VISUAL)
    gone = next(key for key in state if key.endswith("lora_B0.weight"))
    del state[gone]
    folder = publish(tmp_path / "a", state, {"model.al_projector.audio_Qformer.strange": torch.zeros(2)})
    with pytest.raises(UserError, match=r"strange(.|\n)*lora_B0 is missing"):
        read_published(folder)
    mixed = adapter_state(llama(), AUDIO_VISUAL) | adapter_state(llama(), VISUAL_TEXT)
    with pytest.raises(UserError, match="mixes the namings"):
        read_published(publish(tmp_path / "b", mixed, {}))
    with pytest.raises(UserError, match="no published MokA checkpoint"):
        read_published(tmp_path)


def test_a_projector_that_is_not_whole_is_refused_and_told_what_lacks(tmp_path, capsys):
    whole, _ = published_projector("model.vl_projector", "visual")
    lost = ("Qformer.bert.encoder.layer.0.crossattention.self.key.bias", "proj.2.weight", "query_tokens")
    state = {key: tensor for key, tensor in whole.items() if not key.endswith(lost)}
    assert len(state) == len(whole) - 3
    source = publish(tmp_path / "a", {}, state)
    assert convert([str(source), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "is not read: 3 mistakes" in told
    for name in ("queries.weight", "encoder.layer.0.crossattention.attention.key.bias", "output.2.weight"):
        assert f"  - missing: vision.{name}\n" in told
    assert not (tmp_path / "out").exists()
    only_text = {key: tensor for key, tensor in whole.items() if ".layer.1." not in key or "layer.1.output." in key}
    with pytest.raises(UserError, match=r"missing: vision\.encoder\.layer\.1\.attention"):  # its text branch is there
        read_published(publish(tmp_path / "b", {}, only_text))


@pytest.mark.parametrize("content", ["[1]", '{"lora_alpha": null}', '{"lora_alpha": "x"}', "{"])
def test_a_damaged_configuration_beside_it_is_named(content, tmp_path):
    folder = publish(tmp_path / "a", adapter_state(llama(), AUDIO_VISUAL), {})
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        read_published(folder)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_layer_without_a_module_that_others_have_is_named(layer, backwards, tmp_path):
    state = adapter_state(llama(), AUDIO_VISUAL)
    state = {key: tensor for key, tensor in state.items() if f"layers.{layer}.mlp.up_proj" not in key}
    state = dict(reversed(state.items())) if backwards else state
    with pytest.raises(UserError, match=rf"missing: model\.layers\.{layer}\.mlp\.up_proj, which other layers have"):
        read_published(publish(tmp_path / "a", state, {}))


def test_matrices_of_another_rank_are_refused(tmp_path):
    state = adapter_state(llama(), AUDIO_VISUAL)
    name = "base_model.model.model.layers.1.mlp.up_proj"
    state[f"{name}.lora_A2.weight"] = torch.zeros(R + 1, 16)
    with pytest.raises(UserError, match="the ranks differ: 4, 5; this layer has one rank for all modalities"):
        read_published(publish(tmp_path / "a", state, {}))


@pytest.mark.parametrize("shape", [(R, 17), (R,), ()])
def test_matrices_of_another_shape_are_named(shape, tmp_path):
    state = adapter_state(llama(), AUDIO_VISUAL)
    state["base_model.model.model.layers.1.mlp.up_proj.lora_A2.weight"] = torch.zeros(shape)
    told = rf"model\.layers\.1\.mlp\.up_proj: its matrices .* lora_A2 {re.escape(str(shape))}, lora_B0 \(24, 4\)"
    with pytest.raises(UserError, match=told):
        read_published(publish(tmp_path / "a", state, {}))


def test_a_visual_text_checkpoint_may_have_an_image_matrix_in_layer_0_only(tmp_path):
    state = adapter_state(llama(), VISUAL_TEXT)
    trained = {key: tensor for key, tensor in state.items() if ".layers.0." in key or ".lora_A.image." not in key}
    assert len(trained) < len(state)
    whole, short = (read_published(publish(tmp_path / n, s, {})) for n, s in (("a", state), ("b", trained)))
    assert short.used.keys() == trained.keys()
    assert all(torch.equal(tensor, short.adapter[key]) for key, tensor in whole.adapter.items())
    lost = {
        key: tensor for key, tensor in state.items() if not key.endswith("layers.0.mlp.up_proj.lora_A.image.weight")
    }
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj: lora_A\.image is missing"):
        read_published(publish(tmp_path / "c", lost, {}))


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    for name, other in (("a", {}), ("b", {"model.embed_tokens.weight": torch.zeros(3, OUT)})):
        with pytest.raises(UserError, match="neither an adapter nor a projector"):
            read_published(publish(tmp_path / name, {}, other))


@pytest.mark.parametrize("factors", [AUDIO_VISUAL, VISUAL_TEXT], ids=["audio-visual", "visual-text"])
def test_keys_with_the_adapters_name_in_them(factors, tmp_path):
    state = adapter_state(llama(), factors)
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in state.items()}
    found = [
        read_published(publish(tmp_path / name, content, {})) for name, content in (("plain", state), ("named", named))
    ]
    assert found[0].moka == found[1].moka
    assert found[0].adapter.keys() == found[1].adapter.keys()
    assert all(torch.equal(tensor, found[1].adapter[key]) for key, tensor in found[0].adapter.items())


def test_settings_are_those_beside_it_or_the_published_codes_own(tmp_path):
    folder = publish(tmp_path / "a", adapter_state(llama(), AUDIO_VISUAL), {})
    for settings, alpha, dropout, base in (
        ({"lora_alpha": 8, "lora_dropout": 0.25, "base_model_name_or_path": "some/llm"}, 8, 0.25, "some/llm"),
        ({}, 16, 0.05, None),
        (None, 16, 0.05, None),
    ):
        path, out = folder / "adapter_config.json", tmp_path / f"out {settings}".replace("/", "-")
        path.unlink() if settings is None else path.write_text(json.dumps(settings))
        assert convert([str(folder), str(out)]) == 0
        found = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert (found["lora_alpha"], found["lora_dropout"], found["base_model_name_or_path"]) == (alpha, dropout, base)


def test_queries_with_and_without_a_batch_are_the_same(tmp_path):
    whole, parts = published_projector("model.vl_projector", "visual")
    key = next(key for key in whole if key.endswith("query_tokens"))
    for folder, queries in (("a", whole[key]), ("b", whole[key][0])):
        read = read_published(publish(tmp_path / folder, {}, whole | {key: queries}))
        assert torch.equal(read.projectors["vision.queries.weight"], parts.tokens[0])


def test_projectors_of_stage_1_in_files_of_any_name(tmp_path, capsys):
    folder = tmp_path / "stage1"
    folder.mkdir()
    visual, audio = (
        published_projector(f"model.{k}_projector", name)[0] for k, name in (("vl", "visual"), ("al", "audio"))
    )
    torch.save(visual, folder / "visual_pretrain.bin")
    assert convert([str(folder / "visual_pretrain.bin"), "--dry-run"]) == 0
    assert "stage 1 checkpoint of MokA" in capsys.readouterr().out
    torch.save(audio, folder / "audio_pretrain.bin")
    torch.save(Code(), folder / "training_args.bin")  # as a Trainer leaves beside them; it is not run
    assert convert([str(folder), str(tmp_path / "out")]) == 0
    names = {name.partition(".")[0] for name in load_file(tmp_path / "out/projectors.safetensors")}
    assert names == {"vision", "audio"}
    torch.save(visual, folder / "more.bin")
    capsys.readouterr()
    assert convert([str(folder), "--dry-run"]) == 2
    assert "is in visual_pretrain.bin and in another file" in capsys.readouterr().err
    (folder / "more.bin").write_bytes(b"cut off")
    assert convert([str(folder), "--dry-run"]) == 2
    assert "more.bin cannot be read as tensors" in capsys.readouterr().err
    torch.save(Code(), folder / "more.bin")
    assert convert([str(folder), "--dry-run"]) == 2
    assert "more.bin cannot be read as tensors (weights_only): it holds Python objects" in capsys.readouterr().err
    torch.save({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(2, 2)}, folder / ADAPTER_FILE)
    (folder / "more.bin").unlink()
    assert (
        convert([str(folder), "--dry-run"]) == 2
    )  # an adapter of another kind beside the projectors is not passed over
    assert "lora_A.weight (2, 2): no rule knows this key" in capsys.readouterr().err


def test_a_file_or_folder_that_is_none_of_them(tmp_path, capsys):
    torch.save({"model.embed.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    torch.save(Code(), tmp_path / "training_args.bin")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert convert([str(source), str(tmp_path / "out")]) == 2
        assert f"{source} is none of: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as leaving:
        convert([str(tmp_path)])
    assert leaving.value.code == 2
    assert "OUT is missing" in capsys.readouterr().err


class Code:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_pickle_that_holds_code_is_refused(tmp_path):
    (tmp_path / "p").mkdir()
    torch.save({"model.vl_projector.visual_ln.weight": Code()}, tmp_path / "p" / OTHER_FILE)
    with pytest.raises(UserError, match="weights_only"):
        read_published(tmp_path / "p")


def test_the_command_accounts_for_every_key_and_a_run_can_begin_from_the_result(tmp_path, capsys):
    visual, _ = published_projector("model.vl_projector", "visual")
    adapter = adapter_state(llama(), AUDIO_VISUAL)
    source = publish(tmp_path / "published", adapter, visual)
    assert convert(["--dry-run", "--json", str(source), str(tmp_path / "ours")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["to"], told["written"]) == ("moka", False)
    used = len(adapter) + len(visual) - 5
    assert f"audio-visual checkpoint of MokA: {used} keys used, 5 left out" in told["found"]
    assert "text branch" in told["warnings"][0]
    assert not (tmp_path / "ours").exists()
    assert convert([str(source), str(tmp_path / "ours")]) == 0
    assert manifest_problems(tmp_path / "ours") == []
    config = json.loads((tmp_path / "ours" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["modalities"]) == ("MOKA", 4, ["text", "vision", "audio"])
    assert convert(["--to", "lora", str(source), str(tmp_path / "other")]) == 2
    assert "cannot become lora" in capsys.readouterr().err
