"""The checkpoints that MokA's authors published, read into this project's folders with every key accounted for.

    adapter_model.bin        ...q_proj.lora_A0|A1|A2|B0.weight           audio-visual: text, video, audio; the shared B
                             ...q_proj.lora_A.{text,image}, lora_B.text  visual-text
    non_lora_trainables.bin  model.{vl,al}_projector.*                   LayerNorm, Q-Former in BLIP-2's naming, MLP
    visual_pretrain.bin, ..  the same, of stage 1: a file of any name, or a folder of such files
          |
          v
    OUT/adapter/ (MOKA, PEFT's format)   OUT/projectors.safetensors   OUT/MANIFEST.json

Two facts of those runs decide the configuration. The audio-visual code scales A's output before the attention
(`scale_logits`, lambda 1). The visual-text code scales B's output (lambda 0.05), and only its layer 0 was ever trained
with the attention and with A_image: in the other layers every token went through A_text, so A_image = A_text and
lambda = 0 there. Until 2025-12-28 the audio-visual code divided the logits by sqrt(number of question tokens) in place
of sqrt(r): `--logits-by-keys` for checkpoints of that time. Parameters that never took part (the Q-Formers' text branch,
rows of boundary tokens that were random at every start) are left out, each with its reason. Pickles are read with
`weights_only=True`. Cost: reading the file.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.schema import UserError
from mokamm.adapter_folder import CONFIG, TENSORS, load_pickle
from mokamm.convert import Options, Plan
from mokamm.weights import ADAPTER, PROJECTORS, differences, refuse, write_manifest

ADAPTER_FILE, OTHER_FILE = "adapter_model.bin", "non_lora_trainables.bin"
NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "scheduler.bin", "sampler.bin"}
VISUAL_LAMBDA = 0.05  # in the published visual-text code; the paper leaves it open
MODALITY = {"vl": "vision", "al": "audio"}
TEXT_BRANCH = "the Q-Former's text branch, which is never run"
UNTRAINED = "A_image of a layer where every token went through A_text, which stands in its place"
# (inner name of a published projector, ours, None), or (inner name, "", why it is left out)
PROJECTOR_KEYS: tuple[tuple[str, str, str | None], ...] = (
    (r"(?:\w+_)?ln\.(weight|bias)", r"norm.\1", None),
    (r"(?:\w+_)?query_tokens", r"queries.weight", None),
    (r"(?:\w+_)?Qformer\.bert\.embeddings\.LayerNorm\.(weight|bias)", r"query_norm.\1", None),
    (
        r"(?:\w+_)?Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.(query|key|value)\.(\w+)",
        r"encoder.layer.\1.\2.attention.\3.\4",
        None,
    ),
    (
        r"(?:\w+_)?Qformer\.bert\.encoder\.layer\.(\d+)\."
        r"((?:attention\.output|crossattention\.output|intermediate_query|output_query)\.(?:dense|LayerNorm))\.(\w+)",
        r"encoder.layer.\1.\2.\3",
        None,
    ),
    (r"(?:\w+_)?proj(?:ector)?\.(\d+)\.(weight|bias)", r"output.\1.\2", None),
    (r"(?:\w+_)?Qformer\.bert\.encoder\.layer\.\d+\.(?:intermediate|output)\..*", "", TEXT_BRANCH),
    (r"(?:\w+_)?Qformer\.bert\.embeddings\.(?:word|position|token_type)_embeddings.*", "", TEXT_BRANCH),
    (r"(?:\w+_)?Qformer\.bert\.(?:embeddings\.)?position_ids", "", TEXT_BRANCH),
    (r"(?:\w+_)?Qformer\.(?:bert\.pooler|cls)\..*", "", TEXT_BRANCH),
)
PROJECTOR = re.compile(r"(?:.*\.)?(vl|al)_projector\.(.+)")
EMBEDDINGS = re.compile(r"(?:.*\.)?(?:embed_tokens|lm_head)\.weight")
AUDIO_VISUAL = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A[012]|B0)(?:\.default)?\.weight")
VISUAL_TEXT = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A\.text|A\.image|B\.text)(?:\.default)?\.weight")
LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")
QFORMER_LAYER = re.compile(r".*Qformer\.bert\.encoder\.layer\.(\d+)\..*")


@dataclass
class Published:
    """What a published folder holds, in this project's names.

    adapter: PEFT's state dict of a MOKA adapter, empty for a stage-1 folder. moka: the keyword arguments of MokaConfig.
    projectors: `<modality>.<parameter>`. used, left_out: every key of the files, with what became of it.
    """

    kind: str
    adapter: dict[str, Tensor] = field(default_factory=dict)
    moka: dict[str, Any] = field(default_factory=dict)
    projectors: dict[str, Tensor] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def published_files(source: Path) -> list[Path]:
    """The files of such a checkpoint in a folder, or the one named: *.bin, known by their keys; empty: it is none.

    A file beside them that holds no tensors is a mistake, but for those that a Trainer leaves (NOT_WEIGHTS).
    """
    if not source.is_dir():
        return [source] if source.suffix == ".bin" and _has_our_keys(source) else []
    files = [file for file in sorted(source.glob("*.bin")) if file.name not in NOT_WEIGHTS]
    ours = [file for file in files if file.name == OTHER_FILE or _has_our_keys(file)]
    return ours and [file for file in files if file in ours or file.name == ADAPTER_FILE]


def _has_our_keys(file: Path) -> bool:
    keys = _load(file, mmap=True)
    return any(pattern.fullmatch(key) for key in keys for pattern in (AUDIO_VISUAL, VISUAL_TEXT, PROJECTOR))


def read_published(source: str | Path, logits_by_keys: bool = False) -> Published:
    """Read a published folder, or a stage 1 with projectors only (a folder or one file).

    logits_by_keys: it was trained by the audio-visual code of before 2025-12-28; nothing in the files says so.

    Raises UserError for a key that no rule knows, a projector without one of its parameters, a layer without one of its
    modules or matrices, or ranks that disagree; all at once.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    files = published_files(source)
    if not files:
        raise UserError(
            f"{source} is no published MokA checkpoint: no *.bin there has keys of its adapter or projectors"
        )
    result = Published(kind="stage 1")
    matrices: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    for file in files:
        new = _load(file)
        problems += [f"{key} is in {file.name} and in another file" for key in new if key in state]
        state |= new
    for key, tensor in state.items():
        if match := AUDIO_VISUAL.fullmatch(key) or VISUAL_TEXT.fullmatch(key):
            if match[2] == "A.image" and _layer(match[1]) != 0:
                result.left_out[key] = UNTRAINED
                continue
            matrices.setdefault(match[1], {})[match[2]] = tensor
            result.used[key] = f"{match[1]}, {match[2]}"
        elif match := PROJECTOR.fullmatch(key):
            problems += _projector_key(result, key, match[1], match[2], tensor)
        elif EMBEDDINGS.fullmatch(key):
            result.left_out[key] = "rows of media boundary tokens, drawn anew at every start there: boundaries: false"
        else:
            problems.append(f"{key} {tuple(tensor.shape)}: no rule knows this key")
    if matrices:
        problems += _adapter(result, matrices, _settings(folder), logits_by_keys)
    problems += _absent_parameters(result)
    refuse(source, problems, f"is not read: {len(problems)} mistakes")
    if not result.used:
        raise UserError(f"{source} holds no weights of MokA's: neither an adapter nor a projector")
    return result


