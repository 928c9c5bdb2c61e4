"""What the feature cache saves, and what it takes:  python eval/speed/cache.py [CONFIG] [--limit 100] [--json]

The first rows of a configuration's training sources are laid out and their media encoded, as the training does before
the LLM: without a cache, with an empty one, and with a full one. Overrides as for training; the LLM is not loaded.

    seconds      of each pass, decoding and encoding in this process (a training spreads the decoding over workers)
    predicted    the cache's bytes as `mokamm data check` tells them before anything is encoded
    true         the bytes of its files

The result is also written to eval/speed/results/cache.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from eval.speed.reporting import RESULTS, keep, surroundings
from mokamm.config import RunConfig, find_path, load_config
from mokamm.quiet import stdout_kept_clean

BATCH = 8


def one_pass(parts: Sequence[Any], limit: int, perception: Any) -> tuple[float, int]:
    """Seconds, and rows."""
    from data.collate import collate

    rows = [(part, row) for part in parts for row in range(min(limit, len(part.rows)))]
    began = time.perf_counter()
    for first in range(0, len(rows), BATCH):
        examples = [part.process(part.rows[row]) for part, row in rows[first : first + BATCH]]
        perception.fill(collate(examples, 0))
    return time.perf_counter() - began, len(rows)


def predicted(parts: Sequence[Any], encoders: Any, limit: int) -> int:
    from mokamm.datacheck.walk import Walk

    walk = Walk(parts, encoders)
    rows = [index for index in range(len(walk)) if walk._row[index] < limit]
    found = [walk[index] for index in rows]
    return sum({item.name: item.feature_bytes for finding in found for item in finding.items}.values())


def measure(config: RunConfig, limit: int) -> dict[str, float]:
    from encoders.cache import FeatureCache
    from mokamm.build import build_processor
    from mokamm.perception import Perception
    from mokamm.training.corpus import open_parts

    processor, encoders = build_processor(config)
    config.data.cache = None
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(folder, 100.0)
        result: dict[str, float] = {}
        for name, used in (("none", None), ("empty", cache), ("full", cache)):
            perception = Perception(encoders, used)
            processor.lookup = perception.lookup
            parts = open_parts(config, processor, "train")
            seconds, result["rows"] = one_pass(parts, limit, perception)
            result[f"seconds_{name}"] = round(seconds, 2)
        processor.lookup = None
        parts = open_parts(config, processor, "train")
        result["predicted_bytes"], result["true_bytes"] = predicted(parts, encoders, limit), cache.total_bytes()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--limit", type=int, default=100, help="rows of each source")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with stdout_kept_clean(args.json):
        config = load_config(find_path(args.config), args.overrides)
        result = {**surroundings("cache.py", args), **measure(config, args.limit)}
    if keep(result, RESULTS / "cache.json", args.json):
        return
    print(
        f"{result['rows']} rows: {result['seconds_none']} s without a cache, {result['seconds_empty']} s filling one, "
        f"{result['seconds_full']} s from it; {result['predicted_bytes']:,} bytes predicted, {result['true_bytes']:,} true"
    )


if __name__ == "__main__":
    main()
