"""The real lmms-eval: its command on local data with a small run, and its own scores of given answers beside ours.

lmms-eval's pins conflict with ours, so it is run by the Python of another environment, named by MOKAMM_LMMS_PYTHON:

    uv venv ../lmms && uv pip install --python ../lmms "lmms-eval[audio]==0.7.3" -e . --override eval/lmms/overrides.txt
    MOKAMM_LMMS_PYTHON=../lmms/bin/python uv run pytest tests/eval/test_lmms_package.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.schema import UserError
from eval.benchmarks import BENCHMARKS
from eval.benchmarks.cider import tokens
from eval.benchmarks.fields import take_apart
from eval.predictions import collect
from eval.score import score

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("MOKAMM_LMMS_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(
        not PYTHON,
        reason='needs lmms-eval: uv venv ../lmms && uv pip install --python ../lmms "lmms-eval[audio]==0.7.3" -e . '
        "--override eval/lmms/overrides.txt, then MOKAMM_LMMS_PYTHON=../lmms/bin/python",
    ),
    pytest.mark.timeout(3600),
]


def start(command: list[str], folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command from the root of the repository, without network and on one thread."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **offline, "CC": "/bin/false", "CXX": "/bin/false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AVE and MUSIC-AVQA made of the miniature world: all clips as flutes, the only name of the 28 that it has; beside
    them a clip that is cut off and a line that is none."""
    folder = tmp_path_factory.mktemp("sets")
    source = world / "train"
    for name in ("videos", "audio"):
        shutil.copytree(source / name, folder / name)
    events = [line.split("&") for line in (source / "events.txt").read_text().splitlines()[1:]]
    lines = ["&".join(["Flute", *fields[1:]]) for fields in events]
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    (folder / "testSet.txt").write_text("\n".join([*lines, "Flute&nowhere&good&0&4", "Flute&x&good&7&3"]) + "\n")
    questions = json.loads((source / "avqa.json").read_text())[:30]
    (folder / "train.json").write_text(json.dumps(questions))
    (folder / "avqa-test.json").write_text(json.dumps([*questions, questions[0] | {"video_id": "nowhere"}]))
    (folder / "tasks").mkdir()
    for name, file in (("ave", "testSet.txt"), ("music_avqa", "avqa-test.json")):
        options = {"video_dir": "videos", "audio_dir": "audio"}
        places = {"path": f"$SETS/{file}", "media_dir": str(folder), "options": options}
        task = {"include": str(ROOT / "eval/lmms/tasks" / f"{name}.yaml"), "task": name, "dataset_kwargs": places}
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    write_pictures(folder, source)
    return folder


