"""The inference program on a run made by the real code from a base with real file formats (random weights)."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.schema import UserError
from mokamm import infer

ROOT = Path(__file__).resolve().parents[2]


def run_config(base: Path, **training) -> dict:
    qformer = {"name": "qformer", "tokens": 2, "hidden": 32, "heads": 2, "layers": 1}
    vision = {"name": "open_clip", "path": str(base / "vision")}
    return {
        "model": {
            "llm": {"path": str(base / "llm")},
            "modalities": {
                "vision": {"encoder": vision, "projector": qformer, "segments": 2},
                "audio": {
                    "encoder": {"name": "beats", "path": str(base / "audio.safetensors")},
                    "projector": {"name": "mlp", "stride": 16},
                    "segments": 3,
                    "seconds": 1.0,
                },
                "speech": {
                    "encoder": {"name": "whisper", "path": str(base / "speech")},
                    "projector": {"name": "mlp", "stride": 10},
                    "boundaries": False,
                },
            },
        },
        "adapter": {"method": "moka", "r": 4},
        "data": {"train": [{"source": "messages", "path": "none.jsonl"}], "max_length": 400},
        "training": {"output_dir": "unused", **training},
    }  # fmt: skip


def write_run(folder: Path, config: dict, std: float = 0.05) -> Path:
    """What a finished training leaves, with an adapter that does something. std: of its B."""
    import torch

    from mokamm.build import build_model
    from mokamm.config import load_config
    from mokamm.weights import save_weights, write_manifest

    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.manual_seed(0)
    model = build_model(load_config(folder / "config.yaml"), "cpu", for_training=True)
    for name, parameter in model.llm.named_parameters():
        if "_B." in name:
            torch.nn.init.normal_(parameter, std=std)
    save_weights(model, folder / "final")
    write_manifest(folder / "final")
    return folder


@pytest.fixture(scope="module")
def base(request, tmp_path_factory) -> Path:
    """The shipped miniature base, else one of the same files with random weights."""
    try:
        return request.getfixturevalue("mini_base")
    except pytest.FixtureLookupError:
        from mokamm.mini.architecture import write_random

        folder = tmp_path_factory.mktemp("base")
        write_random(folder)
        return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", run_config(base))


@pytest.fixture(scope="module")
def model(finished):
    from mokamm.model import MultimodalLM

    return MultimodalLM.from_run(finished, device="cpu")


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = 0
    try:
        infer.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def all_media(media_dir) -> dict[str, str]:
    files = {"video": "clip.mp4", "image": "picture.png", "audio": "long.wav", "speech": "short.wav"}
    return {option: str(media_dir / name) for option, name in files.items()}


def options(media: dict[str, str]) -> list[str]:
    return [part for option, path in media.items() for part in (f"--{option}", path)]


def test_a_run_holds_what_it_was_given(finished, model, base):
    """Saved and loaded again: the projectors and adapter of the file, the base's own LLM beneath."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    state = load_file(finished / "final" / "projectors.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in model.projectors.state_dict().items())
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base / "llm"), finished / "final" / "adapter"
    )
    own = {name: p for name, p in model.llm.named_parameters() if "moka_" in name}
    loaded = {name: p for name, p in plain.named_parameters() if "moka_" in name}
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[name], loaded[name]) for name in own)
    assert any(p.abs().max() > 0 for name, p in own.items() if "moka_B" in name)


