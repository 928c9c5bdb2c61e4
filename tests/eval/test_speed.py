"""The subjects of eval/speed/adapters.py compute the same thing; its counts are right; its command prints one object."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

from eval.speed.adapters import main
from eval.speed.counting import operations, peak_bytes, saved_bytes, waits
from eval.speed.subjects import LENGTH, Setup, forward_of, new_linear, placed_tokens, step_of, subjects
from eval.speed.timing import in_turns

FLOAT64 = Setup(dtype=torch.float64, alpha=8)


def test_the_plain_formula_and_the_routed_layer_are_the_same_function() -> None:
    made = subjects(new_linear(16, FLOAT64), FLOAT64)
    moka, plain = made["moka"].module, made["plain"].module
    for m, A in enumerate(plain.A):
        A.weight.data = moka.moka_A["default"].weight.data[4 * m : 4 * m + 4].clone() * 20
    moka.moka_A["default"].weight.data *= 20
    plain.B.weight.data = moka.moka_B["default"].weight.data.clone()
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64)
    ids, keys = placed_tokens(2)
    ids[1, 5:30], keys[1, 660:690] = 2, False
    results, gradients = [], []
    for subject in (made["moka"], made["plain"]):
        subject.announce(ids, keys)
        own = x.clone().requires_grad_()
        out = subject.module(own)
        out.square().sum().backward()
        results.append(out.detach())
        gradients.append(own.grad)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(results[0], made["base"].module(x))


def test_counts() -> None:
    linear, x = nn.Linear(8, 4), torch.randn(16, 8, requires_grad=True)

    def waiting() -> torch.Tensor:
        return linear(x)[torch.tensor([True, False] * 8)].sum() * float(x.detach().max())

    assert waits(waiting) == 2
    assert waits(lambda: linear(x).sum()) == 0
    assert operations(lambda: linear(x.detach()).relu()) == 2  # addmm, relu
    assert saved_bytes(lambda: linear(x)) == x.nbytes
    assert saved_bytes(lambda: linear(x) + linear(x)) == x.nbytes  # once
    assert saved_bytes(lambda: linear(x).exp()) == x.nbytes + 16 * 4 * 4
    assert peak_bytes(lambda: [torch.empty(1000).sum() for _ in range(3)] and torch.empty(10)) < 2 * 4000
    assert peak_bytes(lambda: torch.empty(1000) + torch.empty(1000)) >= 3 * 4000


def test_functions_run_in_turns() -> None:
    """One round to warm up, then rounds of all, of which none always follows the same one."""
    order: list[str] = []
    functions = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.002))}
    seconds = in_turns(functions, repeats=8)
    rounds = ["".join(order[k : k + 2]) for k in range(0, 18, 2)]
    assert rounds[0] == "ab"
    assert set(rounds) == {"ab", "ba"}
    order.clear()
    in_turns(functions, repeats=8)
    assert rounds == ["".join(order[k : k + 2]) for k in range(0, 18, 2)]
    assert len(seconds["a"]) == 8
    assert min(seconds["b"]) >= 0.002


def test_waits_and_operations_of_the_methods() -> None:
    """The plain formula waits and grows with the batch; the routed layer does neither."""
    base, counted = new_linear(16, Setup()), {}
    for batch in (1, 3):
        x = torch.randn(batch, LENGTH, 16, requires_grad=True)
        for name, subject in subjects(base, Setup()).items():
            subject.announce(*placed_tokens(batch))
            step = step_of(subject, Setup(), x, torch.ones_like(x), embeds=False)
            assert saved_bytes(forward_of(subject, Setup(), x, embeds=False)) >= 0
            counted[name, batch] = (operations(step), waits(step))
    assert counted["moka", 1] == counted["moka", 3]
    assert counted["moka", 1][1] == 0
    assert counted["plain", 3][0] > 2 * counted["plain", 1][0]
    assert counted["plain", 3][1] == 3 * counted["plain", 1][1] > 0


@pytest.mark.parametrize("parts", [["layer"], ["model", "decode"]])
def test_the_command(capsys: pytest.CaptureFixture, tmp_path, parts: list[str]) -> None:
    small = ["--rounds", "1", "--model-rounds", "2", "--batches", "1", "--widths", "16", "--tokens", "4"]
    out = tmp_path / "results" / "small.json"
    assert main(["--parts", *parts, *small, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert found["machine"]["threads"] >= 1
    assert set(found) >= {"command", "versions", "seed", "settings", *parts}
    for row in found.get("layer", []) + found.get("model", []):
        assert set(row["seconds"]) == {"base", "lora", "moka", "plain"}
        assert row["waits"]["moka"] == row["waits"]["base"]
    if "decode" in parts:
        assert set(found["decode"]["tokens_per_second"]) == {"base", "lora", "moka", "moka unfolded"}


def test_one_round_is_enough_and_less_is_refused(capsys: pytest.CaptureFixture) -> None:
    small = ["--parts", "layer", "--widths", "16", "--rounds", "1", "--batches", "8", "16", "--json"]
    assert main(small) == 0
    for row in json.loads(capsys.readouterr().out)["layer"]:
        assert row["overhead_quartiles"]["moka"] == [row["overhead"]["moka"]] * 2
    for wrong in (["--rounds", "0"], ["--model-rounds", "0"], ["--batches", "0"], ["--tokens", "1"]):
        with pytest.raises(SystemExit):
            main(["--parts", "layer", *wrong])
        assert f"{wrong[0]}: " in capsys.readouterr().err


def test_the_evaluation_answers_as_a_plain_loop(small_run, capsys: pytest.CaptureFixture, tmp_path) -> None:
    from eval.speed.generation import main as generation

    out = tmp_path / "small.json"
    assert generation([str(small_run), "--limit", "3", "--repeats", "1", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert (found["other_answers"], found["rows"]) == (0, 3 * 4 + 2 * 2)
    assert set(found["seconds"]) == {"one by one", "folded once", "eval/run.py"}