def write_pictures(folder: Path, source: Path) -> None:
    """lmms-eval's own MME, on pictures of the miniature world, in the columns of its data set."""
    from datasets import Dataset, Features, Image, Value

    files = sorted((source / "images").glob("*.png"))[:3]
    rows = [
        {
            "question_id": file.stem,
            "category": "count",
            "question": f"Is there a {shape}?",
            "answer": answer,
            "image": str(file),
        }
        for file in files
        for shape, answer in (("ring", "Yes"), ("square", "No"))
    ]
    kinds: dict[str, Any] = dict.fromkeys(("question_id", "category", "question", "answer"), Value("string"))
    Dataset.from_list(rows, features=Features({**kinds, "image": Image()})).to_parquet(folder / "pictures.parquet")
    (folder / "tasks" / "pictures.yaml").write_text(
        "task: pictures\ndataset_path: parquet\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'pictures.parquet'}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
        "doc_to_visual: !function lmms_eval.tasks.mme.utils.mme_doc_to_visual\n"
        "process_results: !function lmms_eval.tasks.mme.utils.mme_process_results\n"
        "generation_kwargs: {max_new_tokens: 16, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}\n"
        "metric_list:\n- metric: mme_perception_score\n"
        "  aggregation: !function lmms_eval.tasks.mme.utils.mme_aggregate_results\n  higher_is_better: true\n"
    )


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training on the very rows that are asked, so that many answers are right."""
    folder = tmp_path_factory.mktemp("run")
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    options = {"video_dir": "videos", "audio_dir": "audio"}
    config["data"] = {
        "media_dir": str(data),
        "train": [
            {"source": "ave", "path": "train.txt", "options": options, "weight": 4.0},
            {"source": "music_avqa", "path": "train.json", "options": options},
        ],
        "max_length": 320,
        "cache": {"dir": str(folder / "cache"), "max_gb": 1},
    }
    config["evaluation"] = {"batch_size": 4, "max_new_tokens": 24}
    config["training"] |= {
        "output_dir": str(folder / "run"), "max_steps": 40, "per_device_train_batch_size": 8, "eval_steps": 1000,
        "save_steps": 1000, "dataloader_num_workers": 0, "deepspeed": None, "report_to": [],
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    start([sys.executable, "mokamm/train.py", str(folder / "run.yaml")], folder)
    return folder / "run"


@pytest.fixture(scope="module")
def results(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `lmms_eval --model mokamm` leaves."""
    folder = tmp_path_factory.mktemp("results")
    command = [PYTHON, "-m", "lmms_eval", "--model", "mokamm", "--model_args", f"run={run}", "--batch_size", "4"]
    command += ["--include_path", str(data / "tasks"), "--tasks", "ave,music_avqa,pictures", "--log_samples"]
    os.environ["SETS"] = str(data)
    try:
        done = start([*command, "--output_path", str(folder)], folder)
    finally:
        del os.environ["SETS"]
    (folder / "messages.txt").write_text(done.stderr)
    return folder


def records(results: Path, task: str) -> list[dict[str, Any]]:
    """Rows of eval/score.py, as they stand in lmms-eval's file of samples."""
    (file,) = results.rglob(f"*samples_{task}.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return [sample["strict"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def figures(results: Path) -> dict[str, Any]:
    (file,) = results.rglob("*results.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.parametrize("task", ["ave", "music_avqa"])
def test_its_scores_are_those_of_our_scorer(results: Path, tmp_path: Path, task: str) -> None:
    found = records(results, task)
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in found))
    scored, theirs = score(task, file), figures(results)[task]
    assert scored["rows"] == len(found)
    for rule in ("strict", "official"):
        assert theirs[f"{rule},none"] == pytest.approx(scored["rules"][rule]["score"], abs=1e-12)
    assert theirs["parsed,none"] == pytest.approx(scored["parsed"] / scored["rows"], abs=1e-12)
    assert 0.1 < scored["rules"]["strict"]["score"] < 1  # neither nothing nor all was learned


@pytest.mark.parametrize(("task", "file"), [("ave", "testSet.txt"), ("music_avqa", "avqa-test.json")])
def test_its_answers_are_those_of_our_runner(results: Path, run: Path, data: Path, task: str, file: str) -> None:
    """By the model's own generate, one row at a time."""
    from mokamm.build import media_loader
    from mokamm.model import MultimodalLM

    model = MultimodalLM.from_run(run)
    assert model.config is not None
    loader = media_loader(data, model.config.data)
    rows = BENCHMARKS[task].load(data / file, options={"video_dir": "videos", "audio_dir": "audio"})
    found = records(results, task)
    assert [record["id"] for record in found] == [row.id for row in rows]
    for row, record in zip(rows, found, strict=True):
        if row.sample is None:
            assert record["error"]
            continue
        try:
            expected = model.generate([row.sample], loader=loader)[0]
        except UserError:
            expected = ""
        assert record["prediction"] == expected


