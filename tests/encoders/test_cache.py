"""The feature cache: exact hits, damage, the bound, and writers in several processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from encoders.base import EncoderError, Features
from encoders.cache import FeatureCache

ROOT = Path(__file__).parents[2]


def _features(seed: int, dtype: torch.dtype = torch.float32) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(2, 5, 100, generator=generator).to(dtype), torch.arange(10).reshape(2, 5) % 3 > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hit_equals_miss_bit_for_bit(tmp_path, dtype: torch.dtype) -> None:
    cache = FeatureCache(tmp_path, 1.0)
    key = cache.key("content", "encoder", "10 frames")
    assert cache.get(key) is None
    features = _features(0, dtype)
    cache.put(key, features)
    found = FeatureCache(tmp_path, 1.0).get(key)
    assert found is not None
    assert found.features.dtype == dtype
    assert torch.equal(found.features.view(torch.uint8), features.features.view(torch.uint8))
    assert torch.equal(found.mask, features.mask)


def test_slices_and_empty_features(tmp_path) -> None:
    cache = FeatureCache(tmp_path, 1.0)
    whole = _features(0)
    cache.put("a" * 64, Features(whole.features[:, 1:4], whole.mask[:, 1:4]))
    assert torch.equal(cache.get("a" * 64).features, whole.features[:, 1:4])
    cache.put("b" * 64, Features(torch.zeros(0, 0, 8), torch.zeros(0, 0, dtype=torch.bool)))
    assert cache.get("b" * 64).features.shape == (0, 0, 8)


def test_keys_differ() -> None:
    keys = {FeatureCache.key(*parts) for parts in [("a", "b", "c"), ("ab", "", "c"), ("", "ab", "c"), ("a", "bc", "")]}
    assert len(keys) == 4


def test_another_version_of_the_code_finds_nothing(monkeypatch) -> None:
    before = FeatureCache.key("a", "b", "c")
    monkeypatch.setattr("encoders.cache.VERSION", 0)
    assert FeatureCache.key("a", "b", "c") != before


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_entry_is_removed_and_missed(tmp_path, damage: str) -> None:
    cache = FeatureCache(tmp_path, 1.0)
    cache.put("a" * 64, _features(0))
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    broken = {"flip": bytes(content), "cut": bytes(content[:-100]), "empty": b"", "text": b"hello" * 100}[damage]
    path.write_bytes(broken)
    assert cache.get("a" * 64) is None
    assert not path.exists()
    cache.put("a" * 64, _features(0))
    assert cache.get("a" * 64) is not None


def test_bound_removes_the_least_recently_used(tmp_path) -> None:
    cache = FeatureCache(tmp_path, 1.0)
    cache.put("0" * 64, _features(0))
    size = cache.total_bytes()
    assert size > 4000
    cache = FeatureCache(tmp_path, 10.5 * size / 1e9)
    keys = [f"{i:x}" * 64 for i in range(10)]
    for i, key in enumerate(keys):
        cache.put(key, _features(i))
        (path,) = tmp_path.rglob(f"{key}.safetensors")
        os.utime(path, (time.time() - 1000 + i,) * 2)
    assert cache.get(keys[0]) is not None  # now the most recently used
    cache.put("f" * 64, _features(11))
    assert cache.total_bytes() <= cache.max_bytes
    assert cache.get(keys[1]) is None
    assert all(cache.get(key) is not None for key in (keys[0], keys[9], "f" * 64))
    for i in range(40):
        cache.put(cache.key(str(i), "", ""), _features(i))
        assert cache.total_bytes() <= cache.max_bytes


def test_the_bound_counts_what_another_writer_has_put_since(tmp_path) -> None:
    FeatureCache(tmp_path / "one", 1.0).put("a" * 64, _features(0))
    size = FeatureCache(tmp_path / "one", 1.0).total_bytes()
    one, other = (FeatureCache(tmp_path / "two", 50.9 * size / 1e9) for _ in range(2))
    for number, writer in enumerate([one] * 49 + [other, one] * 10):
        writer.put(FeatureCache.key(str(number), "", ""), _features(number))
        assert _bytes_on_disk(tmp_path / "two") <= one.max_bytes


def test_an_entry_over_the_bound(tmp_path) -> None:
    cache = FeatureCache(tmp_path, 1e-6)
    cache.put("a" * 64, _features(0))
    assert cache.get("a" * 64) is None
    assert cache.total_bytes() == 0


def test_what_a_killed_writer_left_counts_and_goes_first(tmp_path) -> None:
    FeatureCache(tmp_path, 1.0).put("a" * 64, _features(0))
    size = FeatureCache(tmp_path, 1.0).total_bytes()
    (tmp_path / "aa" / "x.tmp").write_bytes(b"x" * size)
    (tmp_path / "lock").write_text("not a num")
    cache = FeatureCache(tmp_path, 3.5 * size / 1e9)
    assert cache.total_bytes() == 2 * size
    cache.put("b" * 64, _features(1))
    assert (tmp_path / "aa" / "x.tmp").exists()
    cache.put("c" * 64, _features(2))
    assert not (tmp_path / "aa" / "x.tmp").exists()
    assert all(cache.get(letter * 64) is not None for letter in "abc")
    assert _bytes_on_disk(tmp_path) <= cache.max_bytes


def _bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


WRITER = """
import sys, torch
from encoders.base import Features
from encoders.cache import FeatureCache
cache, hits = FeatureCache(sys.argv[1], 480e-6), 0
for turn in range(300):
    often = turn % 3  # asked for again and again: never the oldest
    number = turn * int(sys.argv[2]) % 160 if turn % 2 else often
    key = cache.key(str(number), "e", "p")
    found = cache.get(key)
    if found is None:
        cache.put(key, Features(torch.full((2, 5, 100), float(number)), torch.ones(2, 5, dtype=torch.bool)))
    else:
        hits += 1
        assert (found.features == number).all()
print(hits)
"""


def test_two_writers(tmp_path) -> None:
    """Both read and write 160 keys, each in its own order and three of them often, in a folder that holds about 110,
    never more; a third is killed on the way."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    *writers, victim = [
        subprocess.Popen([*command, stride], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for stride in ("7", "11", "13")
    ]
    looks = 0
    while any(writer.poll() is None for writer in writers):
        with (tmp_path / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a sum over a folder that changes meanwhile would mean nothing
            size = _bytes_on_disk(tmp_path)
        assert size <= 480_000
        looks += size > 240_000
        if looks == 1:
            victim.kill()
        time.sleep(0.01)
    victim.communicate()
    assert looks > 3
    hits = [int(writer.communicate(timeout=120)[0]) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sum(hits) > 0
    assert 240_000 < _bytes_on_disk(tmp_path) <= 480_000
    assert len(list(tmp_path.rglob("*.tmp"))) <= 1  # what the killed one may leave


def test_a_full_disk_is_a_warning(tmp_path) -> None:
    cache = FeatureCache(tmp_path, 1.0)
    (tmp_path / "aa").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="going on without"):
        cache.put("a" * 64, _features(0))
    assert cache.get("a" * 64) is None


def test_bad_bound(tmp_path) -> None:
    with pytest.raises(EncoderError, match="max_gb must be positive, found 0"):
        FeatureCache(tmp_path, 0)
