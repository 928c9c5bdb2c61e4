"""LoRI's masks: which entries are kept, against a sort; their files and their command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.schema import UserError
from mokamm import cli
from mokamm.adapters import AdapterError, wrap
from mokamm.adapters.masks import Mask, count, keep_top, pack, unpack
from mokamm.adapters.start import a_digest, factors
from mokamm.lori_mask import cut, main, read_mask, write_mask
from tests.mokamm.toy_lori import OPTIONS, kept, random_b, small_llm


def by_sorting(dense: dict[str, Tensor], sparsity: float) -> set[tuple[str, int]]:
    """The same choice by sorting all entries, the largest first, the earlier before the later among equals."""
    every = [(-abs(value), name, i) for name in sorted(dense) for i, value in enumerate(dense[name].flatten().tolist())]
    keep = max(1, round((1 - sparsity) * len(every)))
    return {(name, i) for _, name, i in sorted(every)[:keep]}


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=4),
    sparsity=st.floats(0.01, 0.99),
    levels=st.sampled_from([1, 2, 5, 1000]),
    seed=st.integers(0, 99),
)
def test_exactly_the_largest_are_kept_ties_by_position(shapes: list, sparsity: float, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = [f"layers.{i}" for i in (10, 2, 1, 0)]
    dense = {
        name: torch.randint(-levels, levels + 1, shape, generator=generator) / levels * 1e-3
        for name, shape in zip(names, shapes, strict=False)
    }
    next(iter(dense.values()))[0, 0] = 1.0  # not all zero
    mask = keep_top({name: tuple(B.shape) for name, B in dense.items()}, dense.__getitem__, sparsity)  # type: ignore[misc]
    found = {(name, i) for name in dense for i in kept(mask, name).flatten().nonzero().flatten().tolist()}
    assert found == by_sorting(dense, sparsity)
    assert mask.kept == len(found)
    assert mask.total == sum(map(math.prod, mask.shapes.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_and_both_halves_of_the_bits_count(dtype: torch.dtype) -> None:
    """Values that differ in the last bits only, many equal ones in the narrow dtypes, over 12 orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    dense = {"a": torch.randn(300, 8, generator=generator), "b": torch.randn(300, 8, generator=generator) * 1e-6}
    dense["c"] = (1 + torch.arange(2400).view(300, 8) * 2.0**-23) * 0.5
    dense = {name: B.to(dtype) for name, B in dense.items()}
    for sparsity in (0.9, 0.6, 0.2, 0.01):
        mask = keep_top(dict.fromkeys(dense, (300, 8)), dense.__getitem__, sparsity)
        found = {(name, i) for name in dense for i in kept(mask, name).flatten().nonzero().flatten().tolist()}
        assert found == by_sorting({name: B.double() for name, B in dense.items()}, sparsity)