def test_its_own_task_with_pictures_that_come_decoded(results: Path, run: Path, world: Path) -> None:
    from mokamm.model import MultimodalLM

    (file,) = results.rglob("*samples_pictures.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    model = MultimodalLM.from_run(run)
    assert len(samples) == 6
    for sample in samples:
        picture = world / "train" / "images" / f"{sample['mme_perception_score']['question_id']}.png"
        question = f"Is there a {'ring' if sample['target'] == 'Yes' else 'square'}?"
        assert sample["filtered_resps"] == model.chat(question, image=picture, max_new_tokens=16) != ""


def test_bad_rows_are_told_and_count_as_wrong(results: Path) -> None:
    told = (results / "messages.txt").read_text()
    assert "ave, row" in told
    assert "nowhere" in told
    last_two, last = records(results, "ave")[-2:], records(results, "music_avqa")[-1]
    assert [record["points"] for record in (*last_two, last)] == [0.0, 0.0, 0.0]


def test_other_forms_of_media_and_talk(run: Path, data: Path, tmp_path: Path) -> None:
    """In lmms-eval's Python: decoded media answer as their files do, history and text alone are taken, beams too."""
    script = ROOT / "tests" / "eval" / "lmms_requests.py"
    done = start([PYTHON, str(script), str(run), str(data)], tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["image"]["array"] == found["image"]["path"] != ""
    assert found["sound"]["array"] == found["sound"]["path"] != ""
    assert found["order"] == found["alone"]
    assert len(set(found["alone"])) > 1
    assert found["history"]
    assert found["text"]
    assert found["beams"]
    assert [len(answers) for answers in found["rounds"]] == [2]
    assert found["bad"] == ""
    assert "sampling" in found["sampled"]
    assert "not supported" in found["likelihood"]


# ---- scores of given answers -----------------------------------------------------------------------------------------

OPTIONS = {"A": "dog", "B": "cat", "C": "cow", "D": "pig"}
SAID = [
    "B",
    "(B)",
    "B.",
    "B. a cat",
    "The answer is B",
    "Option B",
    "B a dog",
    "C",
    "",
    "b",
    "a cat",
    "cat",
    "A cat",
    "A or B",
]


def choice_docs(benchmark: str, said: str) -> list[dict[str, Any]]:
    """lmms-eval's doc of one question, whose true option is B."""
    small = {f"choice_{letter.lower()}": text for letter, text in OPTIONS.items()}
    return [
        {
            "seed_bench": {"question_id": "1", "answer": "B", "data_type": "image"},
            "mmbench": {"index": 1, "question": "?", "answer": "B", "hint": "nan", "source": "s", "split": "dev",
                        "category": "c", "L2-category": "l", **OPTIONS},
            "mmau": {"choices": json.dumps(list(OPTIONS.values())), "answer": "cat", "task": "sound"},
            "air_bench": {**small, "answer_gt": "cat", "task_name": "t"},
        }[benchmark] | {"said": said}
    ]  # fmt: skip


def our_choice(benchmark: str, said: str) -> float:
    choices = list(OPTIONS.values())
    record = {"image_path": "a.jpg", "question": "?", "choices": choices, "answer": "B", "output": [said]}
    return strict(benchmark, [record])


def strict(benchmark: str, rows: list[dict[str, Any]]) -> float:
    scorer = BENCHMARKS[benchmark]
    collected = collect(scorer, [take_apart(row) for row in rows])
    return scorer.score(collected.rows, collected.filed)["rules"]["strict"]["score"]


PASSES = [(1, "B", "B"), (1_000_001, "A", "A"), (2, "B", "B"), (1_000_002, "A", "B"), (3, "C", "a cow"), (4, "D", "C")]
YES_NO = ["Yes", "no", "Yes.", "No, it is not", "yes, it is", "The answer is yes", "Y", "Nothing", "Eyes", ""]
SPOKEN = [
    ("HE HOPED THERE WOULD BE STEW", "he hoped there'd be stew"),
    ("MISTER QUILTER IS THE APOSTLE", "Mr. Quilter is an apostle."),
    ("THE COLOUR GREY", "the color gray uh"),
    ("A MAN", ""),
]
MONEY = [("IT COSTS TWENTY DOLLARS", "it costs twenty"), ("TWO POINT FIVE PERCENT", "2.6%")]
CAPTIONS = [
    ("a dog barks", ["A dog barks twice.", "a dog is barking while it's raining"]),
    ("rain falls on a roof", ["Rain falls.", "rain falls on a tin roof"]),
    ("", ["a man speaks", "someone talks"]),
    ("music", ["loud music plays", "music plays and people cheer"]),
]


def mme_docs(said: list[str]) -> list[dict[str, Any]]:
    """Each answer to the first of two questions about an image, whose truth is yes; the second is answered rightly."""
    return [
        {"question_id": str(i), "category": "count", "answer": truth, "said": text}
        for i, first in enumerate(said)
        for truth, text in (("Yes", first), ("No", "No"))
    ]


def pope_docs(said: list[str]) -> list[dict[str, Any]]:
    return [{"question_id": str(i), "answer": ("yes", "no")[i % 2], "said": text} for i, text in enumerate(said)]


def spoken_docs(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"gt": truth, "source": "s", "task": "asr_en", "said": said} for truth, said in pairs]


@pytest.fixture(scope="module")
def lmms_scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """lmms-eval's figures of all cases, by one process."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for said in SAID:
        for name in ("seed_bench", "mmbench", "mmau", "air_bench"):
            # what it draws at random is asked forty times
            cases[f"{name} {said}"] = choice_docs(name, said) * (40 if name in ("mmau", "air_bench") else 1)
    cases["mmbench circular"] = [
        doc | {"index": index, "answer": answer}
        for index, answer, said in PASSES
        for doc in choice_docs("mmbench", said)
    ]
    three = {"choices": json.dumps(["dog", "cat", "cow"]), "answer": "cat", "task": "sound", "said": "nothing"}
    cases["mmau three"] = [three] * 40
    for said in YES_NO:
        cases[f"mme {said}"] = mme_docs([said])
    cases["mme clear"], cases["mme lone"] = mme_docs(["Yes", "no", "Yes."]), mme_docs(["Yes"])[:1]
    cases["pope clear"], cases["pope all"] = pope_docs(["yes", "no", "No", "Yes", "yes", "yes"]), pope_docs(YES_NO)
    cases["librispeech plain"], cases["librispeech money"] = spoken_docs(SPOKEN), spoken_docs(MONEY)
    told = [[" ".join(tokens(text)) for text in references] for _, references in CAPTIONS]
    cases["cider"] = [
        {"references": references, "said": " ".join(tokens(said))}
        for (said, _), references in zip(CAPTIONS, told, strict=True)
    ]
    folder = tmp_path_factory.mktemp("scores")
    done = start([PYTHON, "tests/eval/lmms_scores.py"], folder, input=json.dumps(cases))
    return json.loads(done.stdout)


def differing(
    name: str, figure: str, scale: float, lmms_scores: dict[str, dict[str, Any]]
) -> dict[str, tuple[float, float]]:
    """Answers on which the two differ: (ours, theirs)."""
    pairs = {said: (our_choice(name, said), lmms_scores[f"{name} {said}"][figure] / scale) for said in SAID}
    return {said: pair for said, pair in pairs.items() if pair[0] != pair[1]}


def test_seed_bench(lmms_scores: dict[str, dict[str, Any]]) -> None:
    found = differing("seed_bench", "seed_image", 1, lmms_scores)
    assert found == dict.fromkeys(["(B)", "The answer is B", "Option B", "a cat", "cat", "A cat"], (1.0, 0.0))


def test_mmbench(lmms_scores: dict[str, dict[str, Any]]) -> None:
    assert differing("mmbench", "static", 100, lmms_scores) == {"b": (1.0, 0.0), "A cat": (1.0, 0.0)}


def test_mmbench_in_circles(lmms_scores: dict[str, dict[str, Any]]) -> None:
    rows = [
        {"index": index, "image_path": "a.jpg", "question": "?", "choices": list(OPTIONS.values()), "answer": answer,
         "output": [said]}
        for index, answer, said in PASSES
    ]  # fmt: skip
    scorer = BENCHMARKS["mmbench"]
    collected = collect(scorer, [take_apart(row) for row in rows])
    figures = scorer.score(collected.rows, collected.filed)["rules"]["strict"]
    assert figures["circular"] == lmms_scores["mmbench circular"]["static"] / 100 == 2 / 4
    assert figures["vanilla"] == 3 / 4


@pytest.mark.parametrize(("name", "scale"), [("mmau", 100), ("air_bench", 1)])
def test_mmau_and_air_bench(lmms_scores: dict[str, dict[str, Any]], name: str, scale: float) -> None:
    found = differing(name, "accuracy", scale, lmms_scores)
    drawn = {said: found.pop(said) for said in ("b", "a cat", "cat", "")}
    assert [ours for ours, _ in drawn.values()] == [1.0, 1.0, 1.0, 0.0]
    assert all(0.05 < theirs < 0.6 for _, theirs in drawn.values())  # one of four letters at random
    assert found == {"A cat": (1.0, 0.0), "A or B": (0.0, 1.0)}


def test_mmau_with_fewer_than_four_options(lmms_scores: dict[str, dict[str, Any]]) -> None:
    assert "IndexError" in lmms_scores["mmau three"]["error"]


def our_mme(said: list[str]) -> float:
    rows = [
        {"subtask": "count", "image_path": f"{doc['question_id']}.jpg", "question": doc["answer"],
         "answer": doc["answer"], "output": [doc["said"]]}
        for doc in mme_docs(said)
    ]  # fmt: skip
    return strict("mme", rows)


def test_mme(lmms_scores: dict[str, dict[str, Any]]) -> None:
    assert our_mme(["Yes", "no", "Yes."]) == pytest.approx(lmms_scores["mme clear"]["mme_perception_score"])
    pairs = {said: (our_mme([said]), lmms_scores[f"mme {said}"]["mme_perception_score"]) for said in YES_NO}
    differing = {said: pair for said, pair in pairs.items() if pair[0] != pair[1]}
    assert differing == {"The answer is yes": (200.0, 50.0), "Y": (50.0, 200.0), "Eyes": (50.0, 200.0)}
    assert "AssertionError" in lmms_scores["mme lone"]["error"]


def our_pope(said: list[str]) -> dict[str, float]:
    rows = [
        {"image_path": f"{i}.jpg", "question": str(i), "answer": doc["answer"], "output": [doc["said"]]}
        for i, doc in enumerate(pope_docs(said))
    ]
    scorer = BENCHMARKS["pope"]
    collected = collect(scorer, [take_apart(row) for row in rows])
    return scorer.score(collected.rows, collected.filed)["rules"]["strict"]


def test_pope(lmms_scores: dict[str, dict[str, Any]]) -> None:
    ours, theirs = our_pope(["yes", "no", "No", "Yes", "yes", "yes"]), lmms_scores["pope clear"]
    for own, name in (("score", "accuracy"), ("precision", "precision"), ("recall", "recall"), ("f1", "f1_score")):
        assert ours[own] == pytest.approx(theirs[name])
    assert (ours["yes_ratio"], theirs["yes_ratio"]) == (pytest.approx(4 / 6), 0.5)  # theirs is that of the truth
    ours, theirs = our_pope(YES_NO), lmms_scores["pope all"]
    assert (ours["score"], theirs["accuracy"]) == (0.5, 0.2)
    assert ours["recall"] == pytest.approx(3 / 5)
    assert theirs["recall"] == 1.0  # of "Yes" and four that are neither `yes` nor `no`, which it leaves out


def our_words(pairs: list[tuple[str, str]]) -> float:
    rows = [
        {"audio_filepath": f"1-1-{i}.flac", "text": said, "pred_text": heard} for i, (said, heard) in enumerate(pairs)
    ]
    return strict("librispeech", rows)


def test_librispeech(lmms_scores: dict[str, dict[str, Any]]) -> None:
    assert our_words(SPOKEN) == pytest.approx(lmms_scores["librispeech plain"]["wer"] / 100) == pytest.approx(3 / 16)
    # after the English normaliser it applies the basic one: `$20` is `20` there, and `2.5%` two words, `2 5`
    assert our_words(MONEY) == pytest.approx(2 / 4)
    assert lmms_scores["librispeech money"]["wer"] / 100 == pytest.approx(1 / 5)


def test_captions(lmms_scores: dict[str, dict[str, Any]]) -> None:
    rows = [
        {"youtube_id": str(i), "prediction": said, "references": references}
        for i, (said, references) in enumerate(CAPTIONS)
    ]
    assert strict("audiocaps", rows) == pytest.approx(lmms_scores["cider"]["CIDEr"], abs=1e-9)
