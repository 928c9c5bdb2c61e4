"""`mokamm data check` on real files and the miniature base's own tokenizer and encoders, and what it must find."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from data.schema import BadSample
from encoders import EncoderError

VISION, AUDIO = 2 * 6, 3 * 2  # tokens of a video of two segments and of a sound of three windows


def talk(text, answer="A cup.", **media):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **media}


ROWS = [
    talk("What is it?"),
    talk("<video>What is it?", videos=["clip.mp4"]),
    talk("<audio><image>What is it?", audios=["long.wav"], images=["picture.png"]),
    talk("What is it?", "red " * 60),  # the answer is cut
    talk("What is it? " * 40),  # the prompt does not fit
    talk("<video>What?", videos=["nothing.mp4"]),
    talk("<video>What?", videos=["/old/clip.mp4"]),
    talk("<image>What?", images=["link.png"]),
    talk("<video>What?", videos=["cut.mp4"]),
    talk("<image>What?", images=["clip.mp4"]),  # of another kind than declared
    talk("<image><image>What?", images=["picture.png"]),
    {"messages": [{"role": "user", "content": "Hi"}]},
    talk("<image>What?", images=["huge.png"]),  # over data.limits
    talk("<audio>What?", audios=["clip.mp4"]),  # without a sound track
]
VALIDATION = [talk("<video>What is it?", videos=["/old/clip.mp4"]), talk("And?", "Yes.")]


@pytest.fixture(scope="module")
def config(tmp_path_factory, media_dir, mini_base):
    """The path of a config whose data lie in a folder with good, broken and foreign files."""
    folder = tmp_path_factory.mktemp("check")
    media = folder / "media"
    shutil.copytree(media_dir, media)
    whole = (media / "clip.mp4").read_bytes()
    (media / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "outside.png").write_bytes((media / "picture.png").read_bytes())
    (media / "link.png").symlink_to(folder / "outside.png")
    Image.new("RGB", (1500, 1500)).save(media / "huge.png")
    for name, rows in (("train", ROWS), ("validation", VALIDATION)):
        (media / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    qformer = {"name": "qformer", "hidden": 128, "heads": 4, "layers": 2, "intermediate": 256}
    encoders = {
        "vision": ({"name": "open_clip", "path": str(mini_base / "vision")}, 6, 2),
        "audio": ({"name": "beats", "path": str(mini_base / "audio.safetensors")}, 2, 3),
    }
    modalities = {
        name: {"encoder": encoder, "projector": {**qformer, "tokens": tokens}, "segments": segments}
        for name, (encoder, tokens, segments) in encoders.items()
    }
    modalities["audio"]["seconds"] = 1.0
    validation = {"source": "swift", "path": "validation.jsonl", "options": {"strip_prefix": "/old"}}
    tree = {
        "model": {"llm": {"path": str(mini_base / "llm")}, "modalities": modalities},
        "data": {
            "media_dir": str(media),
            "train": [{"source": "swift", "path": "train.jsonl", "weight": 2.0}],
            "validation": [validation],
            "max_length": 60,
            "limits": {"max_pixels": 1_000_000},
        },
        "training": {"output_dir": str(folder / "run"), "per_device_train_batch_size": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def checked(config):
    """What `--json` prints, and the folder of the files."""
    command = [sys.executable, "-m", "mokamm.cli", "data", "check", str(config), "--json", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr  # a training would stop
    return json.loads(done.stdout), config.parent / "run-data"


def test_counts_by_source_and_modality(checked):
    result, _ = checked
    train, validation = result["sources"]["train"], result["sources"]["validation/validation"]
    assert (train["rows"], train["checked"], train["usable"], train["weight"]) == (14, 14, 4, 2.0)
    assert train["media"] == {
        "vision": {"items": 2, "tokens": VISION + 6},
        "audio": {"items": 1, "tokens": AUDIO},
    }
    assert train["text_only"] == 3
    assert (validation["usable"], validation["media"]["vision"]["items"]) == (2, 1)  # strip_prefix at work
    assert (result["rows"], result["checked"], result["usable"]) == (16, 16, 6)


def test_every_trouble_is_found_and_written_down(checked):
    result, out = checked
    counts = {"row": 2, "missing": 1, "refused": 2, "broken": 2, "limit": 1, "track": 1, "too_long": 1, "cut": 1}
    assert result["troubles"] == counts
    ledger = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    found = {entry["row"]: entry["reason"].split(":")[0] for entry in ledger}
    assert found == {
        4: "too_long", 5: "missing", 6: "refused", 7: "refused", 8: "broken", 9: "broken", 10: "row", 11: "row",
        12: "limit", 13: "track",
    }  # fmt: skip
    assert len(ledger) == result["checked"] - result["usable"]
    assert "the texts hold 2 <image>, but the row names 1 images" in result["examples"]["row"][0]
    assert "is a link that leads out" in result["examples"]["refused"][1]
    advice = "\n".join(result["advice"])
    for part in (
        "a training would stop: 10 of 16 rows",
        "fetch the missing media",
        "strip_prefix",
        "data.max_length: ",
        "fetch the broken media again",
        "raise the limit",
        "without the wanted track",
    ):
        assert part in advice


def test_lengths_are_those_of_the_training(config, checked):
    """Against the examples that the training's own data set makes."""
    from mokamm.build import build_processor
    from mokamm.config import load_config
    from mokamm.training.corpus import open_parts

    result, _ = checked
    loaded = load_config(config, ["data.max_length=100000"])
    processor, _ = build_processor(loaded)
    lengths = []
    for part in open_parts(loaded, processor, "train"):
        for row in range(len(part.rows)):
            try:
                lengths.append(len(part.process(part.rows[row]).input_ids))
            except BadSample:
                continue
    assert len(lengths) == 5
    tokens = result["sources"]["train"]["tokens"]
    assert (tokens["min"], tokens["max"]) == (min(lengths), max(lengths))
    assert tokens["mean"] == pytest.approx(np.mean(lengths), abs=0.05)
    text, with_video, with_both = lengths[:3]
    assert with_video - text == VISION + 2  # and the boundaries
    assert with_both - text == AUDIO + 6 + 4
    suggested = next(line for line in result["advice"] if line.startswith("data.max_length"))
    assert suggested.startswith(f"data.max_length: {-(-max(lengths) // 64) * 64} holds every row")


