"""Pretrains the miniature LLM on text about worlds; loss on the assistant's turns only.

About 40 minutes on one core. Goes on from its last state after an interruption (the state lies in the work folder).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.miniworld.scene import BASE
from mokamm.mini.architecture import new_llm, save_llm, train_tokenizer
from mokamm.mini.text import Turns, corpus, document

BATCH = 16
PEAK_RATE = 2e-3


def encode(tokenizer: object, turns: Turns) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation in the chat template, and which of them bear loss."""
    ids, loss = [1], [False]
    for user, assistant in turns:
        prompt = [4, *tokenizer(user)["input_ids"], 2, 5]  # type: ignore[operator]
        answer = [*tokenizer(assistant)["input_ids"], 2]  # type: ignore[operator]
        ids += prompt + answer
        loss += [False] * len(prompt) + [True] * len(answer)
    return ids, loss


def _batch(tokenizer: object, step: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng([17, step])
    rows = sorted((encode(tokenizer, document(rng, BASE)) for _ in range(2 * BATCH)), key=lambda row: len(row[0]))
    half = int(rng.integers(2))  # the shorter or the longer half: less padding
    rows = rows[half * BATCH : (half + 1) * BATCH]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(BATCH, length, dtype=torch.long)
    labels = torch.full((BATCH, length), -100)
    for i, (row, loss) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.where(torch.tensor(loss), torch.tensor(row), -100)
    return ids, labels


def train(folder: Path, work: Path, minutes: float) -> dict[str, float]:
    """Train for about `minutes`; the learning rate falls to zero with the time that is used up."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(corpus(3000, BASE, seed=0))
    model = new_llm(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05, foreach=True)
    state = work / "language.pt"
    step, used = 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, used = saved["step"], saved["used"]
    losses: list[float] = []
    while used < 60 * minutes:
        began = time.monotonic()
        rate = PEAK_RATE * min(1.0, (step + 1) / 100) * max(0.01, 1 - used / (60 * minutes))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = _batch(tokenizer, step)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        loss = F.cross_entropy(model.lm_head(hidden[wanted != -100]), wanted[wanted != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step, used = step + 1, used + time.monotonic() - began
        if step % 50 == 0:
            print(json.dumps({"step": step, "minutes": round(used / 60, 2), "loss": round(float(np.mean(losses[-50:])), 4)}), flush=True)
        if step % 250 == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "used": used}, state)
    save_llm(model, tokenizer, folder / "llm")
    return {"steps": step, "minutes": used / 60, "loss": float(np.mean(losses[-50:]))}
