"""`mokamm convert` on the published form of BEATs: the same weights, known by content, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from encoders.audio import BeatsEncoder
from encoders.beats import BEATs, BeatsConfig, load_beats, save_beats
from mokamm.convert import main

SMALL = BeatsConfig(
    embed_dim=12, encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=20, encoder_attention_heads=2,
    conv_pos=6, conv_pos_groups=4, num_buckets=32, max_distance=40, predictor_class=5,
)  # fmt: skip


class _Code:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.fixture(scope="module")
def model() -> BEATs:
    torch.manual_seed(0)
    found = BEATs(SMALL)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return found.eval()


def test_by_its_command(model: BEATs, tmp_path: Path) -> None:
    cfg = {**asdict(SMALL), "label_rate": 7}  # published ones hold more than the network needs
    torch.save({"cfg": cfg, "model": model.state_dict()}, tmp_path / "BEATs.pt")
    command = [str(Path(sys.executable).parent / "mokamm"), "convert", "BEATs.pt", "out.safetensors", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["to"], told["written"]) == ("beats", True)
    assert told["found"].startswith("BEATs, 2 layers of width 16, a predictor of 5 classes, ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["BEATs.pt", "out.safetensors"]
    before, after = BeatsEncoder(tmp_path / "BEATs.pt"), BeatsEncoder(tmp_path / "out.safetensors")
    assert before.fingerprint() == after.fingerprint()
    wave = torch.randn(2, 8000)
    assert torch.equal(before.encode(wave).features, after.encode(wave).features)
    assert load_beats(tmp_path / "out.safetensors").cfg == SMALL


def test_a_dry_run_reads_all_and_writes_nothing(model: BEATs, tmp_path: Path, capsys) -> None:
    save_beats(tmp_path / "BEATs.pt", model)
    assert main([str(tmp_path / "BEATs.pt"), str(tmp_path / "out.safetensors"), "--dry-run"]) == 0
    assert "would be written as beats" in capsys.readouterr().out
    state = model.state_dict()
    del state["encoder.layer_norm.bias"]
    torch.save({"cfg": asdict(SMALL), "model": state}, tmp_path / "cut.pt")
    assert main([str(tmp_path / "cut.pt"), str(tmp_path / "out.safetensors"), "--dry-run"]) == 2
    assert "missing (encoder.layer_norm.bias)" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_refusals(model: BEATs, tmp_path: Path, capsys) -> None:
    save_beats(tmp_path / "good.pt", model)
    save_beats(tmp_path / "there.safetensors", model)
    torch.save({"cfg": {}, "model": _Code()}, tmp_path / "evil.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    torch.save({"cfg": None, "model": model.state_dict()}, tmp_path / "no_cfg.pt")
    torch.save({"cfg": asdict(SMALL), "model": [1]}, tmp_path / "no_tensors.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:2000])
    (tmp_path / "empty.pt").touch()
    for source, target, message, *options in (
        ("good.pt", "there.safetensors", "is there already"),
        ("good.pt", "out.pt", "must end in .safetensors"),
        ("good.pt", "out.pt", "must end in .safetensors", "--dry-run"),
        ("good.pt", "none/out.safetensors", "cannot be written"),
        ("good.pt", "out.safetensors", "cannot become lora", "--to", "lora"),
        ("good.pt", "out.safetensors", "--mask goes with an adapter", "--mask", "mask.pt"),
        ("good.pt", "out.safetensors", "--logits-by-keys goes with a published MokA", "--logits-by-keys"),
        ("evil.pt", "out.safetensors", "cannot be read as a mask or a BEATs checkpoint: it holds Python objects"),
        ("no_cfg.pt", "out.safetensors", "expected {'cfg': dict, 'model': tensors}"),
        ("no_tensors.pt", "out.safetensors", "expected {'cfg': dict, 'model': tensors}"),
        ("cut.pt", "out.safetensors", "cannot be read as a mask or a BEATs checkpoint: "),
        ("empty.pt", "out.safetensors", "cannot be read as a mask or a BEATs checkpoint: EOFError"),
        ("foreign.pt", "out.safetensors", "is none of: "),
        ("absent.pt", "out.safetensors", "no such file or folder"),
    ):
        assert main([str(tmp_path / source), str(tmp_path / target), *options]) == 2
        found = capsys.readouterr()
        assert message in found.err, (source, target)
        assert "executed" not in found.out + found.err
    assert not list(tmp_path.glob("*out*"))
