"""Is everything there that a configuration needs?  mokamm doctor CONFIG [dotted.key=value ...] [--shapes] [--json]

    config --> findings   weights, data, packages, GPU: there or not, where it was looked for, the command that fetches it
           --> shapes     the model on the meta device: parameters by part, tokens of a sample, memory by ZeRO stage

Nothing is trained, downloaded or written, and no medium is opened. --shapes leaves the findings out: a recipe is
checked where nothing of what it names is at hand. Exit codes: 0 all there; 1 something is missing, the shapes cannot be
had, or a sample's media do not fit into data.max_length; 2 a mistake in the configuration. Cost: seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.schema import UserError
from data.sources import SOURCES
from mokamm.arguments import above_zero, add_config_arguments, at_least_one
from mokamm.config import RunConfig, find_path, is_found, load_config
from mokamm.config_sections import BenchmarkConfig, SourceConfig
from mokamm.mistakes import is_users, tell
from mokamm.quiet import quiet

if TYPE_CHECKING:
    from mokamm.outline import Outline
    from mokamm.training.forecast import Forecast

BEATS = (
    "get BEATs_iter3_plus_AS2M.pt from github.com/microsoft/unilm/tree/master/beats, then: "
    "mokamm convert BEATs_iter3_plus_AS2M.pt {path}"
)
# data source or benchmark -> where its files come from
HOMES = {
    "music_avqa": "questions and videos: gewu-lab.github.io/MUSIC-AVQA",
    "ave": "lists and videos: github.com/YapengTian/AVE-ECCV18",
    "llava": "hf download liuhaotian/LLaVA-Pretrain --repo-type dataset (or LLaVA-Instruct-150K, LanguageBind/Video-LLaVA)",
    "audiocaps": "csv files: github.com/cdjkim/audiocaps; the sounds are YouTube's",
    "librispeech": "fetch {name}.tar.gz, OpenSLR's resource SLR12, then: tar xzf {name}.tar.gz -C {media_dir}/..",
}
OWN = "your own rows: README, Your own data"
# what a model's folder needs: one of each of these files, the first that is there
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MODEL = (("config.json",), WEIGHTS)
ENCODER = (*MODEL, ("preprocessor_config.json", "processor_config.json"))
TOKENIZER = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")
OPEN_CLIP = (("open_clip_config.json",), ("*.safetensors", "*.bin", "*.pth"))


class Finding(NamedTuple):
    """One thing that the run needs. where: looked for; fix: the command or page that fetches it, where it is not whole.

    damage: what is wrong with a file that lies there; lacks: which files of a folder do not. `there` is False then, too.
    """

    part: str
    what: str
    there: bool
    where: str
    fix: str = ""
    damage: str = ""
    lacks: str = ""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mokamm doctor", description="What a configuration needs and whether it is there; its true shapes."
    )
    add_config_arguments(parser)
    parser.add_argument("--shapes", action="store_true", help="the dry run alone, without looking for files")
    parser.add_argument(
        "--ranks", type=at_least_one, default=8, metavar="N", help="processes of the run (8, the paper's batch)"
    )
    parser.add_argument(
        "--gpu-gb", type=above_zero, metavar="GB", help="of a GPU that the run will have (this machine's, else 80)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_intermixed_args(argv)


# ---- what is there ---------------------------------------------------------------------------------------------------


def findings(config: RunConfig) -> list[Finding]:
    """All that the run needs, in the order in which one would get it."""
    found = [*_packages(config), *_weights(config), *_beginning(config), *_data(config), *_machine(config)]
    return list({(finding.part, finding.where, finding.what): finding for finding in found}.values())


def _packages(config: RunConfig) -> Iterator[Finding]:
    wanted = {
        "deepspeed": (config.training.deepspeed is not None, "uv sync"),
        "datasets": (
            any(entry.source == "hf" for entry in [*config.data.train, *config.data.validation]),
            "uv sync --extra datasets",
        ),
        "flash_attn": (
            config.model.llm.attention == "flash_attention_2",
            "uv pip install flash-attn, or attention: sdpa",
        ),
        "bitsandbytes": (config.model.llm.quantization is not None, "uv sync --extra quantization"),
        "wandb": ("wandb" in config.training.report_to, "uv sync --extra wandb"),
        "tensorboard": ("tensorboard" in config.training.report_to, "uv sync"),
    }
    for name, (needed, fix) in wanted.items():
        if needed:
            yield Finding("package", name, importlib.util.find_spec(name) is not None, sys.prefix, fix)


def _weights(config: RunConfig) -> Iterator[Finding]:
    llm = config.model.llm
    yield _hub_or_folder("LLM", llm.path, llm.revision, (*MODEL, TOKENIZER))
    for name, modality in config.model.modalities.items():
        encoder, part = modality.encoder, f"{name} encoder"
        if encoder.name == "open_clip" and encoder.options.get("pretrained") and not find_path(encoder.path).exists():
            yield Finding(
                part, encoder.path, True, "open_clip's own cache, not looked into: it fetches what is missing"
            )
            continue
        if encoder.name == "beats":
            yield _file(part, encoder.path, BEATS.format(path=encoder.path))
            continue
        needed = OPEN_CLIP if encoder.name == "open_clip" else ENCODER
        yield _hub_or_folder(part, encoder.path.removeprefix("hf-hub:"), None, needed)


def _file(part: str, path: str, fix: str) -> Finding:
    place = find_path(path)
    damage = _damage(place) if place.is_file() else ""
    return Finding(part, path, place.is_file() and not damage, str(place.absolute()), fix, damage)


def _hub_or_folder(part: str, path: str, revision: str | None, needed: tuple[tuple[str, ...], ...]) -> Finding:
    """A model's folder, here or in the hub's cache, that must hold a file of each of `needed`."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    local = place = find_path(path)
    where, fix = str(local), "fetch or copy it again"
    if not local.exists():
        try:
            cached = try_to_load_from_cache(path, needed[0][0], revision=revision)
        except HFValidationError:  # a file name, not a hub id
            return Finding(part, path, False, str(local.absolute()), "put the file there, or correct its path")
        where = f"{local.absolute()}, {constants.HF_HUB_CACHE}"
        fix = f"hf download {path}" + (f" --revision {revision}" if revision else "")
        if not isinstance(cached, str):
            return Finding(part, path, False, where, fix)
        place = Path(cached).parent
    damage, lacks = _damage(place), _lacks(place, needed)
    return Finding(part, path, not damage and not lacks, where, fix, damage, lacks)


