"""The whole model against plain loops, transformers' own loss, and its own invariances (a tiny Llama with MokA)."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors.torch import save_file

from data.collate import collate
from data.schema import IGNORED, Message, Text, UserError
from mokamm.adapters import RoutedLinear, wrap
from mokamm.build import build_model, load_llm, load_tokenizer, trainable_parts
from mokamm.config import RunConfig, load_config
from mokamm.config_sections import EvaluationConfig, LLMConfig
from mokamm.init_from import load_init
from mokamm.model import user_message

METHODS = ["moka", "multi_lora", "lora", "dora", "hira", "full", "none"]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def samples(make_sample):
    history = (Message("user", (Text("Which?"),)), Message("assistant", (Text("two"),)))
    return [
        make_sample(("video", "clip.mp4"), ("audio", "long.wav"), "How many are sounding?"),
        make_sample("Only text here?", answer="yes"),
        make_sample(("audio", "short.wav"), "Which one?", ("image", "wide.png"), ("image", "picture.png"), answer="no"),
        make_sample(("audio", "short.wav"), answer="a violin", history=history),
    ]


def batch_of(model, samples, side="right"):
    return collate([model.processor(sample) for sample in samples], model.processor.pad_id, side=side)


def rows_of(model, samples, side="right"):
    """Each sample's logits without padding."""
    batch = batch_of(model, samples, side)
    with torch.no_grad():
        logits = model(batch)["logits"]
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"], strict=True)]


def test_embedding_is_a_plain_loop(model, samples):
    """Token by token, item by item, each segment encoded and projected alone."""
    with torch.no_grad():
        found = model.embed(batch_of(model, samples))
        table = model.llm.get_input_embeddings().weight
        for b, sample in enumerate(samples):
            example = model.processor(sample)
            expected = [table[i] for i in example.input_ids]
            for item in example.media:
                encoder, projector = model.perception.encoders[item.modality], model.projectors[item.modality]
                t = item.start
                if item.boundaries:
                    expected[t - 1], expected[t + sum(item.counts)] = projector.boundaries.weight
                for f, count in enumerate(item.counts):
                    lengths = None if item.lengths is None else item.lengths[f : f + 1]
                    tokens = projector(*encoder.encode(item.segments[f : f + 1], lengths))[0]
                    for k in range(count):
                        expected[t] = tokens[k]
                        t += 1
            torch.testing.assert_close(found[b, : len(expected)], torch.stack(expected), rtol=0, atol=1e-6)


def test_loss_is_that_of_transformers(model, samples):
    for side in ("right", "left"):
        batch = batch_of(model, samples, side)
        with torch.no_grad():
            out = model(batch)
            reference = model.llm(
                inputs_embeds=model.embed(batch),
                attention_mask=batch["attention_mask"],
                position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0),
                labels=batch["labels"],
            )
        tokens = int((batch["labels"] != IGNORED).sum())
        assert int(out["tokens"]) == tokens > 0
        torch.testing.assert_close(out["loss_sum"] / tokens, reference.loss, rtol=1e-5, atol=0)
        assert out["loss_sum"].dtype == torch.float32


HEADS = {  # an LLM whose head does more, or is itself adapted, changed or not asked by name
    "llama": {}, "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8}, "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3}, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("method", ["moka", "lora", "full"])
