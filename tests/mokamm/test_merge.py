"""`mokamm convert RUN OUT --to llm`: the merged run answers as the adapter does; its LLM is a plain one."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mokamm.adapters import Routing, set_routing
from mokamm.build import build_model
from mokamm.config import load_config
from mokamm.config_sections import CacheConfig
from mokamm.convert import main
from mokamm.model import MultimodalLM
from mokamm.weights import save_weights, write_manifest
from tests.mokamm import test_infer
from tests.mokamm.test_infer import run_config

PLAIN = [
    ("lora", {}),
    ("dora", {}),
    ("hira", {}),
    ("hira", {"one_matmul": False}),
    ("lori_d", {}),
    ("lora", {"coto": {}}),
]
IDS = torch.arange(3, 40).view(1, -1)


@pytest.fixture
def base(mini_base: Path) -> Path:
    return mini_base


def write_run(folder: Path, base: Path, method: str, **options) -> Path:
    """A finished run whose adapter changes what the LLM says."""
    config = run_config(base) | {"adapter": {"method": method, "r": 4, **options}}
    return test_infer.write_run(folder, config, std=0.2)


def logits(llm: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return llm.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(("method", "options"), PLAIN)
def test_the_merged_run_says_what_the_adapter_says(tmp_path, base, media_dir, method, options):
    run, out = write_run(tmp_path / "run", base, method, **options), tmp_path / "merged"
    assert main([str(run), str(out), "--to", "llm"]) == 0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "llm"), run / "final" / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(out / "final" / "llm")  # without anything of mokamm
    expected = logits(adapted.float())
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(logits(plain.float()), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name or "lori" in name for name, _ in plain.named_parameters())
    assert AutoTokenizer.from_pretrained(out / "final" / "llm").chat_template
    asked = {"video": media_dir / "clip.mp4", "audio": media_dir / "long.wav", "max_new_tokens": 8}
    answers = [MultimodalLM.from_run(folder, device="cpu").chat("how many ?", **asked) for folder in (run, out)]
    assert answers[0] == answers[1]
    card = (out / "README.md").read_text()
    assert f"`{method}`, merged into the LLM" in card
    assert f"mokamm/infer.py {out}" in card
    assert "library_name: peft" not in card


def test_a_merged_run_can_be_begun_from(tmp_path, base):
    run, out = write_run(tmp_path / "run", base, "lora"), tmp_path / "merged"
    assert main([str(run), str(out), "--to", "llm"]) == 0
    config = load_config(out / "config.yaml")
    assert (config.method, config.versions["merged"]) == ("full", {"run": "run", "method": "lora"})
    next_config = run_config(out) | {"adapter": {"method": "moka"}}
    next_config["model"] = config.to_dict()["model"]
    next_config["model"]["llm"]["path"] = str(out / "final" / "llm")
    next_config["training"]["init_from"] = str(out)
    (tmp_path / "next.yaml").write_text(yaml.safe_dump(next_config))
    model = build_model(load_config(tmp_path / "next.yaml"), "cpu", for_training=True)
    set_routing(model.llm, Routing.text_only())
    merged = AutoModelForCausalLM.from_pretrained(out / "final" / "llm", dtype=torch.float32)
    torch.testing.assert_close(logits(model.llm), logits(merged), rtol=1e-5, atol=1e-5)  # B begins at zero


def test_lori_s_is_merged(tmp_path, base):
    from mokamm.adapters.peft_bridge import saved_keys
    from tests.mokamm.toy_lori import cut, random_b

    dense = build_model(_config(tmp_path / "dense.yaml", base, "lori_d"), "cpu", for_training=True)
    mask = cut(random_b(dense.llm), 0.9)
    config = _config(tmp_path / "sparse.yaml", base, "lori_s")
    model = build_model(config, "cpu", init=False)
    model.llm.base_model.set_mask(mask)
    for name, parameter in model.llm.named_parameters():
        if "lori_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert saved_keys(model.llm)
    run, out = tmp_path / "run", tmp_path / "merged"
    save_weights(model, run / "final")
    write_manifest(run / "final")
    config.dump(run / "config.yaml")
    assert main([str(run), str(out), "--to", "llm"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out / "final" / "llm", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model.llm), rtol=1e-4, atol=1e-4)


def _config(path: Path, base: Path, method: str):
    path.write_text(yaml.safe_dump(run_config(base) | {"adapter": {"method": method, "r": 4}}))
    return load_config(path)


def test_what_cannot_be_merged_is_told_before_anything_is_written(tmp_path, base, capsys):
    out = tmp_path / "merged"
    told = {
        "moka": "each modality has a weight of its own",
        "multi_lora": "each modality has a weight of its own",
        "none": "no adapter to merge",
    }
    for method, message in told.items():
        run = write_run(tmp_path / method, base, method)
        assert main([str(run), str(out), "--to", "llm"]) == 2
        assert message in capsys.readouterr().err
    assert main([str(tmp_path / "moka" / "final" / "adapter"), str(out), "--to", "llm"]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert not out.exists()


def test_an_adapter_of_tied_embeddings_is_not_merged(tmp_path, base, capsys):
    """The head's own update would change the embeddings, too."""
    llm = AutoModelForCausalLM.from_pretrained(base / "llm", tie_word_embeddings=True)
    shutil.copytree(base / "llm", tmp_path / "base" / "llm")
    llm.save_pretrained(tmp_path / "base" / "llm")
    for part in ("vision", "speech", "audio.safetensors"):
        (tmp_path / "base" / part).symlink_to((base / part).resolve())
    run, out = write_run(tmp_path / "run", tmp_path / "base", "lora", target_modules=["lm_head"]), tmp_path / "merged"
    assert main([str(run), str(out), "--to", "llm"]) == 2
    assert "changes lm_head, whose weight is another module's too" in capsys.readouterr().err
    assert not out.exists()
    run = write_run(tmp_path / "inner", tmp_path / "base", "lora")  # layers within are no one else's
    assert main([str(run), str(out), "--to", "llm"]) == 0


