"""Routing: what every routed layer needs to know of a batch, computed once per batch.

A routed adapter (MokA and its kin, `mokamm/adapters/routed.py`) treats each token by its modality and lets media tokens
attend to the question's tokens. Both are facts of the batch, not of a layer, so they are worked out here once:

    modality_ids (B,T)   0 = text, 1.. = the media modalities in the adapter's order, -1 = padding
    key_mask     (B,T)   the tokens that media tokens attend to (the question); ragged, may be non-contiguous or empty
        |
        v
    key_index (B,Q), key_valid (B,Q)   positions of the keys, padded to the longest question

A row may hold several samples one after another (`sample_ids`): a media token then attends to its own sample's keys.

A tuner hands it to all of its layers (`mokamm/adapters/routed_context.py`).

Cost: a handful of small kernels per batch, memoised per dtype. Built from CPU tensors nothing here waits for a device.
Built from CUDA tensors it is worked out on the CPU, for which it waits once: Q, the highest id and whether all keys are
text (which the layers' fast path needs) are numbers of the host. With `key_index` given it does not wait, and knows the
last two of them on the CPU only. Layers never wait.

Shape legend: B batch, T tokens, D width, R rank, M modalities, Q key tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class AdapterError(ValueError):
    """A user's mistake in the use of an adapter; the message says what is wrong, where, and what to do next."""