def _lacks(folder: Path, needed: tuple[tuple[str, ...], ...]) -> str:
    """Which files a folder lacks; of weights in shards, those that the index names."""
    absent = []
    for names in needed:
        found = next((file for name in names for file in sorted(folder.glob(name)) if file.is_file()), None)
        if found is None:
            absent.append(" or ".join(names))
        elif found.name.endswith(".index.json"):
            absent += _absent_shards(found)
    return f"{folder} lacks {'; '.join(absent)}" if absent else ""


def _absent_shards(index: Path) -> list[str]:
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"a readable {index.name}"]
    return sorted(shard for shard in shards if not (index.parent / shard).is_file())


def _damage(path: Path) -> str:
    """Which safetensors files of a folder (or the file itself) have no readable header, or are shorter than it says."""
    from safetensors import SafetensorError, safe_open

    found = []
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        try:
            if file.suffix == ".safetensors":
                safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            found.append(f"{file} is damaged: {error}")
    return "; ".join(found)


def _beginning(config: RunConfig) -> Iterator[Finding]:
    for what, path in (("mask", config.adapter.mask), ("adapter", config.adapter.init_from)):
        if path is not None:
            yield Finding(what, path, find_path(path).exists(), str(find_path(path).absolute()), "correct its path")
    for folder in config.training.init_folders:
        place = find_path(folder)
        there = (place / "final" / "projectors.safetensors").is_file() or (place / "projectors.safetensors").is_file()
        yield Finding("stage 1", folder, there, str(place.absolute()), "run the recipe with this output_dir first")


