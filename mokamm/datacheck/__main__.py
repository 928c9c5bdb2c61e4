"""Walk a configuration's data without training:  mokamm data check CONFIG [--limit N] [dotted.key=value ...]

Prints counts by source and modality, exact token lengths, missing and broken media, rows that are too long, and what to
do; writes check.json, lengths.png and bad_samples.jsonl. No weights are loaded, only the tokenizer and the encoders' shapes.
Exit codes: 0; 1 where so many rows are bad that a training would stop; 2 for a mistake in the configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mokamm.arguments import add_config_arguments, at_least_one
from mokamm.config import ConfigError, RunConfig, load_config
from mokamm.mistakes import tell

if TYPE_CHECKING:
    from mokamm.datacheck.summary import Summary


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mokamm data check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--limit", type=at_least_one, help="so many rows of each source, evenly spread (default: all)")
    parser.add_argument("--workers", type=int, help="processes that decode (default: training.dataloader_num_workers)")
    parser.add_argument("--out", type=Path, help="folder of the files (default: training.output_dir + '-data')")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        config = load_config(args.config, args.overrides)
        _check_files(config)
        out = args.out or Path(f"{config.training.output_dir.rstrip('/')}-data")
        with contextlib.redirect_stdout(sys.stderr):  # whatever libraries print
            result = check(config, out, args.limit, args.workers)
    except Exception as error:
        sys.exit(tell(error))
    print(json.dumps(result) if args.json else table(result, out))
    sys.exit(1 if result["would_stop"] else 0)


def check(config: RunConfig, out: Path, limit: int | None = None, workers: int | None = None) -> dict[str, Any]:
    """Walk all sources, write the three files into `out`, and return the numbers. Raises UserError."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked
    from data.dataset import lost_workers_told
    from data.ledger import Ledger
    from mokamm.build import build_processor
    from mokamm.datacheck.picture import draw
    from mokamm.datacheck.summary import Summary
    from mokamm.datacheck.walk import UNBOUNDED, Walk, findings
    from mokamm.training.corpus import open_parts

    processor, encoders = build_processor(config, weights=False)
    processor.max_length = UNBOUNDED
    parts = open_parts(config, processor, "train") + open_parts(config, processor, "validation")
    walk, summary = Walk(parts, encoders, limit), Summary(config, parts)
    out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(out / "bad_samples.jsonl", 1.0, len(walk))
    ledger.path.unlink(missing_ok=True)
    workers = config.training.dataloader_num_workers if workers is None else workers
    with lost_workers_told():
        for found in _with_bar(findings(walk, workers), len(walk), summary):
            if why := summary.add(found):
                ledger.add(parts[found.part].name, found.row, found.id, why)
    result = summary.result()
    (out / "check.json").write_text(json.dumps(result, indent=1))
    draw(summary.sources, config.data.max_length, out / "lengths.png")
    return result


def table(result: dict[str, Any], out: Path) -> str:
    """The result for people."""
    from mokamm.datacheck.summary import TROUBLES

    lines = [f"{'source':28} {'rows':>9} {'checked':>9} {'usable':>9} {'weight':>7}   tokens p50   p99   max   media"]
    for name, source in result["sources"].items():
        tokens = source["tokens"] or {"p50": 0, "p99": 0, "max": 0}
        media = ", ".join(f"{n['items']} {modality} ({n['tokens']} tokens)" for modality, n in source["media"].items())
        text = f"{source['text_only']} rows of text alone" if source["text_only"] else ""
        lines.append(
            f"{name:28} {source['rows']:9} {source['checked']:9} {source['usable']:9} {source['weight']:7g}   "
            f"{tokens['p50']:10} {tokens['p99']:5} {tokens['max']:5}   {'; '.join(filter(None, [media, text]))}"
        )
    lines.append("")
    for name, count in result["troubles"].items():
        if count:
            lines += [f"{count} {TROUBLES[name]}", *(f"    {example}" for example in result["examples"][name])]
    if result["padding"]:
        shares = [f"{share:.0%} {name}" for name, share in result["padding"].items()]
        lines.append(f"padding in a batch: {', '.join(shares)}")
    if result["cache_gb"]:
        sizes = ", ".join(f"{gb:.3g} GB {name}" for name, gb in result["cache_gb"].items())
        lines.append(f"features of the media checked, were they cached: {sizes}")
    lines += ["", "what to do:", *(f"  - {line}" for line in result["advice"])]
    return "\n".join([*lines, "", f"written: {out}/lengths.png, check.json, bad_samples.jsonl (where there are any)"])


def _with_bar(found: Iterator[Any], total: int, summary: Summary) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(found, total=total, unit="row", file=sys.stderr, disable=None) as bar:
        for finding in bar:
            yield finding
            bad = sum(source.checked - source.usable() for source in summary.sources)
            bar.set_postfix_str(f"{bad} cannot be used" if bad else "", refresh=False)


def _check_files(config: RunConfig) -> None:
    try:
        config.check_files(world_is_made=True)
    except ConfigError as error:
        if not config.data.world:
            raise
        world = config.data.world
        commands = [
            f"  mokamm data make --out {world.dir} --split {split} --num {getattr(world, split)} --seed {world.seed}"
            for split in ("train", "validation", "test")
        ]
        raise ConfigError(
            "\n".join([f"{error}", "training makes the miniature world; to make it now:", *commands])
        ) from None


if __name__ == "__main__":
    main()
