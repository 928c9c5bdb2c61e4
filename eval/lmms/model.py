"""A run as a chat model of lmms-eval: `--model mokamm --model_args run=RUN[,base=LLM][,sound=speech]`.

    requests --by generation_kwargs, longest question first--> windows of WINDOW batches --answer_batches--> texts

Media are opened a window at a time, so that memory holds no more of a data set that comes decoded; within a window rows
are sorted and asked as eval/run.py does it (eval/generation.py). Answers are greedy, and the same as eval/run.py's on
the same samples. A row that cannot be used is answered with the empty text, and told on standard error with its reason.

Under several processes (accelerate launch -m lmms_eval ...) each holds the model and answers its own share.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableMessagesTask

from data.schema import BadSample, Sample, UserError
from eval.benchmarks.base import Row
from eval.generation import answer_batches, by_tokens, make_batches
from eval.lmms.decoding import Decoding
from eval.lmms.media import GivenMedia
from eval.lmms.messages import sample_of, user_turn
from mokamm.training.launch import rank_here, world_here

WINDOW = 16  # batches whose media are in memory together


class Mokamm(lmms):
    is_simple = False

    def __init__(
        self,
        run: str,
        base: str | None = None,
        sound: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """run: a run's folder; base: its LLM, where it has moved; sound: what perceives audio (default: audio)."""
        from mokamm.model import MultimodalLM

        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"--batch_size must be a number of at least 1; found {batch_size!r}")
        self.batch_size = int(batch_size)
        self._rank, self._world_size = rank_here(), world_here()
        if device is None and self._world_size > 1 and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.model = MultimodalLM.from_run(run, base=base, device=device)
        self.device = self.model.device
        heard = [name for name, sense in self.model.senses.items() if sense.kind == "waveform"]
        self.sound = sound or ("audio" if "audio" in heard or not heard else heard[0])

    # ---- lmms-eval's contract ------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the requests."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[2], sort_keys=True, default=str)].append(index)
        with self.model.folded():
            for indices in groups.values():
                decoding = Decoding.of(requests[indices[0]].args[2] or {})
                indices.sort(key=lambda index: len(str(requests[index].args[0])), reverse=True)
                size = WINDOW * self.batch_size
                for start in range(0, len(indices), size):
                    window = indices[start : start + size]
                    asked = [(self._messages(requests[index]), _name(requests[index])) for index in window]
                    for index, text in zip(window, self.answer(asked, decoding), strict=True):
                        answers[index] = text
        return answers

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """All answers of each request, whose task makes the next messages of the answers so far, one at a time."""
        with self.model.folded():
            return [self._rounds(request) for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise UserError(
            "lmms-eval's tasks by likelihood (output_type: loglikelihood, multiple_choice) are not supported"
        )

    # ---- our own -------------------------------------------------------------------------------------------------

    def answer(self, asked: list[tuple[Any, str]], decoding: Decoding) -> list[str]:
        """The answers to conversations, each with the name that messages about it bear."""
        limits = self.model.processor.loader.limits
        media = GivenMedia(limits)
        rows = [self._row(messages, name, index, media) for index, (messages, name) in enumerate(asked)]

        def ask(samples: list[Sample]) -> list[str]:
            return self.model.generate(samples, decoding.max_new_tokens, None, decoding.num_beams, media, folded=False)

        try:
            batches = make_batches(rows, self.batch_size, by_tokens(self.model.processor.estimate_length))
            answer_batches(ask, batches, keep=lambda batch: None, label="lmms-eval")
        finally:
            media.close()
        for row in rows:
            if row.error is not None:
                print(f"warning: {row.id}: answered with nothing: {row.error}", file=sys.stderr)
        return [decoding.cut(row.prediction) for row in rows]

    def _row(self, messages: Any, name: str, index: int, media: GivenMedia) -> Row:
        try:
            return Row(name, index, sample=sample_of(messages, media, self.sound, name))
        except BadSample as error:
            return Row(name, index, error=str(error))

    def _messages(self, request: Any) -> Any:
        """The conversation of a request. Tasks without messages of their own give media and a text: lmms-eval's own
        way of making a turn of these takes sound for video, so they are asked for both here."""
        doc_to_messages, doc = request.args[1], self._doc(request)
        task: Any = getattr(doc_to_messages, "__self__", None)
        plain = getattr(doc_to_messages, "__func__", None) is ConfigurableMessagesTask.doc_to_messages
        if plain and task.config.doc_to_messages is None and task.config.doc_to_visual is not None:
            return user_turn(task.doc_to_visual(doc), str(task.doc_to_text(doc)))
        return doc_to_messages(doc)

    def _doc(self, request: Any) -> Any:
        doc_id, task, split = request.args[3:6]
        return self.task_dict[task][split][doc_id]

    def _rounds(self, request: Any) -> list[str]:
        decoding, doc_to_messages = Decoding.of(request.args[2] or {}), request.args[1]
        answers: list[str] = []
        messages, told = self._messages(request), None
        while True:
            answers += self.answer([(messages, f"{_name(request)} round {len(answers)}")], decoding)
            following = doc_to_messages(
                self._doc(request), round_idx=len(answers), previous_output=list(answers), previous_round_info=told
            )
            if not isinstance(following, tuple) or len(following) != 4 or following[1]:
                return answers
            messages, _, _, told = following


def _name(request: Any) -> str:
    return f"{request.args[4]}, row {request.args[3]}"
