"""MultimodalLM: an LLM that reads media tokens among its text, with an adapter that is told which token is what.

    media features --projectors--> media tokens --index_copy--> input embeddings (B,T,D) --+
    modality ids, keys ----------------------------------------> Routing ------------------+--> LLM + adapter --> logits

`llm` (perhaps PEFT-wrapped) and `projectors` are registered modules: what DeepSpeed shards. The frozen encoders
(`perception`) and the `processor` are plain attributes. Every projector is called exactly once a training forward (under
ZeRO-3 in a validation, too), on zeros with zero weight where its modality is absent, because ranks that call different
modules hang or, worse, do not.
Cost beyond the LLM: the projectors and one copy of the embeddings.

Axis letters: B batch, T tokens, D model width, V vocabulary, N segments, P patches, C feature width, K their tokens.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from data.collate import collate
from data.media import MediaLoader
from data.schema import IGNORED, MEDIA, Batch, Media, MediaBatch, MediaInput, Message, Sample, Text, UserError
from mokamm.adapters import AdapterError, MokaModel, RoutedLinear, set_routing
from mokamm.config_sections import EvaluationConfig
from mokamm.perception import Perception, Sense
from mokamm.processor import Processor
from mokamm.projectors import Projector
from mokamm.routing import Routing

if TYPE_CHECKING:
    from mokamm.config import RunConfig

log = logging.getLogger("mokamm")

Paths = str | Path | Sequence[str | Path] | None


class MultimodalLM(nn.Module):
    """An LLM with projectors for the modalities of its config; see the head of this file."""

    llm: Any  # a transformers model, perhaps inside a PeftModel

    def __init__(
        self, llm: Any, projectors: Mapping[str, Projector], perception: Perception, processor: Processor
    ) -> None:
        super().__init__()
        self.llm = llm
        self.projectors = nn.ModuleDict(projectors)
        self.perception = perception
        self.processor = processor
        self.config: RunConfig | None = None
        self.told_of_cut = False
        base = self.base_llm
        self.takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        ends = getattr(base.generation_config, "eos_token_id", None)
        self.end_ids = sorted({*processor.end_ids, *([ends] if isinstance(ends, int) else ends or [])})

    @property
    def base_llm(self) -> Any:
        """The LLM itself, within PEFT's wrapper if there is one."""
        return self.llm.get_base_model() if hasattr(self.llm, "get_base_model") else self.llm

    @property
    def device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def senses(self) -> dict[str, Sense]:
        return self.processor.senses

    # ---- forward ---------------------------------------------------------------------------------------

    def forward(self, batch: Batch, answers_only: bool = False) -> dict[str, Tensor]:
        """logits (B,T,V); loss_sum: cross entropy summed over the answer tokens in fp32; tokens: their number.

        answers_only: logits (tokens,V) in fp32, those that predict an answer token. The head computes no others, and of a
        row with media answers are a small part.
        """
        embeddings = self.embed(batch)
        # the collated labels still lie on the CPU, so that finding the answer tokens needs no device sync
        targets = nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].flatten()
        where = (targets != IGNORED).nonzero().flatten()
        chosen = where.to(self.device)
        with _given(self.llm.get_output_embeddings(), chosen) if answers_only else nullcontext():
            logits = self.llm(inputs_embeds=embeddings, use_cache=False, **self._places(batch)).logits
        given = logits.shape[:2] == (1, len(where))  # never (B,T): a row's last token predicts none
        rows = (logits[0] if given else logits.flatten(0, 1).index_select(0, chosen)).float()
        if answers_only:
            logits = rows  # before the loss takes as much again
        loss_sum = nn.functional.cross_entropy(rows, targets[where].to(rows.device), reduction="sum")
        return {"logits": logits, "loss_sum": loss_sum, "tokens": torch.tensor(len(where), device=rows.device)}

    def _places(self, batch: Batch) -> dict[str, Tensor | None]:
        """Which tokens the LLM attends to, and their positions; samples in one row are parted by these alone."""
        if "position_ids" in batch:  # transformers parts a row where they begin anew, if there is no mask
            return {"attention_mask": None, "position_ids": batch["position_ids"].to(self.device)}
        mask = batch["attention_mask"].to(self.device)
        positions = {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)} if self.takes_positions else {}
        return {"attention_mask": mask, **positions}

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings (B,T,D) with all media in place; encodes what is not encoded yet and sets the routing."""
        self.perception.fill(batch)
        set_routing(self.llm, self.routing(batch))
        embeddings_BTD = self.llm.get_input_embeddings()(batch["input_ids"].to(self.device))
        flat = embeddings_BTD.flatten(0, 1)
        index: list[Tensor] = []
        vectors: list[Tensor] = []
        idle = []
        for name, module in self.projectors.items():
            projector = cast(Projector, module)
            if name in batch["media"]:
                self._project(projector, batch["media"][name], index, vectors)
            elif (self.training and torch.is_grad_enabled()) or _is_sharded(projector):
                idle.append(_idle(projector, self.device))
        if vectors:
            values = torch.cat([v.to(flat.dtype) for v in vectors])
            flat = flat.index_copy(0, torch.cat(index).to(self.device), values)
        for zero in idle:
            flat = flat + zero.to(flat.dtype)
        return flat.view_as(embeddings_BTD)

    def routing(self, batch: Batch) -> Routing:
        return Routing(
            batch["modality_ids"], batch["key_mask"], key_index=batch["key_index"], key_valid=batch["key_valid"],
            sample_ids=batch.get("sample_ids"),
        ).to(self.device)  # fmt: skip

    def _project(self, projector: Projector, media: MediaBatch, index: list[Tensor], vectors: list[Tensor]) -> None:
        """Append the tokens of all items of one modality, and their boundary vectors, with their flat positions."""
        items, segments = (media.items, None) if torch.is_grad_enabled() else _distinct(media.items)
        features, mask = _stack(items, self.device)
        tokens_NKD = projector(features, mask)
        if segments is not None:
            tokens_NKD = tokens_NKD.index_select(0, torch.tensor(segments, device=self.device))
        width = tokens_NKD.shape[1]
        counts = [count for item in media.items for count in item.counts]
        tokens = tokens_NKD.flatten(0, 1)
        if any(count != width for count in counts):
            take = torch.cat([torch.arange(count) + i * width for i, count in enumerate(counts)])
            tokens = tokens.index_select(0, take.to(self.device))
        index.append(media.token_index)
        vectors.append(tokens)
        boundaries = projector.start_end()
        if boundaries is not None:
            for position, vector in zip((media.start_index, media.end_index), boundaries, strict=True):
                index.append(position)
                vectors.append(vector.expand(len(position), -1))

    # ---- generation ------------------------------------------------------------------------------------

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Within it MokA's text path is part of the LLM's weights: a decoding step then costs what the LLM's costs.

        Nothing happens for other methods, within another `folded`, or where the weights cannot be folded (quantized).
        """
        tuner = getattr(self.llm, "base_model", None)
        if not isinstance(tuner, MokaModel) or tuner.folded:
            yield
            return
        with suppress(AdapterError):
            tuner.fold_text()
        try:
            yield
        finally:
            tuner.unfold_text()

    @torch.no_grad()
    def generate(
        self,
        samples: Sequence[Sample] | Batch,
        max_new_tokens: int | None = None,
        streamer: Any = None,
        num_beams: int = 1,
        loader: MediaLoader | None = None,
        folded: bool = True,
    ) -> list[str]:
        """The answers to samples (whose own answers, if any, are not read) or to a left-padded batch; greedy or beams.

        `max_new_tokens`: None = the run's `evaluation.max_new_tokens`, so that every use gives the same answer.
        `loader` opens the samples' media instead of the processor's own. `folded`: see `folded()`, which for a large
        LLM is best entered once around many calls. Raises BadSample for unusable samples.
        """
        batch = self.prompt_batch(samples, loader) if not isinstance(samples, Mapping) else samples
        settings = self._generation_config(max_new_tokens, num_beams)
        was_training, shipped = self.training, self.base_llm.generation_config
        self.eval()
        self.base_llm.generation_config = settings  # transformers takes what is unset from there
        try:
            with self.folded() if folded else nullcontext():
                ids = self.llm.generate(
                    inputs_embeds=self.embed(batch),
                    attention_mask=batch["attention_mask"].to(self.device),
                    generation_config=settings,
                    streamer=streamer,
                )
        finally:
            self.base_llm.generation_config = shipped
            self.train(was_training)
        if max_new_tokens is None:
            self._tell_of_cut(ids, settings.max_new_tokens)
        return [self.decode(row.tolist()).strip() for row in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens up to the one that ends the answer, which a tokenizer may not call special."""
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        return self.processor.renderer.decode(ids[:end])

    def _tell_of_cut(self, ids: Tensor, most: int) -> None:
        """Once a model: an answer that has not ended may be cut in the middle of a word, at a length nobody asked for."""
        cut = ids.shape[1] >= most and not {*ids[:, -1].tolist()} <= {*self.end_ids, self.processor.pad_id}
        if cut and not self.told_of_cut:
            self.told_of_cut = True
            log.warning("note: an answer was cut at %d tokens (evaluation.max_new_tokens, or --max-new-tokens)", most)

    def prompt_batch(self, samples: Sequence[Sample], loader: MediaLoader | None = None) -> Batch:
        """Samples as a left-padded batch of prompts."""
        processor = self.processor if loader is None else self.processor.with_loader(loader)
        examples = [processor(sample, for_generation=True) for sample in samples]
        return collate(examples, self.processor.pad_id, side="left")

    def _generation_config(self, max_new_tokens: int | None, num_beams: int) -> Any:
        """Plain greedy or beam search, nothing of the defaults that chat LLMs ship with."""
        from transformers import GenerationConfig

        evaluation = self.config.evaluation if self.config else EvaluationConfig()
        return GenerationConfig(
            max_new_tokens=evaluation.max_new_tokens if max_new_tokens is None else max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            pad_token_id=self.processor.pad_id,
            eos_token_id=self.end_ids or None,
        )

    # ---- use -------------------------------------------------------------------------------------------

    @classmethod
    def from_run(
        cls, run: str | Path, base: str | None = None, device: torch.device | str | None = None
    ) -> MultimodalLM:
        """The trained model of a run folder, ready to answer; `base` replaces the LLM's path of its config."""
        from mokamm.build import load_run

        return load_run(run, base, device)

    def chat(
        self,
        question: str = "",
        *,
        video: Paths = None,
        image: Paths = None,
        audio: Paths = None,
        speech: Paths = None,
        history: Sequence[Message] = (),
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        streamer: Any = None,
    ) -> str:
        """The answer to one question about any media files of the user's; `history` are the turns before it."""
        message = user_message(question, video=video, image=image, audio=audio, speech=speech)
        if not message.content:
            raise UserError("nothing was asked: give a question, a spoken one (speech=...) or both")
        sample = Sample(id="chat", messages=(*history, message))
        limits = self.processor.loader.limits
        loader = MediaLoader(Path.cwd(), limits, allow_outside=True)
        return self.generate([sample], max_new_tokens, streamer, num_beams, loader)[0]


MARKER = re.compile(r"\s*\{(video|image|audio|speech)\}\s*")  # spaces around a marker are not the question's


def user_message(
    question: str, *, video: Paths = None, image: Paths = None, audio: Paths = None, speech: Paths = None
) -> Message:
    """A user's turn: media stand before the question, or where it says `{video}`, `{image}`, `{audio}` or `{speech}`.

    The question's text gives the keys of the cross-modal attention, as in the training rows. Raises UserError for a marker
    without a file.
    """
    given = {"video": video, "image": image, "audio": audio, "speech": speech}
    waiting = {name: _media(name, paths) for name, paths in given.items()}
    content: list[Text | Media] = []
    for i, piece in enumerate(MARKER.split(question.strip())):
        if i % 2 == 0:
            content += [Text(piece, question=True)] if piece.strip() else []
        elif waiting.get(piece):
            content.append(waiting[piece].pop(0))
        else:
            raise UserError(f"the question says {{{piece}}}, but no file is left for it; give one more --{piece} FILE")
    return Message("user", (*(media for left in waiting.values() for media in left), *content))


def _media(name: str, paths: Paths) -> list[Media]:
    kind, modality = MEDIA[name]
    listed = [] if paths is None else [paths] if isinstance(paths, str | Path) else paths
    return [Media(kind, str(Path(path).absolute()), modality) for path in listed]


def _distinct(items: Sequence[MediaInput]) -> tuple[Sequence[MediaInput], list[int] | None]:
    """Items without those whose features another one has (several questions about one clip), and for each segment of
    all items its place among those that remain; None where all remain."""
    kept: list[MediaInput] = []
    starts: dict[str | int, int] = {}
    segments: list[int] = []
    count = 0
    for item in items:
        name = id(item) if item.key is None else item.key
        if name not in starts:
            starts[name] = count
            kept.append(item)
            count += len(item.counts)
        segments += range(starts[name], starts[name] + len(item.counts))
    return (items, None) if len(kept) == len(items) else (kept, segments)


def _stack(items: Sequence[MediaInput], device: torch.device) -> tuple[Tensor, Tensor]:
    """All segments of a modality: features (N,P,C) and mask (N,P), padded to the longest P (cached ones may differ)."""
    features = [item.features for item in items if item.features is not None]
    masks = [item.mask for item in items if item.mask is not None]
    longest = max(mask.shape[1] for mask in masks)
    pad = nn.functional.pad
    features_NPC = torch.cat([pad(f.to(device), (0, 0, 0, longest - f.shape[1])) for f in features])
    mask_NP = torch.cat([pad(m.to(device), (0, longest - m.shape[1])) for m in masks])
    return features_NPC, mask_NP


def _is_sharded(projector: Projector) -> bool:
    """Whether ZeRO-3 gathers its weights from all ranks when it is called, so that all must call it, in validation too."""
    return any(hasattr(parameter, "ds_id") for parameter in projector.parameters())


@contextmanager
def _given(head: nn.Module | None, rows: Tensor) -> Iterator[None]:
    """Within, an LLM's head is given these rows (N,) of its input (B,T,D), as (1,N,D); not one that is told of (B,T)."""

    def pick(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or inputs[0].dim() != 3:  # asked in a way of its own
            return None
        return inputs[0].flatten(0, 1).index_select(0, rows)[None], *inputs[1:]

    hook = None if head is None or isinstance(head, RoutedLinear) else head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        if hook:
            hook.remove()


def _idle(projector: Projector, device: torch.device) -> Tensor:
    """A zero that every parameter of an absent modality's projector has part in."""
    features = torch.zeros(1, 1, projector.in_features, device=device)
    zero = projector(features, torch.ones(1, 1, dtype=torch.bool, device=device)).sum() * 0
    boundaries = projector.start_end()
    return zero if boundaries is None else zero + boundaries.sum() * 0