def test_the_answer_is_that_of_the_evaluation(capsys, finished, model, media_dir):
    from data.media import MediaLoader
    from data.schema import Media, Message, Sample, Text

    kinds = {"video": ("video", "vision"), "image": ("image", "vision"), "audio": ("audio", "audio")}
    kinds["speech"] = ("audio", "speech")
    media = all_media(media_dir)
    parts = [Media(kinds[option][0], Path(path).name, kinds[option][1]) for option, path in media.items()]
    sample = Sample("x", (Message("user", (*parts, Text("how many ?", True))), Message("assistant", (Text("two"),))))
    other = Sample("y", (Message("user", (Text("what is this ?", True),)),))
    expected = model.generate([other, sample], 10, loader=MediaLoader(media_dir))[1]

    command = [finished, *options(media), "how many ?", "--max-new-tokens", 10, "--device", "cpu"]
    code, out, _ = call(capsys, *command)
    assert (code, out.strip()) == (0, expected)
    code, out, err = call(capsys, *command, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert sorted(result) == ["answer", "media", "question", "seconds", "tokens"]
    assert result["answer"] == expected
    assert result["media"] == {option: [path] for option, path in media.items()}
    assert 1 <= result["tokens"] <= 10


@pytest.mark.parametrize("chosen", [("speech",), ("video", "audio"), ("image",), ()])
def test_any_subset_of_media(capsys, finished, media_dir, chosen):
    media = {option: path for option, path in all_media(media_dir).items() if option in chosen}
    question = [] if chosen == ("speech",) else ["what is this ?"]
    code, out, err = call(capsys, finished, *question, *options(media), "--json", "--max-new-tokens", 4, "--beams", 2)
    assert (code, err) == (0, "")
    assert set(json.loads(out)["media"]) == set(chosen)


def test_the_stream_is_the_answer(model):
    for text in ("two red squares", " piano, violin  and flute ", "é – 日本"):
        ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        out = io.StringIO()
        streamer = infer.Streamer(model.decode, out)
        for i in range(len(ids)):
            streamer.put(ids[i : i + 1])
            assert "\ufffd" not in out.getvalue()
        streamer.end()
        assert out.getvalue() == text.lstrip() + "\n"
        assert streamer.tokens == len(ids)


def test_a_chat_attaches_media_remembers_and_survives_mistakes(finished, model, media_dir):
    from mokamm.config import load_config

    args = infer.parse_args([str(finished), "--max-new-tokens", "3"])
    config, out = load_config(finished / "config.yaml"), io.StringIO()
    asker = infer.Asker(model, args)
    lines = [
        "/help", "/vidoe x", "/video nowhere.mp4", f"/video {media_dir / 'clip.mp4'}", "how many ?", "",
        f"/speech '{media_dir / 'short.wav'}'", "", "/nothing",
    ]  # fmt: skip
    infer.repl(asker, config, lines, out)
    assert [message.role for message in asker.history] == ["user", "assistant", "user", "assistant"]
    assert [[p.modality for p in m.content if hasattr(p, "modality")] for m in asker.history[::2]] == [
        ["vision"],
        ["speech"],
    ]
    assert out.getvalue().count("error: ") == 3
    assert "no such file: nowhere.mp4" in out.getvalue()
    first, second = (message.text for message in asker.history[1::2])
    assert first == model.chat("how many ?", video=media_dir / "clip.mp4", max_new_tokens=3)
    assert f"\n{second}\n" in out.getvalue()
    infer.repl(asker, config, ["/clear", "/quit", "never asked"], out)
    assert asker.history == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "hello"], "nowhere is no finished run"),
        (["{run}", "hello", "--video", "gone.mp4"], "--video: no such file: gone.mp4"),
        (["{run}", "hello", "--video", "{media}/fakes.mp4"], "; did you mean 'fake.mp4'?"),
        (["{run}", "hello", "--image", "{media}/fake.mp4"], "fake.mp4"),
        (["{run}", "hello", "--video", "{media}/fake.mp4"], "fake.mp4"),
        (["{run}"], "nothing was asked"),
        (["{run}", " ", "--json"], "nothing was asked"),
        (
            ["{run}", "hello", "--base", "no/such/llm/here"],
            "AutoTokenizer cannot load 'no/such/llm/here'",
        ),
        (["{run}", "hello", "--device", "foo"], "device 'foo' cannot be used; here are: cpu"),
        (["{run}", "hello", "--device", "cuda:99"], "device 'cuda:99' cannot be used; here are: cpu"),
        (
            ["{run}", "hello", "--max-new-tokens", "0"],
            "--max-new-tokens: must be a whole number of at least 1; found 0",
        ),
        (["{silent}", "hello", "--speech", "{media}/long.wav"], "no modality 'speech'; it was trained with: vision"),
        (["{silent}", "hello"], "final is not there"),
    ],
)
def test_mistakes_end_in_one_message_and_code_2(
    capsys, monkeypatch, tmp_path, base, finished, media_dir, arguments, message
):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    (tmp_path / "fake.mp4").write_text("this is no video")
    silent = tmp_path / "silent"
    silent.mkdir()
    config = run_config(base)
    config["model"]["modalities"] = {"vision": config["model"]["modalities"]["vision"]}
    (silent / "config.yaml").write_text(yaml.safe_dump(config))
    if "--speech" in arguments:
        (silent / "final").mkdir()
    places = {"run": finished, "silent": silent, "media": tmp_path if "fake" in str(arguments) else media_dir}
    code, out, err = call(capsys, *[argument.format(**places) for argument in arguments])
    assert (code, out) == (2, "")
    assert "error: " in err
    assert message in err
    assert "Traceback" not in err


