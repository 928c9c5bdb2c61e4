"""What the tests of the routed layer's fast path and of its siblings share."""

from __future__ import annotations

from torch import Tensor


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """In the Frobenius norm, relative; what is zero is exactly zero."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = value.double().norm()
        assert (found[name].double() - value.double()).norm() <= tolerance * scale, name
