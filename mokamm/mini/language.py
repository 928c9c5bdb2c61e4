"""Pretrains the miniature LLM on text about worlds; the user's words weigh half of the assistant's in the
loss (scenes repeat themselves from moment to moment: to predict them is to learn to look back).

Two processes of one thread each (a small model gains little from threads), in bfloat16 where the processor has it (five
times faster matrix products; plain attention, whose backward pass is twice as fast as SDPA's at these lengths). Lengths
are rounded up, since oneDNN prepares each new shape anew. Goes on from its last state after an interruption (the state
lies in the work folder).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.miniworld.scene import BASE
from mokamm.mini.architecture import native_bfloat16, new_llm, save_llm, train_tokenizer
from mokamm.mini.text import Turns, corpus, document, told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 16
ROUND = 32  # tokens
PEAK_RATE = 3e-3
USER_WEIGHT = 0.5


def encode(tokenizer: object, turns: Turns) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation in the chat template, and which of them bear loss."""
    ids, loss = [1], [False]
    for user, assistant in turns:
        prompt = [4, *tokenizer(user)["input_ids"], 2, 5]  # type: ignore[operator]
        answer = [*tokenizer(" " + assistant)["input_ids"], 2]  # type: ignore[operator]
        ids += prompt + answer
        loss += [False] * len(prompt) + [True] * len(answer)
    return ids, loss


def _batch(tokenizer: object, step: int, rank: int, batch: int, progress: float) -> tuple[Tensor, Tensor]:
    """Token ids (B,T) and the weight of each in the loss (B,T)."""
    rng = np.random.default_rng([17, step, rank])
    documents = (encode(tokenizer, document(rng, BASE, progress)) for _ in range(2 * batch))
    rows = sorted(documents, key=lambda row: len(row[0]))
    half = int(np.random.default_rng([18, step]).integers(2))  # the shorter or the longer half: less padding
    rows = rows[half * batch : (half + 1) * batch]
    length = -(-max(len(ids) for ids, _ in rows) // ROUND) * ROUND
    ids = torch.zeros(batch, length, dtype=torch.long)
    weights = torch.zeros(batch, length)
    for i, (row, loss) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        weights[i, : len(row)] = torch.where(torch.tensor(loss), 1.0, USER_WEIGHT)
    return ids, weights


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=4)
    return [muon, torch.optim.AdamW(rest, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def _average_gradients(model: nn.Module) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _clock(used: float, began: float) -> tuple[float, float]:
    """Seconds used so far by the clock of rank 0, so that all ranks stop together; and now."""
    now = time.monotonic()
    seconds = torch.tensor(used + now - began, dtype=torch.float64)
    dist.broadcast(seconds, src=0)
    return seconds.item(), now


def _tokenizer(folder: Path, rank: int) -> PreTrainedTokenizerFast:
    """The tokenizer that the saved state was trained with, else a new one."""
    from transformers import PreTrainedTokenizerFast

    if rank == 0 and not folder.exists():
        train_tokenizer(corpus(3000, BASE, seed=0)).save_pretrained(folder)
    dist.barrier()
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _resume(state: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """The steps and seconds of the saved state, which model and optimizers take over; zeros where there is none."""
    if not state.exists():
        return 0, 0.0
    saved = torch.load(state, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    return saved["step"], saved["used"]


def train(folder: Path, work: Path, minutes: float) -> dict[str, float]:
    """Train for about `minutes`; the learning rate falls to zero over the second half of it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    tokenizer = _tokenizer(work / "tokenizer", rank)
    model = new_llm(len(tokenizer))
    model.set_attn_implementation("eager")
    optimizers = _optimizers(model)
    state = work / "language.pt"
    step, used = _resume(state, model, optimizers)
    losses: list[float] = []
    began = time.monotonic()
    native = native_bfloat16()
    while used < 60 * minutes:
        progress = used / (60 * minutes)
        rate = PEAK_RATE * min(1.0, (step + 1) / 100, max(0.01, 2 * (1 - progress)))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        ids, weights = _batch(tokenizer, step, rank, BATCH // world, progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=native):
            logits = model(input_ids=ids).logits[:, :-1]
        each = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (each * weight).sum() / weight.sum()
        answers = each.detach()[weight == 1.0].mean()
        loss.backward()
        _average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        losses.append(answers.item())
        step, used, began = step + 1, *_clock(used, began)
        if step % 200 == 0 and rank == 0:
            mean = round(float(np.mean(losses[-200:])), 4)
            print(json.dumps({"step": step, "minutes": round(used / 60, 2), "loss": mean}), flush=True)
        if step % 500 == 0 and rank == 0:
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"model": model.state_dict(), "optimizers": states, "step": step, "used": used}, state)
    if rank == 0:
        save_llm(model, tokenizer, folder / "llm")
    return {"steps": step, "minutes": used / 60, "loss": float(np.mean(losses[-50:]))}


@torch.no_grad()
def told_accuracy(folder: Path) -> float:
    """Share of answers to questions about 200 unseen scenes told in words that are right to the last token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rng, right, asked = np.random.default_rng(2**20), 0, 0
    for _ in range(200):
        turns = told(rng, BASE)
        ids, _ = encode(tokenizer, turns)
        guessed = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        end = 1
        for turn in turns:
            bears_loss = encode(tokenizer, [turn])[1][1:]
            start, end = end + bears_loss.index(True), end + len(bears_loss)
            if not turn[0].startswith("Describe"):
                asked += 1
                right += guessed[start - 1 : end - 1] == ids[start:end]
    return right / asked


def main() -> None:
    """Started by `build.py` through torchrun: FOLDER WORK MINUTES."""
    folder, work, minutes = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    dist.init_process_group("gloo")
    figures = train(folder, work, minutes)
    if dist.get_rank() == 0:
        figures["told_accuracy"] = told_accuracy(folder / "llm")
        (work / "language.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
