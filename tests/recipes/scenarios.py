"""The paper's three scenarios as lists of recipes, and what must lie where before they are started.

    prepare(scenario, world, FOLDER)   checkpoints and data sets under the names that the recipes use
    RECIPES order: every stage 1 before the stage 2 that begins from it

In FOLDER the recipes' own paths lead to small files, so that only sizes are overridden (`sizes`); SigLIP, which no recipe
names, stands in the place of CLIP in the visual scenario.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mokamm.convert import main as convert
from tests.recipes import checkpoints, layouts

ROOT = Path(__file__).resolve().parents[2]
QFORMER = {"tokens": 8, "hidden": 96, "heads": 4}


@dataclass(frozen=True)
class Recipe:
    """name: below configs/, without .yaml. modalities: whose projector has a size to override, and its options."""

    name: str
    steps: int
    projectors: dict[str, dict[str, int]] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return ROOT / "configs" / f"{self.name}.yaml"


@dataclass(frozen=True)
class Scenario:
    """benchmark: (name, path, media folder) where the recipe of stage 2 names none. question: of infer.py."""

    llm: str
    encoders: tuple[Callable[[Path], None], ...]
    lay_out: Callable[[Path, Path], None]
    recipes: tuple[Recipe, ...]
    question: tuple[str, ...]
    benchmark: tuple[str, str, str] | None = None


def _both(**options: int) -> dict[str, dict[str, int]]:
    return {"vision": options, "audio": options}


SIGLIP = (
    "model.modalities.vision.encoder.name=siglip2",
    f"model.modalities.vision.encoder.path={checkpoints.SIGLIP}",
)
SCENARIOS = {
    "av_text": Scenario(
        llm=checkpoints.LLAMA3,
        encoders=(checkpoints.write_clip, checkpoints.write_beats),
        lay_out=layouts.lay_out_av,
        recipes=(
            Recipe("av_text/llama3_8b/stage1_visual", 200, {"vision": QFORMER}),
            Recipe("av_text/llama3_8b/stage1_audio", 150, {"audio": QFORMER}),
            Recipe("av_text/llama3_8b/music_avqa", 200, _both(**QFORMER)),
            Recipe("av_text/llama3_8b/ave", 100, _both(**QFORMER)),
        ),
        question=(
            "--video", "datasets/music_avqa/videos/test00000000.mp4",
            "--audio", "datasets/music_avqa/videos/test00000000.mp4", "How many shapes appear in the video?",
        ),
    ),
    "visual_text": Scenario(
        llm=checkpoints.QWEN3,
        encoders=(checkpoints.write_siglip,),
        lay_out=layouts.lay_out_visual,
        recipes=(
            Recipe("visual_text/qwen3_8b/stage1", 200, {"vision": QFORMER}, SIGLIP),
            Recipe("visual_text/qwen3_8b/llava_instruct", 200, {"vision": QFORMER}, SIGLIP),
        ),
        question=(
            "--image", "datasets/coco/val2014/COCO_val2014_000000000000.jpg", "Is there a red circle in the image?",
        ),
        benchmark=("pope", "datasets/pope/coco_pope_random.json", "datasets/coco/val2014"),
    ),
    "speech_text": Scenario(
        llm=checkpoints.QWEN2,
        encoders=(checkpoints.write_whisper,),
        lay_out=layouts.lay_out_speech,
        recipes=(
            Recipe("speech_text/qwen2_7b/stage1_asr", 200, {"speech": {"hidden": 192}}),
            Recipe("speech_text/qwen2_7b/instructions", 200, {"speech": {"hidden": 192}}),
        ),
        question=(
            "--speech", "datasets/LibriSpeech/test-clean/300/7/300-7-0000.flac", "Write down what is said.",
        ),
    ),
}  # fmt: skip


def prepare(scenario: Scenario, world: Path, folder: Path) -> None:
    """Checkpoints and data of a scenario in FOLDER; the LLM is random. BEATs' published form is converted, as told."""
    for write in scenario.encoders:
        write(folder)
    published = folder / f"{checkpoints.BEATS}.pt"
    if published.exists():
        assert convert([str(published), str(published.with_suffix(".safetensors"))]) == 0
    texts = [f"{asked} {answered}" for asked, answered in layouts.text_rows(world / "train")]
    checkpoints.write_llm(scenario.llm, folder, texts)
    scenario.lay_out(world, folder)


def sizes(recipe: Recipe, steps: int, **training: object) -> list[str]:
    """The overrides of a run of `steps`: all that follows from the models and the data being small."""
    values = {
        "training.max_steps": steps, "training.logging_steps": max(1, steps // 20), "training.eval_steps": steps,
        "training.save_steps": steps, "training.learning_rate": 2e-3, "training.dataloader_num_workers": 1,
        "training.use_cpu": "true", **{f"training.{key}": value for key, value in training.items()},
    }  # fmt: skip
    for modality, options in recipe.projectors.items():
        values |= {f"model.modalities.{modality}.projector.{key}": value for key, value in options.items()}
    return [*recipe.others, *(f"{key}={value}" for key, value in values.items())]