def test_the_picture_and_the_predicted_cache(config, checked, tmp_path):
    from data.schema import Media
    from encoders.cache import FeatureCache
    from mokamm.build import build_processor
    from mokamm.config import load_config
    from mokamm.perception import Perception

    result, out = checked
    with Image.open(out / "lengths.png") as picture:
        assert picture.size == (960, 540)
        assert len(picture.convert("RGB").getcolors(100_000)) > 10
    loaded = load_config(config)
    processor, encoders = build_processor(loaded)
    cache = FeatureCache(tmp_path / "cache", 1.0)
    perception = Perception(encoders, cache)
    processor.lookup = perception.lookup
    for kind, path, modality in (("video", "clip.mp4", "vision"), ("image", "picture.png", "vision"),
                                 ("audio", "long.wav", "audio")):  # fmt: skip
        item = processor._perceive(Media(kind, path, modality))
        perception._encode(modality, [item])
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 3
    predicted = 1e9 * sum(result["cache_gb"].values())
    # beside its tensors each file holds a header of some hundred bytes; clip.mp4 is one file, in two sources
    assert 0 < cache.total_bytes() - predicted < 3 * 400


def test_files_of_one_name_in_two_folders_are_two_in_the_cache(config, tmp_path, media_dir):
    from mokamm.config import load_config
    from mokamm.datacheck.__main__ import check

    sources = []
    for k in range(2):
        folder = tmp_path / str(k)
        folder.mkdir()
        shutil.copy(media_dir / "picture.png", folder / "a.png")
        (folder / "rows.jsonl").write_text(json.dumps(talk("<image>What?", images=["a.png"])) + "\n")
        sources.append(f"{{source: swift, path: {folder}/rows.jsonl, media_dir: {folder}, name: s{k}}}")

    def gigabytes(*chosen):
        settings = load_config(config, [f"data.train=[{', '.join(chosen)}]", "data.validation=[]"])
        return check(settings, tmp_path / "out", workers=0)["cache_gb"]["vision"]

    one = gigabytes(sources[0])
    assert gigabytes(*sources) == pytest.approx(2 * one)
    again = sources[0].replace("name: s0", "name: again")
    assert gigabytes(sources[0], again) == one


