"""Bad rows: written down once, replaced by rows that depend on the index alone, and too many of them stop the run."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from data.collate import collate
from data.dataset import TRIES, MultimodalDataset, loaded, lost_workers_told
from data.ledger import Ledger
from data.media import MediaLoader
from data.order import epoch_order
from data.schema import BadSample, Example, MediaInput, UserError
from data.sources import open_source


class Heard:
    """A small processor: the row's number as a token, and its sound as one media item."""

    def __init__(self, folder) -> None:
        self.loader = MediaLoader(folder)

    def __call__(self, sample) -> Example:
        windows = self.loader.windows(sample.media[0], 2, 0.01, whole=False)
        ids = torch.tensor([0, 0, sample.meta["number"]])
        item = MediaInput("audio", [1], 1, boundaries=False, segments=windows.samples, lengths=windows.lengths)
        return Example(ids, ids, torch.tensor([0, 1, 0]), ids > 0, [item], sample)


def make_rows(folder, n, bad=(), name="rows.jsonl"):
    """n rows with a sound file each; those in `bad` have an empty recording."""
    lines = []
    for k in range(n):
        soundfile.write(folder / f"{k}.wav", np.full(0 if k in bad else 160, k / 100), 16_000)
        content = [{"type": "audio", "path": f"{k}.wav"}, {"type": "text", "text": "?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": str(k)}]
        lines.append(json.dumps({"id": f"id{k}", "messages": messages, "meta": {"number": k}}))
    (folder / name).write_text("\n".join(lines))
    return open_source("messages", folder / name)


def numbers(loader) -> list[list[int]]:
    return [[int(ids[-1]) for ids in batch["input_ids"]] for batch in loader]


def ledger_rows(path) -> list[int]:
    return [json.loads(line)["row"] for line in path.read_text().splitlines()]


BAD = (2, 7, 11)


def dataset(folder, rows, name="ledger.jsonl", fraction=0.5, seed=0):
    return MultimodalDataset([(rows, 1.0, "sounds")], Heard(folder), Ledger(folder / name, fraction, len(rows)), seed)


def test_substitutes_depend_on_the_index_alone(tmp_path):
    rows = make_rows(tmp_path, 20, BAD)
    forwards, backwards = dataset(tmp_path, rows, "a.jsonl"), dataset(tmp_path, rows, "b.jsonl")
    first = [int(forwards[i].input_ids[-1]) for i in range(20)]
    second = [int(backwards[i].input_ids[-1]) for i in reversed(range(20))][::-1]
    assert first == second
    for i, number in enumerate(first):
        expected = next(j for j in [i, *forwards.substitutes(i)] if j not in BAD)
        assert number == expected
    assert len({first[i] for i in BAD}) > 1  # not always the same row
    assert sorted(ledger_rows(tmp_path / "a.jsonl")) == list(BAD)
    line = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert line["source"] == "sounds"
    assert (line["row"], line["id"]) == (2, "id2")
    assert "2.wav: holds no sound samples" in line["reason"]
    assert [int(dataset(tmp_path, rows, "c.jsonl", seed=1)[i].input_ids[-1]) for i in BAD] != [first[i] for i in BAD]


def test_the_same_batches_with_any_number_of_workers(tmp_path):
    rows = make_rows(tmp_path, 24, BAD)
    batches = epoch_order(len(rows), 0, seed=1).reshape(-1, 4).tolist()
    seen = {}
    for workers, context in ((0, None), (1, "fork"), (2, "fork"), (1, "spawn")):
        name = f"{workers}{context}.jsonl"
        loader = DataLoader(
            dataset(tmp_path, rows, name),
            batch_sampler=batches,
            collate_fn=partial(collate, pad_id=0),
            num_workers=workers,
            multiprocessing_context=context,
        )
        seen[name] = numbers(loaded(loader))
        assert sorted(ledger_rows(tmp_path / name)) == list(BAD)  # each once, though several workers meet them
    assert len({str(value) for value in seen.values()}) == 1
    good = [number for batch in seen["0None.jsonl"] for number in batch]
    assert not set(good) & set(BAD)
    resumed = DataLoader(dataset(tmp_path, rows), batch_sampler=batches[3:], collate_fn=partial(collate, pad_id=0))
    assert numbers(resumed) == seen["0None.jsonl"][3:]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_rows_stop_the_run_with_a_plain_message(tmp_path, workers):
    rows = make_rows(tmp_path, 30, range(5, 15))
    data = dataset(tmp_path, rows, fraction=0.2)
    loader = DataLoader(data, batch_size=2, collate_fn=partial(collate, pad_id=0), num_workers=workers)
    with pytest.raises(UserError) as error:
        numbers(loaded(loader))
    message = str(error.value)
    counted = re.match(
        r"(\d+) of 30 rows cannot be used \(.*%\), more than data.max_bad_fraction = 0.2. The first", message
    )
    assert counted
    assert int(counted[1]) in range(7, 7 + max(1, workers))  # each worker may meet one more before it stops
    assert "wav: holds no sound samples" in message
    assert str(tmp_path / "ledger.jsonl") in message
    assert "Traceback" not in message
    assert not isinstance(error.value, BadSample)