def write_published(published: Published, out: str | Path, base: str | None = None) -> None:
    """Write OUT/adapter, OUT/projectors.safetensors and the manifest: what `training.init_from` takes.

    base: the LLM's hub id or folder, recorded in the adapter's config.
    """
    from safetensors.torch import save_file

    from mokamm.adapters import MokaConfig

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if published.adapter:
        (out / ADAPTER).mkdir(exist_ok=True)
        config = MokaConfig(task_type="CAUSAL_LM", base_model_name_or_path=base, **published.moka)
        config.save_pretrained(str(out / ADAPTER))
        adapter = {key: tensor.contiguous() for key, tensor in published.adapter.items()}
        save_file(adapter, out / ADAPTER / TENSORS, metadata={"format": "pt"})
    if published.projectors:
        projectors = {key: tensor.contiguous() for key, tensor in published.projectors.items()}
        save_file(projectors, out / PROJECTORS, metadata={"format": "pt"})
    write_manifest(out)


def _load(file: Path, mmap: bool = False) -> dict[str, Tensor]:
    content = load_pickle(file, "tensors (weights_only)", mmap=mmap and zipfile.is_zipfile(file))
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} holds no plain mapping from names to tensors")
    return content


def _settings(folder: Path) -> dict[str, Any]:
    """What its adapter_config.json says, or the published code's own values. Raises UserError where it is none."""
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text()) if path.is_file() else {}
        return {
            "lora_alpha": float(settings.get("lora_alpha", 16)),
            "lora_dropout": float(settings.get("lora_dropout", 0.05)),
            "base_model_name_or_path": settings.get("base_model_name_or_path"),
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as an adapter's configuration: {error}") from None


# ---- projectors ------------------------------------------------------------------------------------------------------


def _projector_key(result: Published, key: str, which: str, inner: str, tensor: Tensor) -> list[str]:
    for pattern, ours, reason in PROJECTOR_KEYS:
        match = re.fullmatch(pattern, inner)
        if match and reason:
            result.left_out[key] = reason
            return []
        if match:
            name = f"{MODALITY[which]}.{match.expand(ours)}"
            if name in result.projectors:
                return [f"{key}: its place, {name}, is taken by another key"]
            result.projectors[name] = tensor[0] if inner.endswith("query_tokens") and tensor.dim() == 3 else tensor
            result.used[key] = name
            return []
    return [f"{key} {tuple(tensor.shape)}: no rule knows this part of a projector"]


def _absent_parameters(result: Published) -> list[str]:
    """What a projector lacks of this project's Q-Former of as many layers, which is what will load it."""
    from mokamm.projectors.qformer import QFormerProjector

    problems = []
    for which, modality in MODALITY.items():
        found: dict[str, tuple[int, ...]] = {key: () for key in result.projectors if key.startswith(f"{modality}.")}
        if not found:
            continue
        keys = [key for key in (*result.used, *result.left_out) if (m := PROJECTOR.fullmatch(key)) and m[1] == which]
        last = max((int(match[1]) for key in keys if (match := QFORMER_LAYER.fullmatch(key))), default=0)
        with torch.device("meta"):
            whole = QFormerProjector(1, 1, False, tokens=1, hidden=1, heads=1, layers=last + 1)
        problems += differences({f"{modality}.{name}": () for name in whole.state_dict()}, found)
    return problems


# ---- adapter ---------------------------------------------------------------------------------------------------------


def _adapter(
    result: Published, matrices: dict[str, dict[str, Tensor]], settings: dict[str, Any], by_keys: bool
) -> list[str]:
    """Stack the A's of every module; fills `adapter` and `moka`, returns what is wrong."""
    names = {name for found in matrices.values() for name in found}
    visual = any("." in name for name in names)
    if visual and any("." not in name for name in names):
        return ["the adapter mixes the namings of the audio-visual and of the visual-text code"]
    result.kind = "visual-text" if visual else "audio-visual"
    problems = [f"missing: {module}, which other layers have" for module in _absent_modules(matrices)]
    for module, found in matrices.items():
        needed = dict.fromkeys(_needed(module, visual))
        problems += [f"{module}: lora_{name} is missing" for name in needed if name not in found]
        inputs = {tensor.shape[1:] for name, tensor in found.items() if name[0] == "A"}
        if len(inputs) > 1 or any(tensor.dim() != 2 for tensor in found.values()):
            shapes = ", ".join(f"lora_{name} {tuple(tensor.shape)}" for name, tensor in found.items())
            problems.append(f"{module}: its matrices do not fit each other: {shapes}")
    if problems:
        return problems
    ranks = {tensor.shape[0] for found in matrices.values() for name, tensor in found.items() if name[0] == "A"}
    ranks |= {tensor.shape[1] for found in matrices.values() for name, tensor in found.items() if name[0] == "B"}
    if len(ranks) > 1:
        return [f"the ranks differ: {', '.join(map(str, sorted(ranks)))}; this layer has one rank for all modalities"]
    for module, found in matrices.items():
        *A, B = (found[name] for name in _needed(module, visual))
        result.adapter[f"base_model.model.{module}.moka_A.weight"] = torch.cat(A)
        result.adapter[f"base_model.model.{module}.moka_B.weight"] = B
    result.moka = {
        "r": ranks.pop(),
        "lora_alpha": settings["lora_alpha"],
        "lora_dropout": settings["lora_dropout"],
        "modalities": ["text", "vision"] if visual else ["text", "vision", "audio"],
        "target_modules": sorted({module.rpartition(".")[2] for module in matrices}),
        "scale_logits": not visual,
        "logits_by_keys": by_keys,
        "attention_weight": 0.0 if visual else 1.0,
        "attention_weight_pattern": {r"layers\.0\..*": VISUAL_LAMBDA} if visual else {},
    }
    return []


def _needed(module: str, visual: bool) -> tuple[str, ...]:
    """The published names of a layer's A's, in the order of its modalities, and of its B."""
    if visual:
        return ("A.text", "A.image" if _layer(module) == 0 else "A.text", "B.text")
    return ("A0", "A1", "A2", "B0")


def _absent_modules(modules: Collection[str]) -> list[str]:
    """The published runs adapt the same modules in every layer, from the first to the last."""
    layers = [match for module in modules if (match := LAYER.match(module))]
    places = sorted({(m.string[: m.start(1)], m.string[m.end(1) :]) for m in layers})
    last: dict[str, int] = {}
    for match in layers:
        before = match.string[: match.start(1)]
        last[before] = max(int(match[1]), last.get(before, 0))
    expected = (f"{before}{layer}{after}" for before, after in places for layer in range(last[before] + 1))
    return [module for module in expected if module not in modules]


def _layer(module: str) -> int | None:
    match = LAYER.match(module)
    return int(match[1]) if match else None


# ---- mokamm convert --------------------------------------------------------------------------------------------------


def plan_published(source: Path, options: Options) -> Plan | None:
    """An importer of mokamm/convert.py; None for another kind of folder."""
    if not published_files(source):
        return None
    options.refuse_other("moka", source, "a checkpoint of MokA")
    folder = source if source.is_dir() else source.parent
    published, base = read_published(source, options.logits_by_keys), _settings(folder)["base_model_name_or_path"]
    return Plan(
        "\n  ".join(account(published)), "moka", lambda out: write_published(published, out, base), left_out(published)
    )


def account(published: Published) -> list[str]:
    """What was found, for people."""
    lines = [
        f"{published.kind} checkpoint of MokA: {len(published.used)} keys used, {len(published.left_out)} left out"
    ]
    if published.moka:
        lines.append("adapter: " + ", ".join(f"{key} {value}" for key, value in published.moka.items() if value != {}))
    for modality in sorted({key.partition(".")[0] for key in published.projectors}):
        count = sum(t.numel() for key, t in published.projectors.items() if key.startswith(modality + "."))
        lines.append(f"projector of {modality}: {count:,} parameters; it has no boundaries: set boundaries: false")
    return lines


def left_out(published: Published) -> list[str]:
    """One line for each reason, with how many keys it holds for."""
    grouped: dict[str, list[str]] = {}
    for key, reason in published.left_out.items():
        grouped.setdefault(reason, []).append(key)
    return [f"left out: {len(keys)} keys, such as {keys[0]}: {reason}" for reason, keys in grouped.items()]