@given(bits=st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits(bits: list[bool]) -> None:
    packed = pack(torch.tensor(bits))
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-len(bits) // 8)
    assert unpack(packed, len(bits)).tolist() == bits
    assert count(packed) == sum(bits)


def test_what_no_mask_can_be_cut_from() -> None:
    for B, message in (
        (torch.zeros(2, 2), "B is zero everywhere, as before any training"),
        (torch.tensor([[1.0, math.nan], [0, 0]]), "not finite"),
        (torch.tensor([[1.0, math.inf], [0, 0]]), "not finite"),
        (torch.ones(2, 3), r"B is \(2, 3\), expected \(2, 2\)"),
    ):
        with pytest.raises(AdapterError, match=message):
            keep_top({"x": (2, 2)}, lambda name, B=B: B, 0.5)


# ---- files and the command -------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, dict[str, Tensor], str]:
    """The folder of a LoRI-D, its B and the hash of its A."""
    model = wrap(small_llm(torch.float32), "lori_d", ["text"], {**OPTIONS, "a_seed": 5})
    dense = random_b(model)
    for name, (_, B) in factors(model).items():
        B.weight.data.copy_(dense[name])
    model.save_pretrained(tmp_path / "run" / "final" / "adapter")
    return tmp_path / "run", {name: B.float() for name, B in dense.items()}, a_digest(model)


def test_the_command_cuts_what_the_function_cuts(trained: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, dense, a_hash = trained
    out = tmp_path / "masks" / "m.safetensors"
    assert main([str(run), "--sparsity", "0.75", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    mask = read_mask(out)
    expected = keep_top({name: tuple(B.shape) for name, B in dense.items()}, dense.__getitem__, 0.75)  # type: ignore[misc]
    assert mask.digest() == expected.digest()
    assert told == {"mask": str(out), "kept": mask.kept, "entries": mask.total, "a_hash": a_hash}
    assert mask.a_hash == a_hash
    model = wrap(small_llm(), "lori_s", ["text"], {**OPTIONS, "a_seed": 5})
    model.base_model.set_mask(mask)
    assert model.get_nb_trainable_parameters()[0] == round(0.25 * mask.total)
    other = wrap(small_llm(), "lori_s", ["text"], {**OPTIONS, "a_seed": 6})
    with pytest.raises(AdapterError, match="trained with another A"):
        other.base_model.set_mask(mask)
    with pytest.raises(SystemExit) as end:
        cli.main(["lori-mask", str(run), "--out", str(tmp_path / "again.safetensors")])
    assert end.value.code == 0
    told = capsys.readouterr().out.splitlines()
    again = read_mask(tmp_path / "again.safetensors")
    assert again.kept == round(0.1 * again.total)  # of nine in ten nothing trains, where nobody asks otherwise
    up = [name for name in again.bits if name.endswith(".up_proj")]
    counts = sum(count(again.bits[name]) for name in up), sum(math.prod(again.shapes[name]) for name in up)
    assert [line.split() for line in told if "up_proj" in line or " all " in line] == [
        [name, str(some), "of", f"{of:,}", f"{some / of:.2%}"]
        for name, some, of in (("up_proj", *counts), ("all", again.kept, again.total))
    ]
    write_mask(Mask(again.bits, again.shapes), out)
    assert read_mask(out).a_hash is None


def test_two_masks_are_told_apart() -> None:
    first = Mask({"a": pack(torch.tensor([True, False]))}, {"a": (2, 1)})
    second = Mask({"a": pack(torch.tensor([False, True]))}, {"a": (2, 1)})
    other = Mask({"a": pack(torch.tensor([True, False]))}, {"a": (1, 2)})
    assert len({mask.digest() for mask in (first, second, other)}) == 3
    names, bits = ("a", "b"), {"a": first.bits["a"], "b": second.bits["a"]}
    orders = [Mask({n: bits[n] for n in order}, dict.fromkeys(order, (2, 1))) for order in (names, names[::-1])]
    assert orders[0].digest() == orders[1].digest() != Mask({**bits, "b": bits["a"]}, orders[0].shapes).digest()


def test_bad_files_end_in_one_message(trained: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, dense, _ = trained
    out = str(tmp_path / "m.safetensors")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "empty")], "holds no adapter"),
        ([str(tmp_path / "nothing")], "holds no adapter"),
        ([str(run), "--sparsity", "1.5"], "sparsity must lie between 0 and 1"),
    ):
        assert main([*arguments, "--out", out]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert "Traceback" not in told
    for place, message in (
        (str(tmp_path / "empty"), "a folder lies where a file should be"),
        ("/proc/x/y", "/proc/x/y cannot be written: No such file or directory"),
        (str(run / "final/adapter/adapter_config.json/y"), "a file lies where a folder should be"),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert main([str(run), "--out", place]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert "choose another file (--out)" in told
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "text.safetensors").write_text("no mask")
    with pytest.raises(UserError, match="cannot be read as a mask"):
        read_mask(tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="is no mask that this mokamm knows"):
        read_mask(run / "final" / "adapter" / "adapter_model.safetensors")
    sparse = wrap(small_llm(), "lori_s", ["text"], OPTIONS)
    sparse.base_model.set_mask(keep_top({n: tuple(B.shape) for n, B in dense.items()}, dense.__getitem__, 0.5))  # type: ignore[misc]
    sparse.save_pretrained(tmp_path / "sparse")
    with pytest.raises(UserError, match="is sparse already"):
        cut(tmp_path / "sparse", 0.5)


def test_a_layer_that_keeps_nothing_has_no_parameter(tmp_path: Path) -> None:
    from peft import PeftModel

    model = wrap(small_llm(), "lori_s", ["text"], OPTIONS)
    dense = random_b(model)
    empty = "model.layers.0.self_attn.q_proj"
    dense[empty] *= 1e-9
    mask = keep_top({name: tuple(B.shape) for name, B in dense.items()}, dense.__getitem__, 0.9)  # type: ignore[misc]
    write_mask(mask, tmp_path / "m.safetensors")
    model.base_model.set_mask(read_mask(tmp_path / "m.safetensors"))
    assert factors(model)[empty][1].values is None
    for _, B in factors(model).values():
        if B.values is not None:
            nn.init.normal_(B.values)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids).logits.sum().backward()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(small_llm(), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.get_nb_trainable_parameters()[0] == mask.kept