def test_a_share_that_was_set_holds_for_a_small_data_set_too(tmp_path):
    ledger = Ledger(tmp_path / "l.jsonl", 0.1, 10)
    ledger.add("s", 0, "", "broken")
    with pytest.raises(UserError, match=r"2 of 10 rows cannot be used .* data\.max_bad_fraction = 0\.1\. "):
        ledger.add("s", 1, "", "broken")


def test_where_none_was_set_a_few_bad_rows_stop_no_small_data_set(tmp_path):
    ledger = Ledger(tmp_path / "l.jsonl", None, 4)
    for row in (0, 1, 2):
        ledger.add("s", row, "", "broken")
    with pytest.raises(UserError, match=r"4 of 4 rows cannot be used \(100\.0%\)"):
        ledger.add("s", 3, "", "broken")


def test_where_no_bad_row_is_allowed_the_first_stops_the_run(tmp_path):
    with pytest.raises(
        UserError, match=r"1 of 400 rows cannot be used .* data\.max_bad_fraction = 0\. .*\n  s row 7: broken"
    ):
        Ledger(tmp_path / "l.jsonl", 0.0, 400).add("s", 7, "", "broken")


def test_when_no_substitute_is_good(tmp_path):
    rows = make_rows(tmp_path, 3, range(3))
    with pytest.raises(
        UserError, match=rf"sounds row 1 is unusable, and so are {TRIES} rows .* holds no sound samples"
    ):
        dataset(tmp_path, rows, fraction=1.0)[1]


def test_other_mistakes_are_not_swallowed(tmp_path):
    rows = make_rows(tmp_path, 3)

    def broken(sample):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        MultimodalDataset([(rows, 1.0, "s")], broken, Ledger(tmp_path / "l", 1.0, 3))[0]


def test_weights_are_fractional_repeats(tmp_path):
    rows = make_rows(tmp_path, 10)
    few = rows.head(4)
    ledger = Ledger(tmp_path / "l.jsonl", 1.0, 14)

    def drawn(seed):
        data = MultimodalDataset([(rows, 2.5, "a"), (few, 0.5, "b"), (few, 0.0, "c")], Heard(tmp_path), ledger, seed)
        return [data.where(i) for i in range(len(data))]

    places = drawn(0)
    assert len(places) == 25 + 2
    counts = [places.count(f"a row {k}") for k in range(10)]
    assert sorted(counts) == [2] * 5 + [3] * 5
    assert sum(place.startswith("b ") for place in places) == 2
    assert drawn(0) == places
    assert any(drawn(seed) != places for seed in (1, 2, 3))


def test_a_fraction_takes_other_rows_in_each_epoch_until_all_were_seen(tmp_path):
    rows = make_rows(tmp_path, 10)
    data = MultimodalDataset(
        [(rows.head(3), 0.0, "a"), (rows, 0.25, "b"), (rows, 1.5, "c")], Heard(tmp_path), Ledger(tmp_path / "l", 0, 23)
    )
    assert len(data) == 2 + 15  # round(2.5) is 2
    epochs = [[data.where(i) for i in range(17 * e, 17 * (e + 1))] for e in range(10)]
    for found in epochs:
        assert sorted(found[2:12]) == sorted(f"c row {k}" for k in range(10))
        assert len(set(found[12:])) == 5
    assert not set(epochs[0][12:]) & set(epochs[1][12:])
    seen = [place for found in epochs[:5] for place in found[:2]]
    assert sorted(seen) == sorted(f"b row {k}" for k in range(10))
    assert epochs[5][:2] == epochs[0][:2]
    assert int(data[17 * 3].input_ids[-1]) == int(data.where(17 * 3).split()[-1])