@pytest.mark.parametrize("name", HEADS)
def test_the_head_computes_the_answers_alone_where_asked(make_model, samples, name, method):
    """Loss, gradients and rows of logits are those of all logits; the head's own input has no other rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = make_model()
    shape = {"vocab_size": len(model.tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
    shape = {"vocab_size": len(model.tokenizer)} if name == "gpt2" else shape
    targets = {"target_modules": "all-linear" if name == "gpt2" else ["q_proj", "down_proj", "lm_head"]}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape | HEADS[name]))
    if method == "full" or not llm.config.tie_word_embeddings:
        options = {"r": 3, "lora_alpha": 6, **targets}
    else:
        options = {"r": 3, "lora_alpha": 6}
    model.llm = wrap(llm, method, ["text", "vision", "audio"], options).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    seen = []
    model.llm.get_output_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    found = []
    for answers_only in (False, True):
        model.zero_grad()
        out = model(batch_of(model, samples), answers_only=answers_only)
        out["loss_sum"].backward()
        found.append((out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (whole, expected), (alone, gradients) = found
    places = (batch_of(model, samples)["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
    torch.testing.assert_close(alone["logits"], whole["logits"][places], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone["loss_sum"], whole["loss_sum"], rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys() != set()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5, msg=key)
    assert len(places[0]) == int(alone["tokens"]) < seen[0][0] * seen[0][1]
    routed = isinstance(model.llm.get_output_embeddings(), RoutedLinear)  # it is told of (B,T)
    assert seen[1] == (seen[0] if routed else (1, len(places[0]), 32))
    assert not model.llm.get_output_embeddings()._forward_pre_hooks


def test_a_batch_without_answers_has_no_loss(model, samples):
    batch = batch_of(model, samples)
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    out = model(batch, answers_only=True)
    assert out["logits"].shape[0] == int(out["tokens"]) == float(out["loss_sum"].detach()) == 0
    out["loss_sum"].backward()  # ranks that have answers wait for the others' gradients


def test_padding_and_company_change_nothing(model, samples):
    alone = [rows_of(model, [sample])[0] for sample in samples]
    for side in ("right", "left"):
        for expected, found in zip(alone, rows_of(model, samples, side), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_no_token_sees_a_later_one_and_no_prompt_sees_the_answer(model, make_sample):
    content = (("video", "clip.mp4"), ("audio", "short.wav"), "How many are sounding?")
    first, second = (make_sample(*content, answer=answer) for answer in ("two red squares", "no violin at all"))
    prompt = len(model.processor(first, for_generation=True).input_ids)
    a, b = rows_of(model, [first])[0], rows_of(model, [second])[0]
    assert torch.equal(a[:prompt], b[:prompt])
    assert not torch.equal(a[prompt], b[prompt])
    batch = batch_of(model, [first])
    for t in range(prompt, batch["input_ids"].shape[1]):
        changed = copy.deepcopy(batch)
        changed["input_ids"][0, t] = 7
        with torch.no_grad():
            logits = model(changed)["logits"][0]
        assert torch.equal(logits[:t], a[:t])


def test_the_adapter_sees_modalities_and_question(model, samples):
    batch = batch_of(model, samples[:1])
    with torch.no_grad():
        before = model(batch)["logits"]
        for name in ("modality_ids", "key_index"):
            changed = copy.deepcopy(batch)
            changed[name] = torch.zeros_like(changed[name])
            assert not torch.allclose(model(changed)["logits"], before, atol=1e-4), name


@pytest.mark.parametrize("method", METHODS)
def test_every_trained_parameter_gets_a_gradient_whatever_the_batch(make_model, samples, method):
    model = make_model(method).train()
    parts = trainable_parts(model)
    assert set(parts) == {"none": {"projector"}, "full": {"projector", "llm"}}.get(method, {"projector", "adapter"})
    named = [name for part in parts.values() for name, _ in part]
    assert sorted(named) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    for some in (samples[1:2], samples[3:], samples):
        model.zero_grad(set_to_none=True)
        out = model(batch_of(model, some))
        (out["loss_sum"] / out["tokens"]).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.startswith("projectors."):
                assert parameter.grad is not None, name
                used = any(media.modality == name.split(".")[1] for sample in some for media in sample.media)
                if not used:
                    assert not parameter.grad.any(), name
                elif not name.endswith("key.bias"):
                    assert parameter.grad.any(), name
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


def test_idle_projectors_change_no_loss(model, samples):
    batch = batch_of(model, samples[1:2])
    with torch.no_grad():
        expected = model(batch)["loss_sum"]
    model.train()
    try:
        assert torch.equal(model(batch)["loss_sum"], expected)
    finally:
        model.eval()


def test_projectors_are_called_once_a_step_whatever_the_batch(model, samples):
    calls = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.projectors.items()
    ]
    model.train()
    try:
        for some in (samples, samples[1:2], samples[3:]):
            calls.clear()
            model(batch_of(model, some))
            assert sorted(calls) == ["audio", "vision"]
    finally:
        model.eval()
        for handle in handles:
            handle.remove()


def test_cached_and_fresh_features_give_one_loss(make_model, samples, tmp_path):
    model = make_model(cache_dir=tmp_path)
    with torch.no_grad():
        fresh = model(batch_of(model, samples))["loss_sum"]
        # 0.7 s alone has fewer patches than beside 2.5 s: cached items of one batch differ in P
        batch = batch_of(model, samples)
        assert all(item.segments is None for media in batch["media"].values() for item in media.items)
        assert len({item.features.shape[1] for item in batch["media"]["audio"].items}) > 1
        assert torch.equal(model(batch)["loss_sum"], fresh)


# ---- generation ------------------------------------------------------------------------------------------------------


def greedy(model, sample, steps):
    """Without a cache: the whole row anew for each token, generated tokens being text."""
    example = model.processor(sample, for_generation=True)
    found = []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(collate([copy.deepcopy(example)], model.processor.pad_id))["logits"]
        found.append(int(logits[0, -1].argmax()))
        if found[-1] in model.end_ids:
            break
        example.input_ids = torch.cat([example.input_ids, torch.tensor(found[-1:])])
        example.labels = torch.cat([example.labels, torch.tensor([IGNORED])])
        example.modality_ids = torch.cat([example.modality_ids, torch.tensor([0])])
        example.key_mask = torch.cat([example.key_mask, torch.tensor([False])])
    return model.tokenizer.decode(found, skip_special_tokens=True).strip()


def test_generation_is_greedy_and_the_same_alone_in_a_batch_folded_and_not(model, samples):
    expected = [greedy(model, sample, 12) for sample in samples]
    assert len(set(expected)) > 1
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert model.generate(samples, 12) == expected
    assert model.generate(samples, 12, folded=False) == expected
    assert [model.generate([sample], 12)[0] for sample in samples] == expected
    with model.folded():
        assert model.llm.base_model.folded
        assert model.generate(samples, 12) == expected
        assert model.llm.base_model.folded
    assert not model.llm.base_model.folded
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_answer_that_is_cut_is_told_once(model, samples, caplog, monkeypatch):
    monkeypatch.setattr(model, "told_of_cut", False)
    monkeypatch.setattr(model, "config", SimpleNamespace(evaluation=EvaluationConfig(max_new_tokens=1)))
    model.generate(samples, 1)
    assert not caplog.text  # as it was asked for
    model.generate(samples)
    model.generate(samples)
    assert caplog.text.count("an answer was cut at 1 tokens") == 1


def test_an_answer_ends_before_the_token_that_ends_it_special_or_not(make_model, samples, monkeypatch):
    """Nor does padding behind it, which may be any token, join a shorter answer of a batch."""
    model = make_model()
    tokenizer = model.tokenizer
    tokenizer.add_tokens(["<|fin|>"])
    end = tokenizer.convert_tokens_to_ids("<|fin|>")
    assert end not in tokenizer.all_special_ids
    model.end_ids = [*model.end_ids, end]
    long, short = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("two red squares", "two"))
    rows = torch.tensor([[*long, end], [*short, end, *long[len(short) :]]])
    monkeypatch.setattr(model.llm, "generate", lambda **_: rows)
    assert model.generate(samples[:2]) == ["two red squares", "two"]


def test_generation_leaves_the_mode_alone_and_takes_nothing_from_the_defaults_that_llms_ship_with(
    model, samples, monkeypatch
):
    from transformers import GenerationConfig

    expected = model.generate(samples, 8)
    shipped = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, stop_strings=["e"], num_return_sequences=2,
        forced_eos_token_id=5, return_dict_in_generate=True,
    )  # fmt: skip
    monkeypatch.setattr(model.base_llm, "generation_config", shipped)
    model.train()
    try:
        assert model.generate(samples, 8) == expected
        assert model.training
        assert model.base_llm.generation_config is shipped  # and is saved with a whole LLM
    finally:
        model.eval()


def test_beams_give_one_answer_a_sample_alone_and_in_a_batch(model, samples):
    together = model.generate(samples, 8, num_beams=3)
    assert together == [model.generate([sample], 8, num_beams=3)[0] for sample in samples]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_generates(make_model, samples, method):
    model = make_model(method)
    assert model.generate(samples, 6) == [greedy(model, sample, 6) for sample in samples]


def test_chat_reads_any_path_and_a_history(model, samples, media_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video, audio = media_dir / "clip.mp4", media_dir / "long.wav"
    answer = model.chat("How many are sounding?", video=video, audio=str(audio), max_new_tokens=12)
    assert answer == model.generate(samples[:1], 12)[0]
    history = [user_message("How many?", video=video), Message("assistant", (Text(answer),))]
    again = model.chat("And now?", history=history, max_new_tokens=5)
    assert isinstance(again, str)
    several = user_message(" Why? ", image=[video, audio], speech=audio)
    assert [getattr(p, "modality", "text") for p in several.content] == ["vision", "vision", "speech", "text"]
    with pytest.raises(UserError, match="nothing was asked"):
        model.chat(" ")


# ---- weights to begin with -------------------------------------------------------------------------------------------


def projector_state(model):
    return {key: torch.full_like(value, 0.5) for key, value in model.projectors.state_dict().items()}


def test_init_from_takes_every_key(make_model, tmp_path, caplog):
    model = make_model("none")
    state = projector_state(model)
    (tmp_path / "final").mkdir()
    save_file({**state, "speech.norm.weight": torch.ones(3)}, tmp_path / "final" / "projectors.safetensors")
    load_init(model, tmp_path)
    assert all(torch.equal(value, state[key]) for key, value in model.projectors.state_dict().items())
    assert "projector for 'speech', which this config does not use" in caplog.text


def test_init_from_a_whole_llm_wants_that_llm(make_model, tmp_path):
    model = make_model("none")
    save_file(projector_state(model), tmp_path / "projectors.safetensors")
    (tmp_path / "llm").mkdir()
    model.config = RunConfig.model_validate(
        {
            "model": {"llm": {"path": "other"}},
            "data": {"train": [{"source": "messages", "path": "x"}]},
            "training": {"output_dir": "x"},
        }
    )
    with pytest.raises(UserError, match=rf"begin from it, too, with model.llm.path={tmp_path}/llm"):
        load_init(model, tmp_path)
    model.config.model.llm.path = str(tmp_path / "llm")
    load_init(model, tmp_path)


def test_init_from_two_folders_one_for_each_projector(make_model, tmp_path):
    model = make_model("none")
    state = projector_state(model)
    for name in ("vision", "audio"):
        (tmp_path / name).mkdir()
        own = {key: value for key, value in state.items() if key.startswith(name)}
        save_file(own, tmp_path / name / "projectors.safetensors")
    load_init(model, [tmp_path / "vision", str(tmp_path / "audio")])
    assert all(torch.equal(value, state[key]) for key, value in model.projectors.state_dict().items())
    with pytest.raises(UserError, match="both hold a projector for 'vision'"):
        load_init(model, [tmp_path / "vision", tmp_path / "audio", tmp_path / "vision"])


def test_init_from_names_what_does_not_fit(make_model, tmp_path):
    model = make_model("none")
    with pytest.raises(UserError, match=r"projectors.safetensors is missing"):
        load_init(model, tmp_path)
    path = tmp_path / "projectors.safetensors"
    state = projector_state(model)
    save_file({key: value for key, value in state.items() if key.startswith("vision")}, path)
    with pytest.raises(UserError, match="no projector for audio; it has vision"):
        load_init(model, tmp_path)
    before = {key: value.clone() for key, value in model.projectors.state_dict().items()}
    wrong = {**state, "audio.extra": torch.ones(1), "audio.norm.weight": torch.ones(9)}
    del wrong["vision.norm.bias"]
    save_file(wrong, path)
    with pytest.raises(UserError) as error:
        load_init(model, tmp_path)
    for part in ("missing: vision.norm.bias", "unexpected: audio.extra", "audio.norm.weight has the shape (9,)"):
        assert part in str(error.value)
    for part in ("audio.encoder gives features of width 8", "was trained on width 9: name the encoder"):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.projectors.state_dict().items())
    for content in (path.read_bytes()[:300], b"hello"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"projectors\.safetensors is not a whole safetensors file"):
            load_init(model, tmp_path)


SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 60, "pad_token_id": 0,
}  # fmt: skip


def test_a_template_that_does_not_fit_is_told_before_the_llm_is_read(monkeypatch):
    monkeypatch.setattr("mokamm.build.load_llm", Mock(side_effect=AssertionError("the LLM is read")))
    config = load_config("configs/mini/av_text.yaml", ["model.llm.thinking=true"])
    with pytest.raises(UserError, match="knows of no thoughts"):
        build_model(config)


@pytest.mark.parametrize("kind", ["Qwen2Config", "GPT2Config", "GemmaConfig", "RwkvConfig"])
def test_a_folder_without_a_vocabulary_gives_no_empty_tokenizer(tmp_path, kind):
    getattr(transformers, kind)().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no vocabulary of its tokenizer"):
        load_tokenizer(LLMConfig(path=str(tmp_path)))


class Code:
    def __reduce__(self):
        return print, ("executed",)


def test_an_llm_that_is_not_whole_is_refused(tmp_path, capsys):
    """transformers draws what is missing at random, with a warning."""
    whole = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=False))
    cpu, state = torch.device("cpu"), dict(whole.state_dict())
    for name, left_out, words in (
        ("headless", {"lm_head.weight"}, r"1 weights are missing \(lm_head\.weight\), and would be random"),
        ("foreign", set(state), "and [0-9]+ more"),
    ):
        others = {f"language.{key}": value.clone() for key, value in state.items()} if left_out == set(state) else {}
        kept = {key: value for key, value in state.items() if key not in left_out}
        whole.save_pretrained(tmp_path / name, state_dict=kept | others)
        with pytest.raises(UserError, match=f"is not a whole LlamaForCausalLM: .*{words}"):
            load_llm(LLMConfig(path=str(tmp_path / name)), cpu)
    whole.save_pretrained(tmp_path / "wide")
    transformers.LlamaConfig(**{**SMALL, "intermediate_size": 40}).save_pretrained(tmp_path / "wide")
    words = r"6 weights are of another shape \(\S+layers\.0\.mlp\.down_proj\.weight: \(32, 48\) instead of \(32, 40\)"
    with pytest.raises(UserError, match=f"is not a whole LlamaForCausalLM: {words}"):
        load_llm(LLMConfig(path=str(tmp_path / "wide")), cpu)
    whole.save_pretrained(tmp_path / "whole")
    assert load_llm(LLMConfig(path=str(tmp_path / "whole"), dtype="float32"), cpu).lm_head.weight.equal(
        whole.lm_head.weight
    )
    (tmp_path / "whole" / "model.safetensors").unlink()
    torch.save(state | {"more": Code()}, tmp_path / "whole" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds Python objects \(possibly code\) .* not executed; take .* safetensors"):
        load_llm(LLMConfig(path=str(tmp_path / "whole")), cpu)
    assert "executed" not in capsys.readouterr().out


def test_a_buffer_that_a_checkpoint_lacks_is_computed(tmp_path, monkeypatch):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.__init__

    def with_buffer(self, config):
        plain(self, config)
        self.register_buffer("mask_bias", torch.ones(3))

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", with_buffer)
    assert load_llm(LLMConfig(path=str(tmp_path)), torch.device("cpu")).mask_bias.shape == (3,)


def test_an_llm_that_cannot_be_used_is_told_before_training(tmp_path):
    sight = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "patch_size": 8, "image_size": 16,
    }  # fmt: skip
    composite = transformers.Gemma3Config(
        text_config=SMALL, vision_config=sight, mm_tokens_per_image=1, image_token_index=50, boi_token_index=51,
        eoi_token_index=52,
    )  # fmt: skip
    transformers.Gemma3ForConditionalGeneration(composite).save_pretrained(tmp_path / "gemma3")
    with pytest.raises(UserError, match="does not generate from embeddings"):
        load_llm(LLMConfig(path=str(tmp_path / "gemma3")), torch.device("cpu"))
    transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL)).save_pretrained(tmp_path / "gemma2")
    if not transformers.Gemma2ForCausalLM._supports_sdpa:
        with pytest.raises(UserError, match=r"llm\.attention: the LLM of .* has no sdpa; set another \(eager\)$"):
            load_llm(LLMConfig(path=str(tmp_path / "gemma2")), torch.device("cpu"))
    llm = load_llm(LLMConfig(path=str(tmp_path / "gemma2"), attention="eager"), torch.device("cpu"))
    assert llm.config._attn_implementation == "eager"
