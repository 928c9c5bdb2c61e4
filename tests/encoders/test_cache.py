"""The feature cache: exact hits, damage, the bound, and writers in several processes."""

from __future__ import annotations

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


def test_an_entry_over_the_bound_and_abandoned_files(tmp_path) -> None:
    cache = FeatureCache(tmp_path, 1e-6)
    cache.put("a" * 64, _features(0))
    assert cache.get("a" * 64) is None
    abandoned = tmp_path / "aa" / ".x.tmp"
    abandoned.write_bytes(b"x" * 10)
    os.utime(abandoned, (0, 0))
    assert cache.total_bytes() == 0
    assert not abandoned.exists()
    assert not list(tmp_path.rglob("*.*"))


WRITER = """
import sys, torch
from encoders.base import Features
from encoders.cache import FeatureCache
cache, hits = FeatureCache(sys.argv[1], 120e-6), 0
for turn in range(150):
    number = turn * 7 % 40 if turn % 2 else turn % 3  # some are asked for again and again: these are never the oldest
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
    """Both read and write the same 40 keys, three of them often, in a folder that holds about 28."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    hits = [int(writer.communicate(timeout=120)[0]) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sum(hits) > 0
    assert FeatureCache(tmp_path, 1.0).total_bytes() <= 120e3 * 1.1
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_is_a_warning(tmp_path) -> None:
    cache = FeatureCache(tmp_path, 1.0)
    (tmp_path / "aa").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="going on without"):
        cache.put("a" * 64, _features(0))
    assert cache.get("a" * 64) is None


def test_bad_bound(tmp_path) -> None:
    with pytest.raises(EncoderError, match="max_gb must be positive, found 0"):
        FeatureCache(tmp_path, 0)
