"""All benchmarks by name. To add one: a file with a subclass of `Benchmark`, and a line here."""

from __future__ import annotations

import re

from data.schema import UserError, nearest
from eval.benchmarks.air_bench import AirBench
from eval.benchmarks.audiocaps import AudioCaps
from eval.benchmarks.ave import Ave
from eval.benchmarks.base import Benchmark, Row
from eval.benchmarks.librispeech import LibriSpeech
from eval.benchmarks.miniworld_avqa import MiniworldAvqa
from eval.benchmarks.miniworld_events import MiniworldEvents
from eval.benchmarks.miniworld_images import MiniworldImages
from eval.benchmarks.miniworld_spoken import MiniworldSpoken
from eval.benchmarks.miniworld_told import MiniworldTold
from eval.benchmarks.miniworld_transcription import MiniworldTranscription
from eval.benchmarks.mmau import Mmau
from eval.benchmarks.mmbench import MmBench
from eval.benchmarks.mme import Mme
from eval.benchmarks.multiple_choice import MultipleChoice
from eval.benchmarks.music_avqa import MusicAvqa
from eval.benchmarks.pope import Pope
from eval.benchmarks.seed_bench import SeedBench
from eval.benchmarks.transcription import Asr
from eval.benchmarks.yes_no import YesNo

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        MiniworldAvqa(),
        MiniworldEvents(),
        MiniworldSpoken(),
        MiniworldTranscription(),
        MiniworldImages(),
        MiniworldTold(),
        Ave(),
        MusicAvqa(),
        Mme(),
        MmBench(),
        Pope(),
        SeedBench(),
        Mmau(),
        AirBench(),
        LibriSpeech(),
        Asr(),
        AudioCaps(),
        MultipleChoice(),
        YesNo(),
    )
}
# what people also call them, without what is no letter or digit
OTHER_NAMES = {
    "seed": "seed_bench",
    "seedimage": "seed_bench",
    "seedbenchimage": "seed_bench",
    "avqa": "music_avqa",
    "mmaumini": "mmau",
    "airbenchfoundation": "air_bench",
    "airbenchspeech": "air_bench",
    "captions": "audiocaps",
    "mcq": "multiple_choice",
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name (MUSIC-AVQA and SEED-Bench are music_avqa and seed_bench); UserError with the nearest."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    known = {re.sub(r"[^a-z0-9]", "", own): own for own in BENCHMARKS} | OTHER_NAMES
    if plain not in known:
        raise UserError(f"there is no benchmark '{name}'{nearest(name, BENCHMARKS)}")
    return BENCHMARKS[known[plain]]


__all__ = ["BENCHMARKS", "Benchmark", "Row", "find_benchmark"]