def test_a_sum_that_is_not_finite_is_told(tmp_path, base, capsys):
    run = write_run(tmp_path / "run", base, "lora")
    file = run / "final" / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor.fill_(float("nan")) for key, tensor in load_file(file).items()}, file)
    write_manifest(run / "final")
    assert main([str(run), str(tmp_path / "merged"), "--to", "llm"]) == 2
    assert "cannot be merged: NaNs" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_base_that_lies_elsewhere_is_named(tmp_path, base, capsys):
    run, out = write_run(tmp_path / "run", base, "lora"), tmp_path / "merged"
    config = load_config(run / "config.yaml")
    config.model.llm.path, config.versions = str(tmp_path), {"base": {"fingerprint": "of another one"}}
    config.dump(run / "config.yaml")
    assert main([str(run), str(out), "--to", "llm"]) == 2
    assert "--base PATH" in capsys.readouterr().err
    assert main([str(run), str(out), "--to", "llm", "--base", str(base / "llm")]) == 0
    MultimodalLM.from_run(out, device="cpu")  # OUT's base is the one that was named
    assert main([str(run), "--dry-run", "--base", str(base / "llm")]) == 2
    assert "--base goes with" in capsys.readouterr().err


def test_merging_makes_nothing_but_out(tmp_path, base, capsys):
    run, out = write_run(tmp_path / "run", base, "lora"), tmp_path / "merged"
    config = load_config(run / "config.yaml")
    config.data.cache = CacheConfig(dir=str(tmp_path / "cache"))  # of the machine that the run was made on
    config.dump(run / "config.yaml")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main([str(run), str(run / "final" / "llm"), "--to", "llm"]) == 2
    assert "choose a name beside the run" in capsys.readouterr().err
    assert main([str(run), str(out), "--to", "llm"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "merged"}
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert not capsys.readouterr().err


def test_a_full_disk_leaves_nothing(tmp_path, base, capsys):
    """Below the size of the LLM's file, above that of the others, the kernel refuses to write."""
    run, out = write_run(tmp_path / "run", base, "lora"), tmp_path / "merged"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, before[1]))
        assert main([str(run), str(out), "--to", "llm"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "merged cannot be written" in capsys.readouterr().err
    assert not out.exists()
    assert main([str(run), str(out), "--to", "llm"]) == 0


def test_a_dry_run_says_what_would_be_written(tmp_path, base, capsys):
    run = write_run(tmp_path / "run", base, "lora")
    assert main([str(run), "--to", "llm", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["to"], told["written"]) == ("llm", False)
    assert "lora" in told["found"]


def test_the_real_command_prints_one_object(tmp_path, base):
    """In a process of its own: libraries speak when they are first imported."""
    run, out = write_run(tmp_path / "run", base, "lora"), tmp_path / "merged"
    command = [sys.executable, "-m", "mokamm.convert", str(run), str(out), "--to", "llm", "--json"]
    done = subprocess.run(command, cwd=test_infer.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(out)