def _data(config: RunConfig) -> Iterator[Finding]:
    entries: list[tuple[str, SourceConfig | BenchmarkConfig]] = [("training data", e) for e in config.data.train]
    entries += [("validation data", e) for e in config.data.validation]
    entries += [("benchmark", e) for e in config.evaluation.benchmarks]
    for part, entry in entries:
        path, media_dir = config.locate(entry)
        kind = entry.source if isinstance(entry, SourceConfig) else entry.benchmark
        fix = HOMES.get(kind, OWN).format(name=path.name, media_dir=media_dir)
        made = config.makes(path)
        yield Finding(part, f"{kind}: {path}", made or is_found(entry, path), str(path.absolute()), fix)
        on_hub = isinstance(entry, SourceConfig) and SOURCES[kind].hub and not path.exists()
        if not media_dir.is_dir() and not made and not on_hub:
            yield Finding("media folder", str(media_dir), False, str(media_dir.absolute()), fix)


def _machine(config: RunConfig) -> Iterator[Finding]:
    import torch

    if config.training.use_cpu:
        return
    gpus = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(gpus)) or "none"
    needed = config.training.bf16 and config.model.llm.dtype != "float32"
    if needed or gpus:
        yield Finding(
            "GPU", names, gpus > 0, "torch.cuda", "run where a GPU is, or set training.use_cpu=true and patience"
        )


# ---- the dry run -----------------------------------------------------------------------------------------------------


def dry_run(config: RunConfig, ranks: int, gpu_gb: float | None) -> dict[str, Any]:
    """Parameters by part, tokens of a sample, bytes by ZeRO stage with and without offload; `problems`: what cannot be.

    gpu_gb: None for this machine's GPU; where there is none, 80 are assumed, and a lack of memory is no problem yet.
    """
    import torch

    from mokamm.outline import build_outline
    from mokamm.training.forecast import Forecast, size
    from mokamm.training.launch import Ranks

    quiet(errors_alone=True)
    outline = build_outline(config, offline=True)
    device = torch.device("cpu" if config.training.use_cpu else "cuda")
    known = gpu_gb is not None or torch.cuda.is_available()
    if gpu_gb is None:
        gpu_gb = torch.cuda.get_device_properties(0).total_memory / 2**30 if known else 80.0
    forecast = Forecast.of(outline, config, Ranks(0, 0, ranks, device, grouped=False), gpu_gb * 2**30)
    tokens = _tokens(outline, config)
    memory = _memory(forecast)
    problems = [outline.no_rows] if outline.tokenizer and outline.no_rows else []
    problems += _cannot_begin(outline, config)
    if tokens["media"] >= config.data.max_length:
        problems.append(
            f"data.max_length is {config.data.max_length}, and the media of one sample take {tokens['media']} tokens: no "
            "row fits; raise it, or use fewer segments or projector tokens"
        )
    gpu_bytes, building = gpu_gb * 2**30, forecast.building()
    if forecast.network and known and device.type == "cuda" and (total := forecast.memory().total) > gpu_bytes:
        fitting = [name for name, found in memory.items() if found["total"] <= gpu_bytes]
        problems.append(
            f"as configured, each of {ranks} processes is predicted to take {size(total)} of a GPU of {size(gpu_bytes)}; "
            + (f"{', '.join(fitting)} would fit" if fitting else "no ZeRO stage would fit: see mokamm advise")
        )
    return {
        "parameters": _parameters(outline),
        "not_counted": outline.left_out,
        "tokens": tokens,
        "memory": memory,
        "memory_unknown": forecast.unknown,
        "gpu_bytes": gpu_bytes,
        "building": building,
        "ranks": ranks,
        "problems": problems,
    }


def _cannot_begin(outline: Any, config: RunConfig) -> list[str]:
    """Why the run would refuse the weights that it is to begin from, where they and all shapes are here."""
    from mokamm.init_from import load_init

    folders = config.training.init_folders
    if not folders or outline.left_out or not all(find_path(folder).is_dir() for folder in folders):
        return []
    try:
        with warnings.catch_warnings(action="ignore"):  # of what has no values and is given some
            load_init(outline, folders)
    except UserError as error:
        return [str(error)]
    return []


def _memory(forecast: Forecast) -> dict[str, dict[str, float]]:
    """Bytes by ZeRO stage, with and without offload; empty where nothing is predicted."""
    memory = {}
    for stage in forecast.zero_stages() if forecast.network else ():
        for offload in (False, True):
            changes = {"stage": stage, "offload_optimizer": offload, "offload_parameters": offload and stage == 3}
            found = forecast.memory(**changes)
            memory[f"zero{stage}{'_offload' if offload else ''}"] = {**asdict(found), "total": found.total}
    return memory


