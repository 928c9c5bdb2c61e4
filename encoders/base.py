"""The one contract of all frozen encoders: segments in, features and a mask out.

An encoder answers three questions: `preprocess` (raw segments -> what its network reads), `forward` (-> `Features`) and
`num_tokens` (how many valid patches a segment of that extent has, so that a sample can be laid out before anything is
encoded). `encode` puts them together: no gradient, one device copy, chunks of `max_batch` segments.

Contracts worth knowing:
- A segment's valid features depend on that segment alone, never on its neighbours or on the padding beside it (up to
  the rounding of batched matrix products); that is what makes a feature cache legal.
- `mask` is True at real patches, which always come first; `encode` zeroes the features under a False mask.
- `num_tokens` is exact: it equals the mask's sum.

Cost: one forward pass of the frozen network per chunk, which frames of several sizes share where preprocessing makes them
equal; the activations of `max_batch` segments are alive at a time.

Legend: F segments, P patches (of the longest segment in the call), C feature width, S audio samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from encoders.errors import EncoderError, nearest

SAMPLE_RATE = 16_000  # of every waveform that enters an encoder
SHOWN = 5  # names that a message lists
# of a segment: a waveform's valid samples, a frame's (height, width); None: of a frame that has the most patches
Extent = int | tuple[int, int] | None

__all__ = [
    "SAMPLE_RATE",
    "Encoder",
    "EncoderError",
    "Extent",
    "Features",
    "load_exactly",
    "nearest",
    "parse_dtype",
    "require_path",
]


class Features(NamedTuple):
    """What an encoder says about F segments."""

    features: Tensor  # (F, P, C) in the encoder's dtype
    mask: Tensor  # (F, P) bool, True at real patches


class Encoder(nn.Module):
    """Base class. A subclass sets `modality_kind` and `width`, answers the three questions, and ends by `freeze`.

    `forward(*inputs) -> Features` takes what `preprocess` returned.
    """

    modality_kind: str  # "frames": uint8 (F,3,H,W); "waveform": float32 (F,S), mono at 16 kHz
    width: int  # C
    window_samples: int = SAMPLE_RATE  # the windows that a sound is cut into where the config names no length
    max_samples: int | None = None  # the longest segment that the network reads; None: any

    def __init__(self, *, options: Mapping[str, Any] | None = None, max_batch: int = 64) -> None:
        """`options`: everything beside weights and dtype that changes the features; it goes into the fingerprint."""
        super().__init__()
        if max_batch < 1:
            raise EncoderError(f"max_batch: expected at least 1 segment, found {max_batch}")
        self.max_batch = max_batch
        self._options = dict(options or {})
        self._fingerprint: str | None = None

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
        """Segments on the encoder's device and their valid samples (F,) int64 (None: frames) -> forward's inputs."""
        raise NotImplementedError

    def num_tokens(self, extent: Extent = None) -> int:
        """Valid patches of one segment: of a waveform by its valid samples, of a frame by (height, width)."""
        raise NotImplementedError

    def freeze(self, dtype: torch.dtype = torch.float32) -> None:
        self.to(dtype)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Encoder:
        """Frozen means frozen: a `train()` on a surrounding module never switches dropout on in here."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @torch.no_grad()
    def encode(self, segments: Tensor, lengths: Tensor | None = None) -> Features:
        """(F,3,H,W) uint8, or (F,S) float32 with valid samples (F,) (None: all) -> Features on the encoder's device.

        P is the number of valid patches of the longest segment in the call. F = 0 gives shape (0,0,C).
        """
        self._check(segments, lengths)
        if self.modality_kind == "waveform" and lengths is None:
            lengths = torch.full((len(segments),), segments.shape[1], dtype=torch.int64)
        if len(segments) == 0:
            return self._nothing()
        if lengths is None:
            return self.encode_frames([segments])[0]
        longest = self.num_tokens(int(lengths.max()))  # before the copy: no device sync
        segments, lengths = segments.to(self.device, non_blocking=True), lengths.to(self.device, non_blocking=True)
        chunks = [self(*self.preprocess(segments[part], lengths[part])) for part in self._parts(segments)]
        return _joined(chunks, longest)

    @torch.no_grad()
    def encode_frames(self, lots: Sequence[Tensor]) -> list[Features]:
        """Lots of frames, each of a size of its own, to what `encode` makes of each.

        Preprocessing gives most of them one size, so that they go through the network together, `max_batch` at a time.
        """
        found: list[list[Features]] = [[] for _ in lots]
        waiting: list[tuple[int, tuple[Tensor, ...]]] = []

        def run() -> None:
            features, mask = self(*(torch.cat(parts) for parts in zip(*(inputs for _, inputs in waiting), strict=True)))
            sizes = [len(inputs[0]) for _, inputs in waiting]
            for (k, _), *part in zip(waiting, features.split(sizes), mask.split(sizes), strict=True):
                found[k].append(Features(*part))
            waiting.clear()

        for k, frames in enumerate(lots):
            self._check(frames, None)
            on_device = frames.to(self.device, non_blocking=True)
            for part in self._parts(frames):
                inputs = self.preprocess(on_device[part], None)
                count = len(inputs[0]) + sum(len(others[0]) for _, others in waiting)
                if waiting and (count > self.max_batch or _shapes(inputs) != _shapes(waiting[0][1])):
                    run()
                waiting.append((k, inputs))
        if waiting:
            run()
        return [
            _joined(chunks, self.num_tokens((frames.shape[-2], frames.shape[-1]))) if chunks else self._nothing()
            for chunks, frames in zip(found, lots, strict=True)
        ]

    def _nothing(self) -> Features:
        empty = torch.zeros(0, 0, self.width, dtype=self.dtype, device=self.device)
        return Features(empty, empty.new_zeros(0, 0, dtype=torch.bool))

    def _parts(self, segments: Tensor) -> list[slice]:
        """At most `max_batch` of them at a time."""
        return [slice(i, i + self.max_batch) for i in range(0, len(segments), self.max_batch)]

    def _check(self, segments: Tensor, lengths: Tensor | None) -> None:
        expected, found = "", f"found {segments.dtype} {tuple(segments.shape)}"
        if self.modality_kind == "frames":
            if segments.dtype != torch.uint8 or segments.dim() != 4 or segments.shape[1] != 3:
                expected = "uint8 frames (F,3,H,W)"
        elif segments.dtype != torch.float32 or segments.dim() != 2:
            expected = "float32 waveforms (F,S)"
        elif lengths is not None and lengths.shape != segments.shape[:1]:
            expected, found = f"{len(segments)} lengths", f"found lengths of shape {tuple(lengths.shape)}"
        elif self.max_samples is not None and segments.shape[1] > self.max_samples:
            expected = f"segments of at most {self.max_samples / SAMPLE_RATE:g} s"
            found = f"found {segments.shape[1] / SAMPLE_RATE:g} s; set the modality's `seconds` to at most that"
        if expected:
            raise EncoderError(f"{type(self).__name__}: expected {expected}, {found}")

    def fingerprint(self) -> str:
        """sha256 over class, options, dtype and every weight's name, shape and bytes; computed when first asked."""
        if self._fingerprint is None:
            digest = hashlib.sha256(f"{type(self).__name__} {sorted(self._options.items())} {self.dtype}".encode())
            for name, tensor in sorted(self.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _joined(chunks: list[Features], longest: int) -> Features:
    """Chunks of one call as one, cut to its longest segment, with zeros where there is no patch."""
    features = torch.cat([chunk.features[:, :longest] for chunk in chunks])
    mask = torch.cat([chunk.mask[:, :longest] for chunk in chunks])
    return Features(features.masked_fill(~mask[..., None], 0.0), mask)


def _shapes(inputs: tuple[Tensor, ...]) -> list[torch.Size]:
    return [tensor.shape[1:] for tensor in inputs]


def parse_dtype(name: str) -> torch.dtype:
    """The precision that an encoder's weights are held and run in: "float32", "bfloat16" or "float16"."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise EncoderError(f"unknown encoder dtype '{name}'{nearest(name, known)}")
    return known[name]


def require_path(path: str | Path, what: str) -> Path:
    """`path` if it exists, else an error that says what is missing and where it was looked for."""
    found = Path(path)
    if not found.exists():
        raise EncoderError(
            f"{what} is missing: nothing at '{path}' (looked at {found.absolute()}); "
            "download it, or correct the encoder's `path`"
        )
    return found


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], where: str | Path) -> None:
    """Load `state` into `model`, every key accounted for; the error names what is missing, unexpected or misshapen."""
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            reshaped(key, state[key].shape, own[key].shape)
            for key in sorted(own.keys() & state.keys())
            if own[key].shape != state[key].shape
        ],
    }
    if found := counted(problems):
        raise EncoderError(f"{where} is not a checkpoint of {type(model).__name__}: weights {found}")
    model.load_state_dict(state, assign=True)


def reshaped(key: str, found: Iterable[int], expected: Iterable[int]) -> str:
    return f"{key}: {tuple(found)} instead of {tuple(expected)}"


def counted(problems: Mapping[str, list[str]]) -> str:
    """How many names each problem holds for, and the first of them; empty where there are none."""
    return "; ".join(f"{len(names)} {problem} ({shorten(names)})" for problem, names in problems.items() if names)


def shorten(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
