"""What a finished run says of itself: its model card, and the command to talk to it."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml

from mokamm.adapters import wrap
from mokamm.config import RunConfig
from mokamm.infer import parse_args
from mokamm.training.finish import model_card, talk_command


def config(folder, method="moka", llm="org/a-llm", **training) -> RunConfig:
    encoder = {"name": "clip", "path": "org/clip"}
    return RunConfig.model_validate(
        {
            "model": {
                "llm": {"path": llm},
                "modalities": {name: {"encoder": encoder} for name in ("vision", "speech")},
            },
            "adapter": {"method": method, "keys": "user"},
            "data": {"media_dir": str(folder), "train": [{"source": "messages", "path": "rows.jsonl"}]},
            "training": {"output_dir": str(folder / "runs"), "learning_rate": 2e-4, **training},
            "versions": {"trained_parameters": {"projector": 10} | ({"adapter": 5} if method != "none" else {})},
        }
    )


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("moka", "r 4, alpha 16, dropout 0, attention weight 1, keys user"),
        ("multi_lora", "r 4, alpha 16, dropout 0, attention weight 0"),
        ("lora", "r 4, alpha 16, dropout 0"),
        ("hira", "r 4"),
        ("none", None),
    ],
)
def test_the_card_says_of_the_adapter_what_its_method_has(toy, tmp_path, method, said):
    run = tmp_path / "run"
    if method != "none":
        llm = toy.build().llm.unload()
        adapted = wrap(llm, method, ["text", "vision", "speech"], {"r": 4, "lora_alpha": 16.0, "lora_dropout": 0.0})
        adapted.save_pretrained(run / "final" / "adapter")
    card = model_card(config(tmp_path, method), run)
    rows = [line for line in card.splitlines() if line.startswith("| adapter |")]
    assert rows == ([f"| adapter | {said} |"] if said else [])
    assert ("library_name" in front(card)) == bool(said)
    assert front(card)["tags"] == ["mokamm", "multimodal", *([method] if said else [])]


def test_the_card_names_the_rate_of_every_part(tmp_path):
    card = model_card(config(tmp_path, projector_learning_rate=1e-3, seed=3), tmp_path)
    assert "| rate | projector 0.001, adapter 0.0002, cosine, seed 3 |" in card
    card = model_card(config(tmp_path, "none", projector_learning_rate=1e-3, stage=1), tmp_path)
    assert "| rate | projector 0.001, cosine, seed 0 |" in card


def test_the_hub_is_told_of_no_base_that_is_a_folder_of_this_machine(tmp_path):
    assert front(model_card(config(tmp_path), tmp_path))["base_model"] == "org/a-llm"
    card = model_card(config(tmp_path, llm=str(tmp_path)), tmp_path)
    assert "base_model" not in front(card)
    assert f"| base | {tmp_path}, " in card


def test_the_command_to_talk_can_be_pasted_whatever_the_names(tmp_path):
    content = [{"type": "video", "path": "my clip.mp4"}, {"type": "text", "text": "What's that?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run = tmp_path / "my runs" / "first try"
    program, script, *words = shlex.split(talk_command(config(tmp_path), run))
    assert (program, script) == ("python", "mokamm/infer.py")
    args = parse_args(words)
    assert (args.run, args.question) == (run, "What's that?")
    assert args.video == [str(tmp_path / "my clip.mp4")]


def test_without_a_row_to_show_the_command_has_an_option_for_every_modality(tmp_path):
    args = parse_args(shlex.split(talk_command(config(tmp_path), tmp_path))[2:])
    assert (args.video, args.speech, args.audio) == (["FILE"], ["FILE"], [])
    assert args.question == "your question"