def test_substitutes_in_a_later_epoch_are_of_that_epoch(tmp_path):
    rows = make_rows(tmp_path, 8)
    data = MultimodalDataset([(rows, 0.5, "a"), (rows, 1.0, "b")], Heard(tmp_path), Ledger(tmp_path / "l", 1.0, 16))
    assert list(data.substitutes(12 * 4 + 1)) == [12 * 4 + i for i in data.substitutes(1)]
    assert {data.where(i) for i in data.substitutes(1)} != {data.where(i) for i in data.substitutes(13)}


def test_a_part_may_have_a_process_of_its_own(tmp_path):
    (tmp_path / "other").mkdir()
    first, second = make_rows(tmp_path, 2), make_rows(tmp_path / "other", 3)
    parts = [(first, 1.0, "a"), (second, 1.0, "b", Heard(tmp_path / "other"))]
    data = MultimodalDataset(parts, Heard(tmp_path), Ledger(tmp_path / "l", 0, 5))
    assert [int(data[i].input_ids[-1]) for i in range(5)] == [0, 1, 0, 1, 2]


def test_mixtures_that_make_no_sense(tmp_path):
    rows, ledger, process = make_rows(tmp_path, 2), Ledger(tmp_path / "l", 0, 2), Heard(tmp_path)
    for parts, message in (
        ([(rows, 1.0, "a"), (rows, 1.0, "a")], "names must differ, found: a, a"),
        ([(rows, -1.0, "a")], "a: weight must be a number from 0 up, found -1"),
        ([(rows, float("nan"), "a")], "weight must be a number"),
        ([(rows, 0.0, "a")], "no rows are left"),
        ([([], 1.0, "a")], "a: its file holds no rows"),
        ([], "names no source"),
    ):
        with pytest.raises(UserError, match=message):
            MultimodalDataset(parts, process, ledger)


# --- the ledger alone


def add_rows(path, rows):
    ledger = Ledger(path, 1.0, 1000)
    for row in rows:
        ledger.add("s", row, f"id{row}", "reason äöü " * 20)


def test_several_processes_write_each_row_once_and_whole(tmp_path):
    path = tmp_path / "run" / "bad_samples.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add_rows, args=(path, range(k * 25, k * 25 + 100))) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sorted(ledger_rows(path)) == list(range(175))
    ledger = Ledger(path, 1.0, 1000)
    ledger.add("s", 0, "", "known")  # reads what the others wrote, and is not written twice
    assert len(ledger) == 175


def test_a_resumed_run_goes_on_counting_after_half_a_line(tmp_path):
    path = tmp_path / "l.jsonl"
    add_rows(path, range(4))
    path.write_bytes(path.read_bytes()[:-30])  # the writer was killed
    ledger = Ledger(path, 0.01, 400)
    ledger.add("s", 0, "", "again")  # known: not written twice
    assert len(ledger) == 3
    ledger.add("s", 3, "", "x")
    assert ledger_rows_lenient(path) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="5 of 400 rows"):
        ledger.add("s", 9, "", "x")


def ledger_rows_lenient(path) -> list[int]:
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line)["row"])
        except ValueError:
            continue
    return rows


def test_half_a_surrogate_pair_is_written_as_json_writes_it(tmp_path):
    Ledger(tmp_path / "l.jsonl", 1.0, 10).add("s", 1, "clip\ud83d", "no text: \udc80 ä")
    line = json.loads((tmp_path / "l.jsonl").read_bytes())
    assert (line["id"], line["reason"]) == ("clip\ud83d", "no text: \udc80 ä")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"l\.jsonl: cannot be written"):
        Ledger(tmp_path / "file" / "l.jsonl", 1.0, 10).add("s", 1, "", "x")


class Killing:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        signal.raise_signal(signal.SIGKILL)
        return index


def test_a_worker_that_the_system_kills_is_told_in_one_message():
    with pytest.raises(UserError, match="a process that loads data was killed"), lost_workers_told():
        list(loaded(DataLoader(Killing(), num_workers=1)))
    with pytest.raises(RuntimeError, match="another"), lost_workers_told():
        raise RuntimeError("another")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_so_is_one_that_was_killed_while_it_handed_over_a_batch(error):
    def broken():
        raise error
        yield

    with pytest.raises(UserError, match="a process that loads data was killed"):
        list(loaded(broken()))
