"""mokamm doctor: every recipe's shapes, the published counts, and what is said where something is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, WhisperConfig, WhisperFeatureExtractor, WhisperModel

from encoders import EncoderError, build_encoder
from mokamm import doctor
from mokamm.config import load_config
from mokamm.published_shapes import LLMS, llm_config, stand_in

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(
    path.relative_to(ROOT).as_posix()
    for scenario in ("av_text", "visual_text", "speech_text")
    for path in (ROOT / "configs" / scenario).rglob("*.yaml")
)


def examined(capsys, *arguments: str) -> tuple[int, dict]:
    with pytest.raises(SystemExit) as end:
        doctor.main([*arguments, "--json"])
    return end.value.code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes(recipe, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, found = examined(capsys, recipe, "--shapes")
    assert (code, found["problems"]) == (0, [])
    assert found["tokens"]["text"] > 100
    # the header says how much memory it takes, and how to start it
    header = [line for line in (ROOT / recipe).read_text().splitlines() if line.startswith("#")]
    assert any(f"deepspeed mokamm/train.py {recipe}" in line for line in header)
    predicted = found["memory"]["zero2"]["total"] / 2**30
    assert any(f"{predicted:.0f} GB" in line for line in header), f"ZeRO-2 takes {predicted:.0f} GB"


def test_the_paper_s_scenarios_are_there_for_every_llm():
    assert len(RECIPES) == 5 * (4 + 2 + 2)
    folders = {Path(recipe).parent.name for recipe in RECIPES}
    assert folders == {"llama2_7b", "llama3_8b", "qwen2_7b", "qwen2.5_7b", "qwen3_8b"}


@pytest.mark.parametrize(
    ("recipe", "overrides", "adapter"),
    [
        ("av_text/llama2_7b/music_avqa", [], 19_103_744),
        ("visual_text/llama2_7b/llava_instruct", [], 14_548_992),
        ("av_text/llama2_7b/ave", ["adapter.method=lora"], 9_994_240),
        ("av_text/llama2_7b/ave", ["adapter.method=multi_lora"], 29_982_720),
    ],
)
def test_parameters_are_those_of_the_paper(recipe, overrides, adapter, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, found = examined(capsys, f"configs/{recipe}.yaml", *overrides, "--shapes")
    assert found["parameters"]["adapter"] == {"all": adapter, "trained": adapter}
    assert found["parameters"]["llm"] == {"all": 6_738_415_616, "trained": 0}


def test_the_published_sizes():
    """From the models' cards: Qwen2-7B 7.62 B, Qwen3-8B 8.19 B, CLIP ViT-L/14's tower 303 M."""
    from transformers import AutoModelForCausalLM

    sizes = {}
    for path in LLMS:
        with torch.device("meta"):
            sizes[path] = sum(p.numel() for p in AutoModelForCausalLM.from_config(llm_config(path)).parameters())
    assert sizes["Qwen/Qwen2-7B-Instruct"] == sizes["Qwen/Qwen2.5-7B"] == 7_615_616_512
    assert sizes["Qwen/Qwen3-8B"] == 8_190_735_360
    assert sizes["meta-llama/Meta-Llama-3-8B-Instruct"] == 8_030_261_248
    tower = stand_in("clip", "openai/clip-vit-large-patch14", {})
    assert sum(p.numel() for p in tower.parameters()) == 303_179_776
    assert all(p.is_meta for p in tower.parameters())
    hearing = stand_in("beats", "anything", {})  # 90,717,055 with the tagging head, which the encoder leaves out
    assert sum(p.numel() for p in hearing.parameters()) == 90_311_792
    assert CLIPVisionConfig().image_size == 224


@pytest.mark.parametrize("samples", [1, 159, 400, 16_000, 31_999, 160_000, 480_000])
def test_stand_ins_count_as_the_real_encoders_do(samples, tmp_path_factory):
    whisper = tmp_path_factory.mktemp("whisper")
    config = WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=16, num_mel_bins=128, vocab_size=11,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(whisper)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(whisper)
    real = build_encoder("whisper", whisper)
    assert stand_in("whisper", "openai/whisper-large-v3", {}).num_tokens(samples) == real.num_tokens(samples)
    beats = build_encoder("beats", ROOT / "mokamm" / "mini" / "audio.safetensors")
    if samples >= 400:
        assert stand_in("beats", "anything", {}).num_tokens(samples) == beats.num_tokens(samples)


def test_what_is_missing_is_named_with_the_command_that_fetches_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, found = examined(capsys, "configs/av_text/llama2_7b/music_avqa.yaml")
    missing = {f["what"]: f for f in found["findings"] if not f["there"]}
    assert code == 1
    assert missing["meta-llama/Llama-2-7b-chat-hf"]["fix"] == "hf download meta-llama/Llama-2-7b-chat-hf"
    assert (
        "mokamm convert BEATs_iter3_plus_AS2M.pt weights/"
        in missing["weights/BEATs_iter3_plus_AS2M.safetensors"]["fix"]
    )
    assert "MUSIC-AVQA" in missing["music_avqa: datasets/music_avqa/avqa-train.json"]["fix"]
    assert "output_dir first" in missing["runs/av_text/llama2_7b/stage1_visual"]["fix"]
    assert missing["datasets/music_avqa"]["where"] == str(ROOT / "datasets" / "music_avqa")


def test_the_miniature_run_lacks_nothing(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, found = examined(capsys, "configs/mini/av_text.yaml", "training.use_cpu=true")
    assert [f for f in found["findings"] if not f["there"]] == []
    assert (code, found["problems"]) == (0, [])
    parts = found["parameters"]
    assert parts["adapter"]["trained"] == parts["adapter"]["all"] > 0 == parts["llm"]["trained"]


@pytest.mark.parametrize("kept", [4, 100, -1])
@pytest.mark.parametrize("part", ["LLM", "vision encoder", "audio encoder"])
def test_a_damaged_weights_file_is_named(capsys, monkeypatch, tmp_path, kept, part):
    monkeypatch.chdir(ROOT)
    names = {"LLM": "llm", "vision encoder": "vision", "audio encoder": "audio.safetensors"}
    keys = {"LLM": "llm.path", "vision encoder": "modalities.vision.encoder.path"}
    place, key = ROOT / "mokamm" / "mini" / names[part], keys.get(part, "modalities.audio.encoder.path")
    copy = shutil.copytree(place, tmp_path / place.name) if place.is_dir() else shutil.copy(place, tmp_path)
    file = next(Path(copy).glob("*.safetensors"), Path(copy))
    arguments = ["configs/mini/av_text.yaml", "training.use_cpu=true", f"model.{key}={copy}"]
    assert all(finding["there"] for finding in examined(capsys, *arguments)[1]["findings"])
    file.write_bytes(file.read_bytes()[:kept])
    code, found = examined(capsys, *arguments)
    (wrong,) = [finding for finding in found["findings"] if not finding["there"]]
    assert (code, wrong["part"]) == (1, part)
    assert f"{file} is damaged: " in wrong["damage"]
    with pytest.raises(SystemExit):
        doctor.main(arguments)
    assert f"DAMAGED {part}: {copy}\n        {file} is damaged: " in capsys.readouterr().out


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]


def in_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def with_half_an_index(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a"')


@pytest.mark.parametrize("cached", [False, True], ids=["folder", "hub's cache"])
@pytest.mark.parametrize(
    ("part", "edit", "lacking"),
    [
        ("LLM", without("model.safetensors"), "model.safetensors or model.safetensors.index.json or "),
        ("LLM", without("tokenizer.json"), "lacks tokenizer.json or "),
        ("LLM", in_shards, "lacks model-00002-of-00002.safetensors"),
        ("LLM", with_half_an_index, "lacks a readable model.safetensors.index.json"),
        ("vision encoder", without("open_clip_model.safetensors"), "lacks *.safetensors or "),
        ("speech encoder", without("preprocessor_config.json"), "lacks preprocessor_config.json or "),
    ],
    ids=["weights", "tokenizer", "shard", "index", "open_clip", "preprocessor"],
)
def test_a_model_that_is_not_whole_is_missing_and_what_lacks_is_named(
    capsys, monkeypatch, tmp_path, part, edit, lacking, cached
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name, base = part.split()[0], "quickstart" if part == "speech encoder" else "mini/av_text"
    repository, key = tmp_path / "models--a--b", "llm" if part == "LLM" else f"modalities.{name}.encoder"
    folder = repository / "snapshots" / "0123" if cached else tmp_path / "copy"
    shutil.copytree(ROOT / "mokamm" / "mini" / name.lower(), folder)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    path = "a/b" if cached else str(folder)
    config = load_config(f"configs/{base}.yaml", ["training.use_cpu=true", f"model.{key}.path={path}"])
    assert all(finding.there for finding in doctor.findings(config))
    edit(folder)
    (found,) = [finding for finding in doctor.findings(config) if not finding.there]
    assert (found.part, found.damage) == (part, "")
    assert lacking in found.lacks
    doctor.show(config, "", [found], {"problems": [], "parameters": {}})
    assert f"MISSING {part}: {path}\n        {folder} lacks " in capsys.readouterr().out


def test_a_tokenizer_without_chat_template_is_a_problem_before_training(capsys, tmp_path):
    shutil.copytree(ROOT / "mokamm" / "mini" / "llm", tmp_path / "llm", ignore=shutil.ignore_patterns("*.jinja"))
    arguments = ["configs/mini/av_text.yaml", "--shapes", f"model.llm.path={tmp_path / 'llm'}"]
    code, found = examined(capsys, *arguments)
    assert (code, len(found["problems"])) == (1, 1)
    assert "has no chat template" in found["problems"][0]
    assert examined(capsys, *arguments, "model.llm.chat_template=plain")[1]["problems"] == []


def test_an_attention_that_the_llm_lacks_is_a_problem_before_training(capsys, tmp_path):
    import transformers

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.Gemma2Config(**shape, num_key_value_heads=1, vocab_size=11).save_pretrained(tmp_path)
    arguments = ["configs/mini/av_text.yaml", f"model.llm.path={tmp_path}", "training.init_from=null", "--shapes"]
    if not transformers.Gemma2ForCausalLM._supports_sdpa:
        code, found = examined(capsys, *arguments)
        assert code == 1
        assert found["problems"] == [
            f"model.llm.attention: the LLM of '{tmp_path}' has no sdpa; set another (eager)",
        ]
    for attention in ("eager", "flash_attention_2"):  # whose package may be where the run will be
        assert examined(capsys, *arguments, f"model.llm.attention={attention}")[0] == 0


def test_an_empty_folder_is_no_model(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    paths = [f"model.{key}={tmp_path}" for key in ("llm.path", "modalities.audio.encoder.path")]
    config = load_config("configs/mini/av_text.yaml", ["training.use_cpu=true", *paths])
    llm, audio = [finding for finding in doctor.findings(config) if not finding.there]
    assert llm.lacks.startswith(f"{tmp_path} lacks config.json; model.safetensors or ")
    assert audio.part == "audio encoder"  # BEATs is a file


@pytest.mark.parametrize("key", ["train", "validation"])
def test_the_package_datasets_is_needed_wherever_hf_is_read(capsys, monkeypatch, key):
    monkeypatch.chdir(ROOT)
    arguments = ["configs/mini/av_text.yaml", "training.use_cpu=true"]
    config = load_config(arguments[0], [arguments[1], f"data.{key}=[{{source: hf, path: user/name}}]"])
    assert "datasets" in [finding.what for finding in doctor.findings(config)]
    assert "datasets" not in [finding.what for finding in doctor.findings(load_config(arguments[0], arguments[1:]))]


def test_media_that_leave_no_room_are_a_problem(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, found = examined(capsys, "configs/mini/av_text.yaml", "--shapes", "data.max_length=80")
    assert code == 1
    assert "media of one sample take 84 tokens" in found["problems"][0]
    with pytest.raises(SystemExit) as end:
        doctor.main(["configs/mini/av_text.yaml", "adapter.methd=moka"])
    assert end.value.code == 2
    assert "did you mean 'method'" in capsys.readouterr().err


def test_a_gpu_that_is_too_small_is_a_problem(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = "configs/av_text/llama2_7b/ave.yaml"
    code, found = examined(capsys, recipe, "--shapes", "--gpu-gb", "2")
    assert code == 1
    assert "GB of a GPU of 2.00 GB; no ZeRO stage would fit" in found["problems"][0]
    code, found = examined(capsys, recipe, "--shapes", "--gpu-gb", "10")  # ZeRO-2 as configured takes 17
    assert "of a GPU of 10.00 GB; zero3, zero3_offload would fit" in found["problems"][0]


def test_recipes_say_what_the_paper_says():
    config = load_config(ROOT / "configs" / "av_text" / "llama2_7b" / "music_avqa.yaml")
    adapter, training = config.adapter, config.training
    assert (adapter.method, adapter.r, adapter.lora_alpha, adapter.lora_dropout) == ("moka", 4, 16, 0.05)
    assert (training.learning_rate, training.weight_decay, training.warmup_ratio) == (1e-4, 0.0, 0.03)
    assert (training.num_train_epochs, training.bf16, training.lr_scheduler_type) == (3, True, "cosine")
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == 32
    assert config.model.modalities["audio"].seconds == 2.0


def test_stand_ins_heed_the_encoder_s_options():
    plain = stand_in("whisper", "openai/whisper-large-v3", {})
    assert (plain.window_samples, plain.max_samples, plain.dtype) == (480_000, 480_000, torch.float32)
    half = stand_in("clip", "openai/clip-vit-large-patch14", {"dtype": "bfloat16", "layer": [-2, 5]})
    assert (half.dtype, half.width) == (torch.bfloat16, 2048)
    for options in ({"image_size": 448}, {"features": "cls"}):  # another number of patches: not told
        assert stand_in("clip", "openai/clip-vit-large-patch14", options) is None
    with pytest.raises(EncoderError, match="did you mean 'layer'"):
        stand_in("clip", "openai/clip-vit-large-patch14", {"layr": -2})


def test_what_cannot_be_shaped_does_not_hide_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, found = examined(capsys, "configs/text/instruct.yaml", "model.llm.path=Qwen/Qwen3-4B")
    assert code == 1
    assert "hf download Qwen/Qwen3-4B" in [finding["fix"] for finding in found["findings"]]
    assert "AutoConfig cannot load 'Qwen/Qwen3-4B'" in found["problems"][0]
    hub = "data.train=[{source: hf, path: tatsu-lab/alpaca}]"
    _, found = examined(capsys, "configs/text/instruct.yaml", hub)
    missing = [finding["what"] for finding in found["findings"] if not finding["there"]]
    assert not [what for what in missing if "alpaca" in what or what == "tatsu-lab"]


def test_projectors_and_adapters_that_do_not_fit_are_told_before_training(tmp_path, capsys):
    asked = ("configs/quickstart.yaml", "--shapes", f"training.output_dir={tmp_path / 'run'}")
    assert examined(capsys, *asked)[1]["problems"] == []
    code, found = examined(capsys, *asked, "model.modalities.vision.projector.tokens=5")
    assert (code, len(found["problems"])) == (1, 1)
    assert "vision.queries.weight has the shape (6, 128), the model's is (5, 128)" in found["problems"][0]
    begun = tmp_path / "begun"
    shutil.copytree(ROOT / "mokamm/mini/stage1", begun)
    (begun / "adapter").mkdir()
    from peft import LoraConfig

    LoraConfig(r=8, peft_type="LORA").save_pretrained(begun / "adapter")
    (begun / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    code, found = examined(capsys, *asked, f"training.init_from={begun}", "adapter.method=lora", "adapter.r=4")
    assert "r: 8 there, 4 in the configuration (adapter.r)" in found["problems"][0]
    # a folder that a run is still to write is named as missing, not as one that does not fit
    assert examined(capsys, *asked, f"training.init_from={tmp_path / 'later'}")[1]["problems"] == []