class Routing:
    """The modality of every token of a batch, and where its keys are.

    Args:
        modality_ids: (B,T) integers, -1 = padding (the adapter adds nothing there), 0 = text, 1.. = media.
        key_mask: (B,T) bool, the keys of the cross-modal attention, read through the text path; never answer tokens.
        key_index, key_valid: (B,Q) the same keys as positions, where the collator has them ready; else computed.
        sample_ids: (B,T) integers, equal for the tokens of one sample, where a row holds several; else a row is one.

    Raises:
        AdapterError: shapes or dtypes disagree, or an id is below -1 (not looked for in CUDA tensors with `key_index`).
    """

    def __init__(
        self,
        modality_ids: Tensor | None,
        key_mask: Tensor | None,
        *,
        key_index: Tensor | None = None,
        key_valid: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> None:
        self._memo: dict[tuple, Any] = {}
        self.max_id: int | None = None
        self.keys_are_text = True  # as far as is known without waiting for a device
        self.may_be_padded = True  # likewise
        self.modality_ids, self.key_mask = modality_ids, key_mask
        self.key_index, self.key_valid, self.sample_ids = key_index, key_valid, sample_ids
        if modality_ids is None:
            return
        _check(modality_ids, key_mask, key_index, key_valid, sample_ids)
        device = modality_ids.device
        if device.type != "cpu" and key_index is None and key_mask is not None:
            found = Routing(modality_ids.cpu(), key_mask.cpu()).to(device)
            self._take_facts(found)
            self.key_index, self.key_valid = found.key_index, found.key_valid
            return
        if device.type == "cpu" and modality_ids.numel():
            low, self.max_id = (int(end) for end in torch.aminmax(modality_ids))
            if low < -1:
                raise AdapterError(f"modality_ids holds {low}; expected -1 (padding), 0 (text), 1.. (media).")
            self.may_be_padded = low < 0
        if key_index is None:
            self.key_index, self.key_valid = _positions(key_mask)
        elif key_index.shape[1] == 0:  # no sample has a question: one key that does not count
            self.key_index = key_index.new_zeros(len(key_index), 1)
            self.key_valid = self.key_index.bool()
        self.keys_are_text = device.type == "cpu" and self._all_keys_are_text()

    @classmethod
    def text_only(cls) -> Routing:
        """Says on purpose that every token of every batch, of any shape, is text."""
        return cls(None, None)

    @property
    def is_text_only(self) -> bool:
        return self.modality_ids is None

    @property
    def shape(self) -> tuple[int, int] | None:
        return None if self.modality_ids is None else (self.modality_ids.shape[0], self.modality_ids.shape[1])

    def __repr__(self) -> str:
        return "Routing.text_only()" if self.is_text_only else f"Routing(B, T = {self.shape})"

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Routing:
        """The same routing on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def repeated(self, times: int) -> Routing:
        """Every row `times` times in a row, as `generate` does for beams and for several sequences per prompt."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def tiled(self, times: int) -> Routing:
        """The whole batch `times` times, one after another; memoised."""
        return self._once(("tiled", times), lambda: self._map(lambda t: t.repeat(times, 1))) if times > 1 else self

    def view(self, rows: int, device: torch.device) -> Routing:
        """This routing for a layer on `device` that sees `rows` rows (a multiple of B); memoised."""
        if self.modality_ids is None or (rows == len(self.modality_ids) and device == self.modality_ids.device):
            return self
        times = rows // len(self.modality_ids)

        def make() -> Routing:
            moved = self.to(device)
            return moved.repeated(times) if times > 1 else moved

        return self._once(("view", rows, device), make)  # type: ignore[no-any-return]

    def before_text(self, tokens: int) -> Routing:
        """This routing with so many tokens of text after every row."""
        assert self.modality_ids is not None
        assert self.key_mask is not None
        longer = self._map(lambda tensor: tensor)
        longer.modality_ids = nn.functional.pad(self.modality_ids, (0, tokens))
        longer.key_mask = nn.functional.pad(self.key_mask, (0, tokens))
        if self.sample_ids is not None:
            longer.sample_ids = nn.functional.pad(self.sample_ids, (0, tokens))
        return longer

    def check_modalities(self, modalities: int) -> None:
        """Raises AdapterError where a token's modality is none of the adapter's."""
        if self.max_id is not None and self.max_id >= modalities:
            raise AdapterError(
                f"modality_ids holds {self.max_id}, but the adapter has {modalities} modalities (ids 0 to "
                f"{modalities - 1}, -1 = padding). Number the modalities in the order of MokaConfig.modalities."
            )

    def selection(self, modalities: int, dtype: torch.dtype, scale: float = 1.0, less_text: bool = False) -> Tensor:
        """(B,T,M,1): `scale` at each token's own modality, 0 elsewhere; a padding token has none.

        `less_text` takes away `scale` from the text path of every token: what is left where that path is folded in.
        """
        self.check_modalities(modalities)

        def make() -> Tensor:
            assert self.modality_ids is not None  # a text-only routing never reaches the mathematics
            ids_BT1 = self.modality_ids.unsqueeze(-1)
            own_BTM = ids_BT1 == torch.arange(modalities, device=ids_BT1.device)
            if less_text:
                own_BTM = own_BTM.to(dtype) - torch.arange(modalities, device=ids_BT1.device).eq(0).to(dtype)
            return own_BTM.unsqueeze(-1).to(dtype) * scale

        return self._once(("selection", modalities, dtype, scale, less_text), make)

    def media(self, modalities: int, dtype: torch.dtype) -> Tensor:
        """(B,T,M,1): 1 at a media token's own modality, if its sample has any key; text and padding are 0."""

        def make() -> Tensor:
            has_key_BT11 = self._open_keys().any(dim=2)[..., None, None]
            media_BTM1 = self.selection(modalities, dtype) * has_key_BT11
            return torch.cat([torch.zeros_like(media_BTM1[:, :, :1]), media_BTM1[:, :, 1:]], dim=2)

        return self._once(("media", modalities, dtype), make)

    def any_media(self, modalities: int, dtype: torch.dtype) -> Tensor:
        """(B,T,1): 1 where `media` has a 1."""
        return self._once(("any", modalities, dtype), lambda: self.media(modalities, dtype).sum(2))

    def key_bias(self, dtype: torch.dtype) -> Tensor:
        """(B,1,Q), with several samples in a row (B,T,Q): 0 at keys; elsewhere so low that softmax gives 0, yet finite,
        so that no key at all gives no NaN."""

        def make() -> Tensor:
            return (~self._open_keys()).to(dtype).mul(torch.finfo(dtype).min / 2)

        return self._once(("bias", dtype), make)

    def block_rows(self, modalities: int, blocks: int, layers: int = 1) -> Tensor:
        """(layers*B*T,): of B*T*layers*blocks blocks, `blocks` a token and layer, those of the tokens' own modalities.

        Layer by layer; a padding token has block M, the last of M+1.
        """
        self.check_modalities(modalities)

        def make() -> Tensor:
            assert self.modality_ids is not None
            ids_N = self.modality_ids.flatten()
            own_N = torch.arange(len(ids_N), device=ids_N.device) * layers * blocks
            own_N = own_N + torch.where(ids_N < 0, modalities, ids_N)
            return (torch.arange(layers, device=ids_N.device)[:, None] * blocks + own_N).flatten()

        return self._once(("rows", modalities, blocks, layers), make)

    def key_columns(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions (B,K) of the keys, K columns as in `attention_bias`, and (K,): 1 where a column may be a key, else 0."""

        def make() -> tuple[Tensor, Tensor]:
            assert self.key_index is not None
            Q, K = self.most_keys, self._columns()
            is_key_K = torch.arange(K, device=self.key_index.device) < Q
            return nn.functional.pad(self.key_index, (0, K - Q)), is_key_K.to(dtype)

        return self._once(("keys", dtype), make)

    def attention_bias(self, dtype: torch.dtype) -> Tensor:
        """(B,T,K): 0 where a token attends, elsewhere so low that softmax gives 0.

        The columns are the keys, then a sink, and closed ones up to a multiple of 8. A media token of a sample with
        keys attends to these, every other token to the sink alone.
        """

        def make() -> Tensor:
            assert self.modality_ids is not None
            Q, K, keys_BTQ = self.most_keys, self._columns(), self._open_keys()
            reads_BT1 = (self.modality_ids > 0).unsqueeze(-1) & keys_BTQ.any(dim=2, keepdim=True)
            open_BTK = reads_BT1 & nn.functional.pad(keys_BTQ, (0, K - Q))
            open_BTK[..., Q : Q + 1] = ~reads_BT1
            return (~open_BTK).to(dtype).mul(torch.finfo(dtype).min / 2)

        return self._once(("open", dtype), make)

    @property
    def most_keys(self) -> int:
        """Q, those of the longest question; at least 1."""
        assert self.key_index is not None
        return self.key_index.shape[1]

    def _columns(self) -> int:
        """Q keys and a sink, as a multiple of 8: whole vectors for a softmax, aligned rows for a GEMM."""
        return -(-(self.most_keys + 1) // 8) * 8

    def _all_keys_are_text(self) -> bool:
        assert self.modality_ids is not None
        assert self.key_index is not None
        assert self.key_valid is not None
        return not bool(((self.modality_ids.gather(1, self.key_index) != 0) & self.key_valid).any())

    def inverse_root_of_keys(self, dtype: torch.dtype) -> Tensor:
        """(B,1,1), with several samples in a row (B,T,1): 1 / sqrt(number of keys), 1 where there is none."""
        return self._once(
            ("root", dtype), lambda: self._open_keys().sum(2, keepdim=True).clamp_min(1).to(dtype).rsqrt()
        )

    def _open_keys(self) -> Tensor:
        """(B,1,Q) bool, with several samples in a row (B,T,Q): the keys that a media token there attends to."""
        assert self.key_index is not None
        assert self.key_valid is not None
        valid_B1Q = self.key_valid.unsqueeze(1)
        if self.sample_ids is None:
            return valid_B1Q
        return valid_B1Q & (self.sample_ids.unsqueeze(2) == self.sample_ids.gather(1, self.key_index).unsqueeze(1))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Routing:
        """A copy with `change` applied to every tensor, without checking or synchronising again."""
        copy = Routing.text_only()
        copy._take_facts(self)
        for name in ("modality_ids", "key_mask", "key_index", "key_valid", "sample_ids"):
            tensor = getattr(self, name)
            setattr(copy, name, None if tensor is None else change(tensor))
        return copy

    def _take_facts(self, other: Routing) -> None:
        """What is known of the tensors without reading them."""
        self.max_id, self.keys_are_text, self.may_be_padded = other.max_id, other.keys_are_text, other.may_be_padded

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if torch._C._are_functorch_transforms_active():  # what is made under torch.func is of no use after it
            return make()
        if key not in self._memo:
            # not an inference tensor even where generation asks first: training may use the same routing later
            with torch.inference_mode(False), torch.no_grad():
                self._memo[key] = make()
        return self._memo[key]


def _check(
    modality_ids: Tensor,
    key_mask: Tensor | None,
    key_index: Tensor | None,
    key_valid: Tensor | None,
    sample_ids: Tensor | None,
) -> None:
    shape = tuple(modality_ids.shape)
    if modality_ids.dim() != 2 or modality_ids.is_floating_point() or modality_ids.dtype == torch.bool:
        raise AdapterError(f"modality_ids must be (B,T) integers; found {shape} {modality_ids.dtype}.")
    if key_mask is None or key_mask.dtype != torch.bool or key_mask.shape != modality_ids.shape:
        found = None if key_mask is None else f"{tuple(key_mask.shape)} {key_mask.dtype}"
        raise AdapterError(f"key_mask must be bool of modality_ids' shape {shape}; found {found}.")
    if sample_ids is not None and (sample_ids.shape != modality_ids.shape or sample_ids.is_floating_point()):
        found = f"{tuple(sample_ids.shape)} {sample_ids.dtype}"
        raise AdapterError(f"sample_ids must be integers of modality_ids' shape {shape}; found {found}.")
    if (key_index is None) != (key_valid is None):
        raise AdapterError("key_index and key_valid come together: give both or neither.")
    if key_index is not None and key_valid is not None:
        fits = key_index.dim() == 2 and key_index.shape == key_valid.shape and len(key_index) == shape[0]
        if not fits or key_index.dtype != torch.int64 or key_valid.dtype != torch.bool:
            raise AdapterError(
                f"key_index must be (B,Q) int64 and key_valid (B,Q) bool with B = {shape[0]}; found "
                f"{tuple(key_index.shape)} {key_index.dtype} and {tuple(key_valid.shape)} {key_valid.dtype}."
            )


def _positions(key_mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B,Q) positions of the keys in order and which of them count; Q = the longest question, at least 1."""
    assert key_mask_BT is not None  # refused by _check
    counts_B = key_mask_BT.sum(dim=1)
    Q = max(int(counts_B.max()), 1) if counts_B.numel() else 1
    key_index_BQ = key_mask_BT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :Q]
    return key_index_BQ, torch.arange(Q, device=key_mask_BT.device) < counts_B[:, None]
