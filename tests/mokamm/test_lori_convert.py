"""`mokamm convert`: LORI_S to plain LoRA and back, folders and masks in the published form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mokamm.adapter_folder import AdapterFolder
from mokamm.adapters import wrap
from mokamm.adapters.start import adopt_a, factors
from mokamm.convert import main
from mokamm.lori_mask import read_mask
from tests.mokamm.toy_lori import IDS, OPTIONS, cut, kept, lori_s, random_b, small_llm


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """As LoRI's authors publish: a LoRA folder with zeros in B and a row of embeddings, a pickled mask; its logits."""
    llm = small_llm()
    model = get_peft_model(
        llm, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    dense = random_b(model)
    mask = cut(dense, 0.9)
    for name, (_, B) in factors(model).items():
        B.weight.data.copy_(dense[name] * kept(mask, name))
    folder = tmp_path / "published"
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    del settings["exclude_modules"]  # as an older PEFT wrote it
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(38, 16)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    state = {f"base_model.model.{name}.lora_B.default.weight": kept(mask, name) for name in mask.bits}
    torch.save(state, tmp_path / "0.9_mask.pt")
    return folder, tmp_path / "0.9_mask.pt", logits(model)


@pytest.mark.parametrize("store_a", [False, True])
def test_lori_s_becomes_lora_with_identical_logits(
    tmp_path: Path, store_a: bool, capsys: pytest.CaptureFixture
) -> None:
    model, _ = lori_s(a_seed=2, store_a=store_a, lora_dropout=0.125, exclude_modules=["k_proj"])
    model.eval().save_pretrained(tmp_path / "sparse")
    path = tmp_path / "sparse" / "adapter_config.json"
    saved = json.loads(path.read_text()) | {"base_model_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}
    path.write_text(json.dumps(saved))
    out = tmp_path / "lora"
    assert main([str(tmp_path / "sparse"), str(out), "--dry-run"]) == 0
    assert not out.exists()
    assert "would be written as lora" in capsys.readouterr().out
    assert main([str(tmp_path / "sparse"), str(out)]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert all(".lora_" in key for key in load_file(out / "adapter_model.safetensors"))
    config = json.loads((out / "adapter_config.json").read_text())
    plain = PeftModel.from_pretrained(small_llm(), out)
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-12)
    # and back: the entries that are not zero, with that A stored
    assert main([str(out), str(tmp_path / "back")]) == 0
    back = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    for one in (config, back):  # settings that both methods have
        for key in ("r", "lora_alpha", "lora_dropout", "exclude_modules", "task_type", "base_model_name_or_path"):
            assert one[key] == saved[key] not in (None, 0), key
        assert one["target_modules"] == sorted(factors(model))
        assert one["inference_mode"]
    again = PeftModel.from_pretrained(small_llm(), tmp_path / "back")
    assert again.peft_config["default"].peft_type == "LORI_S"
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-12)


def test_an_adapter_that_went_on_from_another_becomes_lora_too(tmp_path: Path) -> None:
    model, mask = lori_s()
    dense = random_b(model, seed=8)
    for name, (_, B) in factors(model).items():
        B.start(dense[name])
    model.save_pretrained(tmp_path / "sparse")
    assert main([str(tmp_path / "sparse"), str(tmp_path / "lora")]) == 0
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(torch.equal(saved[f"base_model.model.{name}.lora_B.weight"], dense[name]) for name in mask.bits)


def test_going_on_from_a_published_folder_tells_what_is_left_out(
    published: tuple, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _, _ = published
    model = wrap(small_llm(), "lori_d", ["text"], {**OPTIONS, "target_modules": ["q_proj", "up_proj"]})
    source = AdapterFolder.open(folder).source()
    adopt_a(model, source)
    assert "1 tensors of" in caplog.text
    assert "embed_tokens" in caplog.text


def test_published_folders_and_masks(published: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, pickled, expected = published
    assert main([str(folder), str(tmp_path / "a"), "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["to"] == "lori_s"
    assert "known as LoRI-S by its zeros" in found["found"]
    assert "1 tensors of" in told.err
    assert "embed_tokens" in told.err
    sparse = PeftModel.from_pretrained(small_llm(), tmp_path / "a", is_trainable=True)
    torch.testing.assert_close(logits(sparse), expected, rtol=0, atol=1e-12)
    total = sum(B.entries for _, B in factors(sparse).values())
    assert sparse.get_nb_trainable_parameters()[0] == round(0.1 * total)
    assert main([str(folder), str(tmp_path / "b"), "--to", "lora"]) == 0
    assert len(load_file(tmp_path / "b" / "adapter_model.safetensors")) == 8
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(small_llm(), tmp_path / "b")), expected, rtol=0, atol=1e-12
    )

    assert main([str(pickled), str(tmp_path / "m.safetensors")]) == 0
    mask = read_mask(tmp_path / "m.safetensors")
    for name, (_, B) in factors(sparse).items():
        assert torch.equal(kept(mask, name), B.dense() != 0)
    assert main([str(folder), str(tmp_path / "c"), "--mask", str(pickled)]) == 0
    own = wrap(small_llm(), "lori_s", ["text"], {**OPTIONS, "target_modules": ["q_proj", "up_proj"]})
    own.base_model.set_mask(mask)  # a published mask says nothing about A


@pytest.mark.parametrize(
    ("trained", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "config sets modules_to_save"),
        ({"trainable_token_indices": [3]}, "config sets trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts embeddings, by .*embed_tokens.lora_embedding_A"),
    ],
)
@pytest.mark.parametrize("to", ["lora", "lori_s"])
def test_what_is_trained_beside_a_and_b_is_refused_by_name(
    tmp_path: Path, trained: dict, named: str, to: str, capsys: pytest.CaptureFixture
) -> None:
    model = get_peft_model(
        small_llm(), LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **trained})
    )
    model.save_pretrained(tmp_path / "lora")
    assert main([str(tmp_path / "lora"), str(tmp_path / "out"), "--to", to]) != 0
    assert re.search(f"is no plain LoRA: .*{named}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_pickled_adapters_are_read_as_weights_only(published: tuple, tmp_path: Path) -> None:
    folder, _, expected = published
    state = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin")
    assert main([str(folder), str(tmp_path / "a")]) == 0
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(small_llm(), tmp_path / "a")), expected, rtol=0, atol=1e-12
    )


