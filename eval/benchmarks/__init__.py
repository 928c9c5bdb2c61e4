"""All benchmarks by name. To add one: a file with a subclass of `Benchmark`, and a line here."""

from __future__ import annotations

from data.schema import UserError, nearest
from eval.benchmarks.base import Benchmark, Row
from eval.benchmarks.miniworld_avqa import MiniworldAvqa
from eval.benchmarks.miniworld_events import MiniworldEvents
from eval.benchmarks.miniworld_images import MiniworldImages
from eval.benchmarks.miniworld_spoken import MiniworldSpoken
from eval.benchmarks.miniworld_told import MiniworldTold
from eval.benchmarks.miniworld_transcription import MiniworldTranscription

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        MiniworldAvqa(),
        MiniworldEvents(),
        MiniworldSpoken(),
        MiniworldTranscription(),
        MiniworldImages(),
        MiniworldTold(),
    )
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name; UserError with the nearest known one."""
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark '{name}'{nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]


__all__ = ["BENCHMARKS", "Benchmark", "Row", "find_benchmark"]
