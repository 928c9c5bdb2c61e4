"""BEATs (arXiv 2212.09058), an audio transformer over 16x16 patches of a Kaldi filter bank, written anew.

Parameter names are the published ones, so that the published checkpoints load strictly and ours load there:

    waveform (N,S) 16 kHz -> fbank (N,T,128) -> 16x16 patches (N,P,E), time-major over 8 frequency rows
      -> LayerNorm -> Linear E->C -> x + GELU(pos_conv(x)) -> LayerNorm -> L post-norm layers with deep norm

Attention adds a bias of T5-style relative position buckets (one table, shared by all layers), scaled per layer, head
and query by a gate that reads the projected query. No final norm; a fine-tuned checkpoint has a linear `predictor`.

Padding: a frame is padding when all of its samples are, a patch when all of its frames are. The published code spreads
the mask of frames evenly over the flattened patches: the same wherever the valid samples end with a row of patches; of
a row that they end in, it masks some frequency rows, which no sound accounts for, and here the row counts as valid.

Cost: one second of sound is 98 frames, 48 patches; about 4 GFLOP for the 90 M parameter model.

Legend: N segments, S samples, T frames, P patches, E patch width (512), C model width (768), H heads, d = C / H.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.base import EncoderError, load_exactly, require_path
from encoders.fbank import HOP, MEL_BINS, WINDOW, kaldi_fbank
from encoders.options import option_problems
from encoders.pretrained import shapes_only

FBANK_MEAN, FBANK_STD = 15.41663, 6.55582
# What the published BEATsConfig assumes of a key that a checkpoint's cfg lacks, where ours for a new model differs.
PUBLISHED_DEFAULTS: dict[str, Any] = {
    "deep_norm": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "relative_position_embedding": False,
    "max_distance": 1280,
    "gru_rel_pos": False,
    "finetuned_model": False,
    "predictor_dropout": 0.1,
}


Size = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(kw_only=True)
class BeatsConfig:
    """The `cfg` of a checkpoint; defaults, for a new model, are the fine-tuned AS2M one's (training-only rates are 0).

    The annotations are what a checkpoint may say, read strictly as those of an encoder's options are.
    """

    input_patch_size: Annotated[int, Field(ge=1, le=MEL_BINS)] = 16
    embed_dim: Size = 512
    conv_bias: bool = False
    encoder_layers: Size = 12
    encoder_embed_dim: Size = 768
    encoder_ffn_embed_dim: Size = 3072
    encoder_attention_heads: Size = 12
    activation_fn: str = "gelu"
    layer_wise_gradient_decay_ratio: float = 1.0
    layer_norm_first: bool = False
    deep_norm: bool = True
    dropout: Rate = 0.0
    attention_dropout: Rate = 0.0
    activation_dropout: Rate = 0.0
    encoder_layerdrop: Rate = 0.0
    dropout_input: Rate = 0.0
    conv_pos: Size = 128
    conv_pos_groups: Size = 16
    relative_position_embedding: bool = True
    num_buckets: Annotated[int, Field(ge=4)] = 320
    max_distance: Size = 800
    gru_rel_pos: bool = True
    finetuned_model: bool = True
    predictor_dropout: Rate = 0.0
    predictor_class: Size = 527

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> BeatsConfig:
        """A checkpoint's cfg: fields it lacks are the published code's, those unknown here are ignored.

        EncoderError names every value that is of another type or range than its field's.
        """
        if cfg.get("input_patch_size", -1) == -1:
            raise EncoderError("the BEATs checkpoint's cfg has no input_patch_size; the published ones say 16")
        complete = {**PUBLISHED_DEFAULTS, **cfg}
        values = {field.name: complete[field.name] for field in fields(cls) if field.name in complete}
        if problems := option_problems(values, cls):
            raise EncoderError("the BEATs checkpoint's cfg cannot be read: " + "; ".join(problems))
        return cls(**values)

    def __post_init__(self) -> None:
        if self.activation_fn != "gelu" or self.layer_norm_first:
            raise EncoderError(
                "this BEATs checkpoint is of a kind that was never published: expected activation_fn gelu and "
                f"layer_norm_first false, found {self.activation_fn} and {self.layer_norm_first}"
            )
        for parts in ("encoder_attention_heads", "conv_pos_groups"):
            if self.encoder_embed_dim % getattr(self, parts):
                raise EncoderError(
                    f"a BEATs model's encoder_embed_dim is a multiple of its {parts}; found {self.encoder_embed_dim} "
                    f"and {getattr(self, parts)}"
                )
        if self.max_distance <= self.num_buckets // 4:  # so many distances have a bucket of their own
            raise EncoderError(
                f"a BEATs model's max_distance is above a quarter of its num_buckets; found {self.max_distance} and "
                f"{self.num_buckets}"
            )


# ---- network --------------------------------------------------------------------------------------------------------


def relative_position_buckets(length: int, num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """(length, length) bucket of key minus query: half per direction, of which half exact and half logarithmic."""
    positions = torch.arange(length, device=device)
    distance = positions[None, :] - positions[:, None]
    per_side = num_buckets // 2
    exact = per_side // 2
    absolute = distance.abs()
    # the float32 steps below are the published ones, in their order: another order moves a few bucket borders
    far = torch.log(absolute.clamp_min(1).float() / exact) / math.log(max_distance / exact) * (per_side - exact)
    far = (exact + far.long()).clamp_max(per_side - 1)
    return (distance > 0).long() * per_side + torch.where(absolute < exact, absolute, far)


class PositionalConv(nn.Module):
    """Grouped convolution over positions with weight norm over dim 2, in the published (old) parameter names."""

    def __init__(self, cfg: BeatsConfig) -> None:
        super().__init__()
        width, kernel = cfg.encoder_embed_dim, cfg.conv_pos
        weight = torch.randn(width, width // cfg.conv_pos_groups, kernel) * math.sqrt(4 / (kernel * width))
        self.groups = cfg.conv_pos_groups
        self.weight_g = nn.Parameter(weight.norm(dim=(0, 1), keepdim=True))
        self.weight_v = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_NPC: Tensor) -> Tensor:
        kernel = self.weight_v.shape[2]
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        y = F.conv1d(x_NPC.transpose(1, 2), weight, self.bias, padding=kernel // 2, groups=self.groups)
        return y[..., : x_NPC.shape[1]].transpose(1, 2)  # an even kernel gives one position too many


class GatedAttention(nn.Module):
    """Multi-head self-attention whose position bias is gated per head and query."""

    def __init__(self, cfg: BeatsConfig) -> None:
        super().__init__()
        width = cfg.encoder_embed_dim
        self.heads, self.dropout = cfg.encoder_attention_heads, cfg.attention_dropout
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.gated = cfg.relative_position_embedding and cfg.gru_rel_pos
        if cfg.relative_position_embedding:
            self.relative_attention_bias = nn.Embedding(cfg.num_buckets, self.heads)
        if cfg.gru_rel_pos:
            self.grep_linear = nn.Linear(width // self.heads, 8)
            self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def gate(self, q_NHPd: Tensor) -> Tensor:
        """(N,H,P,1) factor of the position bias, from the projected, unscaled query."""
        halves = self.grep_linear(q_NHPd).unflatten(-1, (2, 4)).sum(-1)
        a, b = torch.sigmoid(halves).chunk(2, dim=-1)
        return a * (b * self.grep_a - 1.0) + 2.0

    def forward(self, x_NPC: Tensor, bias_HPP: Tensor | None, padding_NP: Tensor | None) -> Tensor:
        q, k, v = (
            projection(x_NPC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias = bias_HPP
        if bias is not None and self.gated:
            bias = self.gate(q) * bias
        if padding_NP is not None:
            blocked = padding_NP[:, None, None, :]
            zero = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
            bias = torch.where(blocked, float("-inf"), zero)
        elif bias is not None and bias.dim() == 3:
            bias = bias[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Post-norm with deep norm: x = LN(alpha x + sublayer(x)), alpha = (2 L)^(1/4)."""

    def __init__(self, cfg: BeatsConfig) -> None:
        super().__init__()
        width = cfg.encoder_embed_dim
        self.alpha = (2 * cfg.encoder_layers) ** 0.25 if cfg.deep_norm else 1.0
        self.self_attn = GatedAttention(cfg)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, cfg.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(cfg.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.rates = (cfg.dropout, cfg.activation_dropout)

    def forward(self, x_NPC: Tensor, bias_HPP: Tensor | None, padding_NP: Tensor | None) -> Tensor:
        rate, inner_rate = self.rates
        y = F.dropout(self.self_attn(x_NPC, bias_HPP, padding_NP), rate, self.training)
        x_NPC = self.self_attn_layer_norm(self.alpha * x_NPC + y)
        y = F.dropout(F.gelu(self.fc1(x_NPC)), inner_rate, self.training)
        y = F.dropout(self.fc2(y), rate, self.training)
        return self.final_layer_norm(self.alpha * x_NPC + y)


class Transformer(nn.Module):
    """Positional convolution, LayerNorm, layers."""

    def __init__(self, cfg: BeatsConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.pos_conv = nn.Sequential(PositionalConv(cfg), nn.GELU())
        layers = [Layer(cfg) for _ in range(cfg.encoder_layers)]
        if cfg.relative_position_embedding:  # one table: the same module in every layer, so its key is repeated
            for layer in layers[1:]:
                layer.self_attn.relative_attention_bias = layers[0].self_attn.relative_attention_bias
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(cfg.encoder_embed_dim)

    def position_bias(self, length: int, device: torch.device) -> Tensor | None:
        """(H,P,P), computed once and used by every layer."""
        if not self.cfg.relative_position_embedding:
            return None
        buckets = relative_position_buckets(length, self.cfg.num_buckets, self.cfg.max_distance, device)
        first = self.layers[0]
        assert isinstance(first, Layer)
        return first.self_attn.relative_attention_bias(buckets).permute(2, 0, 1)

    def forward(self, x_NPC: Tensor, padding_NP: Tensor | None) -> list[Tensor]:
        """What the first layer reads, then what each layer gives: layers + 1 tensors (N,P,C)."""
        if padding_NP is not None:
            x_NPC = x_NPC.masked_fill(padding_NP[..., None], 0.0)
        x_NPC = self.layer_norm(x_NPC + self.pos_conv(x_NPC))
        x_NPC = F.dropout(x_NPC, self.cfg.dropout, self.training)
        bias = self.position_bias(x_NPC.shape[1], x_NPC.device)
        states = [x_NPC]
        for layer in self.layers:
            if not self.training or self.cfg.encoder_layerdrop == 0.0 or torch.rand(()) >= self.cfg.encoder_layerdrop:
                x_NPC = layer(x_NPC, bias, padding_NP)
            states.append(x_NPC)
        return states


class BEATs(nn.Module):
    """The model, usable for training (gradients flow, dropout as in cfg) and, frozen, as an encoder."""

    def __init__(self, cfg: BeatsConfig) -> None:
        super().__init__()
        self.cfg = cfg
        patch, width = cfg.input_patch_size, cfg.encoder_embed_dim
        self.patch_embedding = nn.Conv2d(1, cfg.embed_dim, patch, stride=patch, bias=cfg.conv_bias)
        self.layer_norm = nn.LayerNorm(cfg.embed_dim)
        self.post_extract_proj = nn.Linear(cfg.embed_dim, width) if cfg.embed_dim != width else None
        self.encoder = Transformer(cfg)
        self.predictor = nn.Linear(width, cfg.predictor_class) if cfg.finetuned_model else None
        self._initialise()

    def _initialise(self) -> None:
        """As published: normal(0.02) in the transformer, then Xavier with deep norm's gains."""
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        beta = (8 * self.cfg.encoder_layers) ** -0.25
        for layer in self.encoder.layers:
            if not (isinstance(layer, Layer) and self.cfg.deep_norm):
                continue
            attention = layer.self_attn
            for linear, gain in ((attention.q_proj, 1.0), (attention.k_proj, 1.0), (attention.v_proj, beta)):
                nn.init.xavier_normal_(linear.weight, gain=gain)
            for linear in (attention.out_proj, layer.fc1, layer.fc2):
                nn.init.xavier_normal_(linear.weight, gain=beta)

    @property
    def row_samples(self) -> int:
        """Samples from one row of patches to the next (2560: 16 frames of 10 ms)."""
        return self.cfg.input_patch_size * HOP

    @property
    def least_samples(self) -> int:
        """Samples that one whole row of patches reads (2800)."""
        return (self.cfg.input_patch_size - 1) * HOP + WINDOW

    @property
    def frequency_rows(self) -> int:
        return MEL_BINS // self.cfg.input_patch_size

    def features(self, waveform_NS: Tensor, lengths_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Waveforms in [-1, 1] at 16 kHz -> (x (N,P,C), patch_mask (N,P), True at patches that are not all padding).

        Samples past `lengths` are taken as zeros. A waveform shorter than one row of patches is padded to one.
        """
        return self.from_fbank(self.fbank(waveform_NS, lengths_N), lengths_N)

    def fbank(self, waveform_NS: Tensor, lengths_N: Tensor | None = None) -> Tensor:
        """Normalised filter bank (N,T,128), samples past `lengths` taken as zeros, at least one row of patches long."""
        samples = waveform_NS.shape[1]
        if lengths_N is not None:
            waveform_NS = waveform_NS * (torch.arange(samples, device=waveform_NS.device) < lengths_N[:, None])
        waveform_NS = F.pad(waveform_NS, (0, max(0, self.least_samples - samples)))
        return (kaldi_fbank(waveform_NS.float() * 2**15) - FBANK_MEAN) / (2 * FBANK_STD)

    def from_fbank(self, fbank_NTM: Tensor, lengths_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised filter banks and valid *samples* -> as `features`."""
        states, mask_NP = self.hidden_states(fbank_NTM, lengths_N)
        return states[-1], mask_NP

    def hidden_states(self, fbank_NTM: Tensor, lengths_N: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """As `from_fbank`, with the embedding and every layer's output (N,P,C) in the place of the last one's."""
        patches_NERM = self.patch_embedding(fbank_NTM[:, None].to(self.patch_embedding.weight.dtype))
        x_NPC = self.layer_norm(patches_NERM.flatten(2).transpose(1, 2))
        if self.post_extract_proj is not None:
            x_NPC = self.post_extract_proj(x_NPC)
        x_NPC = F.dropout(x_NPC, self.cfg.dropout_input, self.training)
        mask_NP = torch.ones(x_NPC.shape[:2], dtype=torch.bool, device=x_NPC.device)
        if lengths_N is not None:
            row = torch.arange(mask_NP.shape[1], device=mask_NP.device) // self.frequency_rows
            mask_NP = row * self.row_samples < lengths_N.clamp_min(1)[:, None]
        return self.encoder(x_NPC, None if lengths_N is None else ~mask_NP), mask_NP

    def logits(self, x_NPC: Tensor, mask_NP: Tensor | None = None) -> Tensor:
        """(N, classes): the predictor's linear map, averaged over valid patches; sigmoid gives the published output."""
        if self.predictor is None:
            raise EncoderError("this BEATs checkpoint has no predictor (it was pre-trained only)")
        logits_NPK = self.predictor(F.dropout(x_NPC, self.cfg.predictor_dropout, self.training))
        if mask_NP is None:
            return logits_NPK.mean(1)
        weight = mask_NP[..., None].to(logits_NPK.dtype)
        return (logits_NPK * weight).sum(1) / weight.sum(1)

    def forward(self, waveform_NS: Tensor, lengths_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.features(waveform_NS, lengths_N)


# ---- files ----------------------------------------------------------------------------------------------------------


def save_beats(path: str | Path, model: BEATs) -> None:
    """`.safetensors` with the cfg as JSON under the metadata key "cfg", or `.pt` in the published layout."""
    state = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in model.state_dict().items()}
    if Path(path).suffix == ".pt":
        torch.save({"cfg": asdict(model.cfg), "model": state}, path)
        return
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt", "cfg": json.dumps(asdict(model.cfg))})


def load_beats(path: str | Path) -> BEATs:
    """A BEATs in float32 on the CPU, every key accounted for. A `.pt` is read with `weights_only=True`.

    It has a predictor where the file holds one, whatever its cfg says. Under `with torch.device("meta")` tensors are
    not read from the file; all keys and shapes are compared all the same.
    """
    file = require_path(path, "BEATs checkpoint")
    if file.is_dir():
        raise EncoderError(
            f"{file} is a folder; expected BEATs' .pt, or the .safetensors that mokamm convert makes of it"
        )
    cfg, state = _read_pt(file) if file.suffix in {".pt", ".pth", ".bin"} else _read_safetensors(file)
    with torch.device("meta"):
        model = BEATs(BeatsConfig.from_dict({**cfg, "finetuned_model": "predictor.weight" in state}))
    load_exactly(model, state, file)
    return model.float()


def _read_safetensors(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            read = _shape if shapes_only() else type(opened).get_tensor
            state = {key: read(opened, key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"{file} is not a whole safetensors file: {error}") from error
    if "cfg" not in metadata:
        found = ", ".join(metadata) or "none"
        raise EncoderError(
            f"{file} has no metadata key 'cfg' (found: {found}); make the file from the published checkpoint by "
            "mokamm convert FILE.pt OUT.safetensors"
        )
    try:
        cfg = json.loads(metadata["cfg"])
    except ValueError:
        cfg = None
    if not isinstance(cfg, dict):
        raise EncoderError(f"{file}: expected a JSON object under the metadata key 'cfg', found {metadata['cfg'][:80]}")
    return cfg, state


def _shape(opened: Any, key: str) -> Tensor:
    return torch.empty(opened.get_slice(key).get_shape(), device="meta")


def _read_pt(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import pickle

    try:
        content = torch.load(file, map_location="meta" if shapes_only() else "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{file} was refused: it holds Python objects (possibly code) beside tensors and was not executed; "
            "expected {'cfg': dict, 'model': tensors}"
        ) from error
    except Exception as error:  # torch raises many kinds, some of which say nothing
        told = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise EncoderError(f"{file} is not a whole .pt file: {told}") from error
    if not isinstance(content, dict) or not {"cfg", "model"} <= content.keys():
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise EncoderError(f"{file} is no BEATs checkpoint: expected the keys cfg and model, found {found}")
    cfg, state = content["cfg"], content["model"]
    if not isinstance(cfg, dict) or not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise EncoderError(f"{file} is no BEATs checkpoint: expected {{'cfg': dict, 'model': tensors}}")
    return cfg, state
