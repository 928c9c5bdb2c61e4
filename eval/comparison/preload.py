"""All that a run imports, for the process from which runs are forked. Only imports: no thread may start, no GPU be
asked for, and no operator run, or a forked process could hang."""

# ruff: noqa: F401
import open_clip
import torch
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama
import transformers.models.whisper.modeling_whisper

import encoders.beats
import encoders.vision
import eval.run
import mokamm.build
import mokamm.report
import mokamm.train
import mokamm.training.loop
import mokamm.training.peers