def test_a_training_would_stop_where_the_ledger_stops_it():
    from mokamm.datacheck.summary import would_stop

    assert would_stop(rows=10, checked=10, bad=3, max_bad_fraction=None) == []
    assert would_stop(rows=10, checked=10, bad=4, max_bad_fraction=None)[0].endswith("max_bad_fraction = 0.05")
    assert would_stop(rows=10, checked=10, bad=1, max_bad_fraction=0.1) == []
    assert would_stop(rows=10, checked=10, bad=2, max_bad_fraction=0.1)
    assert would_stop(rows=1000, checked=1000, bad=50, max_bad_fraction=None) == []
    assert would_stop(rows=1000, checked=1000, bad=51, max_bad_fraction=None)
    assert would_stop(rows=1000, checked=1000, bad=50, max_bad_fraction=0.05) == []
    assert would_stop(rows=1000, checked=1000, bad=51, max_bad_fraction=0.05)
    assert would_stop(rows=1000, checked=10, bad=1, max_bad_fraction=0.05)  # 100 of all, if the rest is alike
    assert would_stop(rows=10, checked=10, bad=1, max_bad_fraction=0.0)
    assert would_stop(rows=10, checked=10, bad=0, max_bad_fraction=0.0) == []


def test_limit_spreads_over_the_file(config, capsys):
    from mokamm.datacheck.walk import _spread

    assert _spread(10, 3).tolist() == [0, 3, 6]
    assert _spread(3, None).tolist() == _spread(3, 9).tolist() == [0, 1, 2]


def test_padding_of_a_batch():
    from mokamm.datacheck.summary import describe, padding

    lengths = np.array([10, 30] * 500)
    found = padding(lengths, 2)
    assert found["group_by_length"] == pytest.approx(0, abs=0.01)
    assert found["random"] == pytest.approx(1 - 40 / (0.25 * 20 + 0.75 * 60), abs=0.02)  # E[sum] / E[2 max]
    assert padding(np.array([30] * 250 + [10] * 750), 1000) == {"random": 0.5, "group_by_length": 0.5, "packing": 0.0}
    assert padding(lengths[:1], 2) == {}
    assert describe(np.arange(1, 101)) == {"mean": 50.5, "min": 1, "p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert describe(np.zeros(0)) == {}


def test_mistakes_are_told(config, capsys):
    from mokamm.datacheck.__main__ import main

    for arguments, message in (
        ([str(config), "--limit", "0"], "--limit: must be a whole number of at least 1"),
        ([str(config), "data.max_lenght=3"], "did you mean 'max_length'"),
        ([str(config), "data.train=[{source: swift, path: nothing.jsonl}]"], "no such file: .*nothing.jsonl"),
        (
            [
                str(config),
                "data.world={dir: nowhere, train: 1, validation: 1, test: 1}",
                "data.media_dir=nowhere/train",
            ],
            "mokamm data make --out nowhere --split train --num 1 --seed 0",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_the_table_for_people(checked):
    from mokamm.datacheck.__main__ import table

    result, out = checked
    text = table(result, out)
    for part in ("train ", "3 rows of text alone", "2 vision (18 tokens), 1 audio (6 tokens)", "what to do:",
                 "1 rows whose prompt does not fit into data.max_length", "lengths.png"):  # fmt: skip
        assert part in text


def test_no_weights_are_read(config, checked, tmp_path):
    """The same counts where the weights of the encoders are gone or broken; training would need them."""
    from mokamm.build import build_processor
    from mokamm.config import load_config
    from mokamm.datacheck.__main__ import check

    vision = load_config(config).model.modalities["vision"].encoder.path
    shutil.copytree(vision, tmp_path / "vision", ignore=shutil.ignore_patterns("*.safetensors"))
    without = load_config(config, [f"model.modalities.vision.encoder.path={tmp_path / 'vision'}"])
    result = check(without, tmp_path / "out", workers=0)
    assert result["sources"] == checked[0]["sources"]
    assert result["cache_gb"] == checked[0]["cache_gb"]
    _, encoders = build_processor(without, weights=False)
    assert all(p.is_meta for encoder in encoders.values() for p in encoder.parameters())
    with pytest.raises(EncoderError, match="open_clip weights could not be read"):
        build_processor(without)