def _parameters(outline: Outline) -> dict[str, dict[str, int]]:
    """Elements of each part, and how many of them train."""
    from mokamm.adapters.peft_bridge import adapter_parameters

    found: dict[str, dict[str, int]] = {}

    def add(part: str, parameter: Any) -> None:
        counts = found.setdefault(part, {"all": 0, "trained": 0})
        counts["all"] += parameter.numel()
        counts["trained"] += parameter.numel() if parameter.requires_grad else 0

    own = {id(parameter) for parameter in adapter_parameters(outline.llm)}
    for parameter in outline.llm.parameters():
        add("adapter" if id(parameter) in own else "llm", parameter)
    for name, projector in outline.projectors.items():
        for parameter in projector.parameters():
            add(f"{name} projector", parameter)
    for name, encoder in outline.perception.encoders.items():
        for parameter in encoder.parameters():
            add(f"{name} encoder", parameter)
    return found


def _tokens(outline: Outline, config: RunConfig) -> dict[str, Any]:
    """Media tokens of one sample that has one full item of every modality."""
    each = {name: sense.most_tokens("") + 2 * sense.boundaries for name, sense in outline.senses.items()}
    total = sum(each.values())
    return {"each": each, "media": total, "max_length": config.data.max_length, "text": config.data.max_length - total}


# ---- the command -----------------------------------------------------------------------------------------------------


def show(config: RunConfig, path: str, found: list[Finding], shapes: dict[str, Any]) -> None:
    from mokamm.training.forecast import size

    for finding in found:
        state = "ok     " if finding.there else "DAMAGED" if finding.damage else "MISSING"
        print(f"{state} {finding.part}: {finding.what}")
        if not finding.there:
            said = "; ".join(filter(None, [finding.damage, finding.lacks])) or f"looked at {finding.where}"
            print(f"        {said}\n        {finding.fix}")
    if found:
        print()
    for problem in shapes["problems"]:
        print(f"problem: {problem}")
    if not shapes["parameters"]:
        return
    method = "stage 1" if config.training.stage == 1 else config.method
    print(f"{path}: {method} on {config.model.llm.path}, shapes alone")
    for part, counts in shapes["parameters"].items():
        trained = f", {counts['trained']:,} trained" if counts["trained"] else ""
        print(f"  {part:20} {counts['all']:>14,}{trained}")
    tokens = shapes["tokens"]
    each = ", ".join(f"{name} {count}" for name, count in tokens["each"].items()) or "none"
    print(f"  media tokens of a sample: {each}; {tokens['text']} of {tokens['max_length']} are left for text")
    rows = config.training.per_device_train_batch_size
    if shapes["memory_unknown"]:
        print(f"  {shapes['memory_unknown']}")
    else:
        print(
            f"  predicted memory of each of {shapes['ranks']} processes ({rows} rows of {tokens['max_length']} tokens):"
        )
    for name, memory in shapes["memory"].items():
        fits = "" if memory["total"] <= shapes["gpu_bytes"] else f"  more than the GPU's {size(shapes['gpu_bytes'])}"
        host = f", and {size(memory['host'])} of the computer's" if memory["host"] else ""
        print(f"    {name:15} {size(memory['total']):>8}{host}{fits}")
    before = f"{'before ZeRO-3':15} {size(shapes['building']):>8}"
    print(f"    {before} of the computer's memory, for each process, until the weights are sharded")
    for name, why in shapes["not_counted"].items():
        print(f"  not counted: {name}: {why}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        config = load_config(args.config, args.overrides)
        found = [] if args.shapes else findings(config)
    except Exception as error:
        sys.exit(tell(error))
    try:
        shapes = dry_run(config, args.ranks, args.gpu_gb)
    except Exception as error:
        if not is_users(error):
            raise
        shapes = {"parameters": {}, "problems": [str(error)]}
    if args.json:
        print(json.dumps({"config": args.config, "findings": [f._asdict() for f in found], **shapes}))
    else:
        show(config, args.config, found, shapes)
    sys.exit(1 if shapes["problems"] or any(not finding.there for finding in found) else 0)


if __name__ == "__main__":
    main()