def test_a_dense_lora_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = wrap(small_llm(), "lori_d", ["text"], OPTIONS)
    for name, (_, B) in factors(model).items():
        B.weight.data.copy_(random_b(model)[name])
    model.save_pretrained(tmp_path / "d")
    assert main([str(tmp_path / "d"), str(tmp_path / "e"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["to"] == "lora"
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(small_llm(), tmp_path / "e")), logits(model), rtol=0, atol=1e-12
    )


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_what_cannot_be_converted(published: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, pickled, _ = published
    moka = wrap(small_llm(), "lori_moka_d", ["text"], OPTIONS)
    moka.save_pretrained(tmp_path / "moka")
    sparse, _ = lori_s(a_seed=2)
    sparse.save_pretrained(tmp_path / "other_seed")
    path = tmp_path / "other_seed" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "a_seed": 3}))
    sparse.save_pretrained(tmp_path / "newer")
    path = tmp_path / "newer" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 9}))
    sparse.save_pretrained(tmp_path / "kind")
    path = tmp_path / "kind" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORI_T"}))
    torch.save({"x.lora_B.default.weight": Evil()}, tmp_path / "evil.pt")
    torch.save({"x.lora_A.default.weight": torch.ones(2, 2)}, tmp_path / "a.pt")
    wrong = torch.load(pickled, weights_only=True)
    torch.save({key: ~where for key, where in wrong.items()}, tmp_path / "inverse.pt")
    torch.save(dict(list(wrong.items())[1:]), tmp_path / "lacking.pt")
    (tmp_path / "text.yaml").write_text("a: b")
    sparse.save_pretrained(tmp_path / "whole")
    out, mask = str(tmp_path / "out"), ["--mask", str(pickled)]
    for arguments, message in (
        ([str(tmp_path / "nothing"), out], "no such file or folder"),
        ([str(tmp_path), out], "is none of: a run or a folder with adapter_config.json"),
        ([str(tmp_path / "moka"), out], "is a MOKA adapter"),
        ([str(tmp_path / "other_seed"), out], "A cannot be remade: drawn from seed 3"),
        ([str(tmp_path / "newer"), out], "has format 9, written by a newer mokamm"),
        ([str(tmp_path / "kind"), out], "is a LORI_T adapter; expected LORA or LORI_S or MOKA"),
        ([str(tmp_path / "evil.pt"), out], "cannot be read as a mask"),
        ([str(tmp_path / "a.pt"), out], "is none of: "),
        ([str(pickled), out, "--to", "lora"], "is a mask; it cannot become lora"),
        ([str(folder), out, "--mask", str(tmp_path / "inverse.pt")], "the mask is not this adapter's"),
        ([str(folder), out, "--mask", str(tmp_path / "lacking.pt")], "the mask does not know it"),
        ([str(folder), str(tmp_path / "moka")], "is there already; nothing is overwritten"),
        ([str(folder), str(tmp_path / "text.yaml" / "zz")], "a file lies where a folder should be"),
        ([str(tmp_path / "whole"), out, *mask], "is to become lora, and is: LORI_S"),
        ([str(folder), out, "--to", "lora", *mask], "--mask makes a LORI_S of a LoRA"),
    ):
        assert main(arguments) == 2, arguments
        told = capsys.readouterr()
        assert message in told.err
        assert "executed" not in told.out
        assert not Path(out).exists()


@pytest.mark.parametrize(
    ("sparse", "gone", "message"),
    [
        (False, ".lora_A.", "{layer} has no A"),
        (False, ".lora_B.", "{layer} has no B"),
        (True, ".lori_B.values", "{layer} has 0 B.values, its B.mask keeps "),
        (True, ".lori_B.mask", "{layer} has {kept} B.values, its B.mask keeps 0"),
    ],
)
def test_a_layer_without_a_part_is_named(
    published: tuple, tmp_path: Path, capsys: pytest.CaptureFixture, sparse: bool, gone: str, message: str
) -> None:
    folder = published[0]
    if sparse:
        assert main([str(folder), str(tmp_path / "sparse")]) == 0
        folder = tmp_path / "sparse"
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = [key for key in tensors if gone in key][:2]
    kept_entries = {key: len(tensors[key]) for key in tensors if key.endswith(".values")}
    for key in lost:
        del tensors[key]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert main([str(folder), str(tmp_path / "out"), "--to", "lora"]) == 2
    told = capsys.readouterr().err
    assert "is not whole" in told
    for key in lost[:1] if sparse else lost:  # the shapes of all layers are read first, their entries one by one
        layer = key.removeprefix("base_model.model.").partition(gone)[0]
        count = kept_entries.get(f"base_model.model.{layer}.lori_B.values")
        assert message.format(layer=layer, kept=count) in told
    assert not (tmp_path / "out").exists()