def test_a_truncated_llm_is_told_in_one_message(capsys, finished, base, tmp_path):
    shutil.copytree(base / "llm", tmp_path / "llm")
    weights = tmp_path / "llm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, out, err = call(capsys, finished, "hello", "--base", tmp_path / "llm", "--device", "cpu")
    assert (code, out) == (2, "")
    assert "AutoModelForCausalLM cannot load" in err


@pytest.mark.parametrize("kind", ["EncoderError", "AdapterError"])
def test_a_chat_survives_mistakes_of_every_floor(kind):
    from encoders import EncoderError
    from mokamm.adapters import AdapterError

    class Asker:
        args = infer.parse_args(["run"])

        def ask(self, *_):
            raise {"EncoderError": EncoderError, "AdapterError": AdapterError}[kind]("too long")

    out = io.StringIO()
    infer.repl(Asker(), None, ["hello", "hello"], out)
    assert out.getvalue() == "error: too long\n" * 2


def test_ctrl_c_stops_an_answer_and_not_the_chat():
    class Asker:
        args = infer.parse_args(["run"])

        def ask(self, question, media, out):
            if question == "a long story":
                raise KeyboardInterrupt
            print(f"answer to {question}", file=out)

    out = io.StringIO()
    infer.repl(Asker(), None, ["a long story", "what is it?"], out)
    assert out.getvalue() == "\n[stopped; neither the question nor its answer is remembered]\nanswer to what is it?\n"


def test_a_closed_standard_input_is_no_terminal(capsys, finished, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    code, _, said = call(capsys, finished)
    assert code == 2
    assert "nothing was asked" in said


def test_ctrl_c_ends_a_single_question_without_a_traceback(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "run", interrupted)
    assert call(capsys, "run", "hello") == (130, "", "\n")


def test_the_base_must_be_the_one_that_the_run_was_trained_on(finished, base, tmp_path, caplog):
    """Found from any working directory; only a warning where the user names another base; older runs say nothing."""
    from mokamm.build import check_base, load_run
    from mokamm.config import load_config
    from mokamm.training.finish import versions

    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(base / "llm", tmp_path / "llm")
    config = load_config(finished / "config.yaml")
    check_base(config, named=False)
    config.model.llm.path = str(tmp_path / "llm")
    config.versions = versions(config, load_run(finished, device="cpu"))
    config.dump(tmp_path / "run" / "config.yaml")
    load_run(tmp_path / "run", device="cpu")
    weights = tmp_path / "llm" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"has changed since the run was trained.*--base PATH"):
        load_run(tmp_path / "run", device="cpu")
    assert caplog.text == ""
    load_run(tmp_path / "run", base=str(tmp_path / "llm"), device="cpu")
    assert "is not the one that the run was trained on" in caplog.text


def test_the_fingerprint_follows_weights_in_any_format(tmp_path):
    from mokamm.build import check_base
    from mokamm.config import RunConfig
    from mokamm.weights import NO_FINGERPRINT, fingerprint

    found = set()
    for name, content in (("pytorch_model.bin", b"a"), ("pytorch_model.bin", b"b"), ("model.safetensors", b"c")):
        (tmp_path / name).write_bytes(content)
        found.add(fingerprint(tmp_path))
    assert len(found) == 3
    assert NO_FINGERPRINT not in found
    config = RunConfig.model_validate(
        {
            "model": {"llm": {"path": str(tmp_path)}},
            "data": {"train": [{"source": "messages", "path": "x"}]},
            "training": {"output_dir": "x"},
            "versions": {"base": {"fingerprint": NO_FINGERPRINT}},
        }
    )
    check_base(config, named=False)  # as a run of old wrote it of such a base
    config.versions["base"]["fingerprint"] = min(found - {fingerprint(tmp_path)})
    with pytest.raises(UserError, match="has changed since the run was trained"):
        check_base(config, named=False)


def test_the_fingerprint_of_a_shipped_base_is_found_from_anywhere(model, monkeypatch, tmp_path):
    from mokamm.config import RunConfig
    from mokamm.training.finish import versions

    monkeypatch.chdir(tmp_path)
    tree = run_config(Path("p"))
    tree["model"]["llm"]["path"] = "mokamm/mini/llm"
    assert len(versions(RunConfig.model_validate(tree), model)["base"]["fingerprint"]) == 64


def test_mistakes_and_help_need_no_heavy_import(finished):
    script = (
        "import sys; from mokamm import infer\n"
        "for arguments in (['--help'], ['nowhere', 'q'], [sys.argv[1]], [sys.argv[1], 'q', '--video', 'gone.mp4']):\n"
        "    try: infer.main(arguments)\n"
        "    except SystemExit as end: print('code', end.code)\n"
        "print('heavy', [name for name in ('torch', 'transformers', 'peft', 'av') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(finished)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout.splitlines()[-4:] == ["code 2", "code 2", "code 2", "heavy []"], done.stdout + done.stderr


def test_a_moved_run_answers_from_anywhere_by_its_path(finished, model, media_dir, tmp_path):
    """The real command, from another folder, on a moved run, with the base named anew."""
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    config = yaml.safe_load((moved / "config.yaml").read_text())
    base = config["model"]["llm"]["path"]
    config["model"]["llm"]["path"] = "someone/elses-llm"
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(media_dir / "clip.mp4", tmp_path / "clip.mp4")
    command = [sys.executable, str(ROOT / "mokamm" / "infer.py"), "moved", "how many ?", "--video", "clip.mp4"]
    command += ["--base", base, "--max-new-tokens", "6"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == model.chat("how many ?", video=media_dir / "clip.mp4", max_new_tokens=6)
    assert done.stderr == ""


def test_a_run_of_stage_1_has_projectors_and_no_adapter(base, tmp_path, media_dir):
    from mokamm.build import trainable_parts
    from mokamm.model import MultimodalLM

    run = write_run(tmp_path / "stage1", run_config(base, stage=1))
    assert not (run / "final" / "adapter").exists()
    model = MultimodalLM.from_run(run, device="cpu")
    assert set(trainable_parts(model)) == {"projector"}
    assert isinstance(model.chat("what is this ?", video=media_dir / "clip.mp4", max_new_tokens=2), str)
    # and stage 2 begins from it
    second = write_run(tmp_path / "stage2", run_config(base, init_from=str(run)))
    names = ("stage1", "stage2")
    first, then = ((tmp_path / name / "final" / "projectors.safetensors").read_bytes() for name in names)
    assert first == then
    assert (second / "final" / "adapter").is_dir()
    with pytest.raises(UserError, match="no finished run"):
        MultimodalLM.from_run(tmp_path)
