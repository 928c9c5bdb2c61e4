"""How much memory a training step takes: formulas alone, in bytes for each process. Nothing here imports torch.

    predict(weights, network, setting) -> Memory       weights, gradients, optimizer | activations, logits | encoders

States follow Rajbhandari et al., "ZeRO" (2020, arXiv 1910.02054), section 3: Adam keeps two moments, and beside 16-bit
weights a float32 copy; stage 1 shares out what the optimizer keeps, stage 2 the gradients too, stage 3 all weights. As
this code and DeepSpeed 0.19 really do it: frozen weights have weights only; DeepSpeed keeps its float32 copy beside
float32 weights as well from stage 1 on; DDP holds the gradients a second time, in its buckets.

Activations follow Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022, arXiv
2205.05198), section 4, counted anew for the layers of Llama and its kin (RMSNorm in float32, gated MLP), for frozen
weights (a frozen Linear keeps no input, its adapter does) and for autocast (every Linear casts its input for itself).

Within 15 % of what was measured for random Llamas (tests/mokamm/test_memory.py), rougher for other architectures. Not
in it: fragmentation, CUDA's context, NCCL. Letters: N = B * T places, D width, A = heads * head width, F intermediate,
V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

ADAM_MOMENTS = 8  # bytes an element: two float32 moments
MASTER = 4  # float32 copy of a weight
RECOMPUTED = 3  # tensors of width F that live at once within a layer's backward


@dataclass(frozen=True)
class Weights:
    """Elements of one part of the model that have one dtype. small: those in tensors that ZeRO-3 leaves whole."""

    part: str  # "llm", "adapter", "projector" or "encoder"; encoders are never sharded
    elements: int
    bytes_each: float  # of a quantized one 1, or about a half
    trained: bool
    small: int = 0


@dataclass(frozen=True)
class Media:
    """One modality of a sample, all segments full."""

    segments: int
    tokens: int  # of one segment
    kept: int  # elements that its projector keeps for the backward pass of one segment: Projector.kept


@dataclass(frozen=True)
class Network:
    """What of the LLM and its adapter decides the activations.

    inputs, distinct_inputs: the widths of what the trained Linears of a layer read, summed over all of them, and with
    what several read at once (q, k and v; gate and up) or what is kept anyway (the attention's output) counted once.
    outputs: what they write. changed: elements of their weights, where changed copies are kept (HiRA as PEFT has it).
    """

    layers: int
    width: int
    heads: int
    head_width: int
    intermediate: int
    vocabulary: int
    attention: str = "sdpa"
    gated: bool = True
    method: str = "moka"  # "moka", "lora", "dora", "hira", "full" or "none"
    rank: int = 0
    linears: int = 0  # adapted ones, of a layer
    inputs: int = 0
    distinct_inputs: int = 0
    outputs: int = 0
    changed: int = 0
    dropout: bool = False
    linear_elements: int = 0  # of all Linear weights, with the head and the adapter's
    weight_bytes: int = 4  # of an element of the LLM
    media: tuple[Media, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What a user can change. stage None: PyTorch without DeepSpeed."""

    batch: int
    length: int
    stage: int | None = None
    ranks: int = 1
    bf16: bool = False
    checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 0  # elements; DeepSpeed's reduce_bucket_size
    overlap: bool = False
    live: int = 10**9  # elements; stage3_max_live_parameters
    answers: float = 0.25  # share of places that bear loss
    on_cpu: bool = False  # offloading then moves nothing


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. host: of that, what offloading puts into the computer's memory instead of the GPU's."""

    frozen: float = 0.0
    trained: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    encoders: float = 0.0
    buffers: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


def predict(weights: Iterable[Weights], network: Network, setting: Setting) -> Memory:
    """The peak of a step: states, and the activations as they are when the backward pass begins."""
    weights = list(weights)
    states = _states(weights, setting)
    return replace(
        states,
        activations=activation_bytes(network, setting) + media_bytes(network, setting),
        logits=logit_bytes(network, setting),
        encoders=float(sum(w.elements * w.bytes_each for w in weights if w.part == "encoder")),
        buffers=states.buffers + working_bytes(network, setting),
    )


# ---- states ----------------------------------------------------------------------------------------------------------


def _states(weights: list[Weights], setting: Setting) -> Memory:
    """Weights, gradients, what the optimizer keeps, and DeepSpeed's buffers."""
    stage, n = setting.stage, setting.ranks
    own = [w for w in weights if w.part != "encoder"]
    if stage is not None and setting.bf16:
        own = [replace(w, bytes_each=min(w.bytes_each, 2)) for w in own]  # DeepSpeed casts all floats of the module
    frozen, trained = (float(sum(w.elements * w.bytes_each for w in own if w.trained is t)) for t in (False, True))
    elements = sum(w.elements for w in own if w.trained)
    if stage is None:  # torch.optim.AdamW: moments of the parameter's own dtype
        return Memory(frozen, trained, gradients=trained * (2 if n > 1 else 1), optimizer=2 * trained)
    each = 2 if setting.bf16 else 4
    master = MASTER if setting.bf16 or stage else 0
    shared = n if stage else 1
    found = Memory(
        frozen / (n if stage == 3 else 1),
        trained / (n if stage == 3 else 1),
        gradients=trained / (n if stage >= 2 else 1),
        optimizer=elements * (ADAM_MOMENTS + master) / shared,
        buffers=float(setting.bucket * each * (2 if setting.overlap else 1)),
    )
    if stage == 3:
        whole = min(sum(w.elements for w in own), setting.live) + sum(w.small for w in own)
        found = replace(found, buffers=found.buffers + whole * each)
    return found if setting.on_cpu else _offloaded(found, setting)


def _offloaded(found: Memory, setting: Setting) -> Memory:
    """Optimizer states and the gradients that feed them, and with stage 3 the weights, in the computer's memory."""
    if setting.offload_optimizer and setting.stage:
        found = replace(found, host=found.host + found.gradients + found.optimizer, gradients=0.0, optimizer=0.0)
    if setting.offload_parameters and setting.stage == 3:
        found = replace(found, host=found.host + found.frozen + found.trained, frozen=0.0, trained=0.0)
    return found


# ---- activations -----------------------------------------------------------------------------------------------------


def activation_bytes(network: Network, setting: Setting) -> float:
    """What the LLM's layers keep for the backward pass, without logits.

    With gradient checkpointing: the input of every layer, and one layer as a whole, which is being recomputed.
    """
    places = setting.batch * setting.length
    layer = _layer(network, setting)
    last = places * network.width * 4.0  # the last norm
    if network.method == "full":
        last += places * network.width * (_stream(network, setting) + _compute(network, setting))
    head = network.vocabulary * network.width
    casts = 2.0 * network.linear_elements if _casts_weights(network, setting) else 0.0
    if not setting.checkpointing:
        return network.layers * layer + last + casts
    casts = 2.0 * ((network.linear_elements - head) / network.layers + head) if casts else 0.0
    return network.layers * places * network.width * _stream(network, setting) + layer + last + casts


def _layer(network: Network, setting: Setting) -> float:
    """What one layer keeps."""
    e, places = _compute(network, setting), setting.batch * setting.length
    stream, attended = places * network.width, places * network.heads * network.head_width
    norms = 2 * stream * 4.0  # both RMSNorms compute in float32
    if network.method == "full":
        norms += 2 * stream * _stream(network, setting)  # a norm's own weight needs what it scales
    attention = 4 * attended * e  # q, k, v (k and v repeated for all heads), output
    squares = setting.batch * setting.length**2
    if network.attention == "eager":
        attention += network.heads * squares * (4 if e == 4 else 4 + e)  # the softmax in float32, and cast
    elif network.attention == "sdpa":
        attention += squares * e  # the mask, as numbers
    mlp = (3 if network.gated else 1) * places * network.intermediate * e  # gate, its activation, up
    return norms + attention + mlp + _inputs(network, setting)


def _inputs(network: Network, setting: Setting) -> float:
    """What a layer's trained Linears keep: their inputs, and what adapters compute in their rank.

    MokA (mokamm/adapters/routed_fast.py) keeps an input once for all that read it, cast or not, and of dropout the mask.
    """
    if network.method == "none":
        return 0.0
    e, places = _compute(network, setting), setting.batch * setting.length
    autocast = setting.bf16 and setting.stage is None
    if network.method == "moka":
        mask = network.inputs if network.dropout else 0
        return float(places * ((network.distinct_inputs + network.linears * network.rank) * e + mask))
    if network.method == "full":
        # q, k, v, gate and up cast the float32 stream for themselves under autocast
        apart = autocast and network.weight_bytes == 4
        kept = network.inputs - network.heads * network.head_width if apart else network.distinct_inputs
        return float(places * e * kept)
    cast = setting.stage is None and (autocast or network.weight_bytes != 4)  # adapters are float32 without DeepSpeed
    a = (2 if autocast else 4) if cast else e
    kept = network.inputs if cast or network.dropout else network.distinct_inputs
    mask = network.inputs * (a if setting.on_cpu else 1) if network.dropout else 0
    wide = 0 if network.method == "hira" else network.rank
    lengths = 2 * network.outputs if network.method == "dora" else 0  # both parts of what a length multiplies
    return float(places * (kept * a + mask + (network.linears * wide + lengths) * a) + network.changed * a)


def _compute(network: Network, setting: Setting) -> int:
    """Bytes of an element within attention and MLP."""
    return 2 if setting.bf16 else network.weight_bytes


def _stream(network: Network, setting: Setting) -> int:
    """Bytes of an element of the residual stream: autocast leaves it in the weights' dtype."""
    return network.weight_bytes if setting.stage is None else _compute(network, setting)


def _casts_weights(network: Network, setting: Setting) -> bool:
    """Whether autocast makes 16-bit copies of float32 weights, which the backward pass then reads."""
    return setting.bf16 and setting.stage is None and network.weight_bytes == 4


def logit_bytes(network: Network, setting: Setting) -> float:
    """Those of answers in float32, and their log-softmax (mokamm/model.py).

    The backward pass holds their gradients instead, which are as large.
    """
    return 8.0 * network.vocabulary * setting.batch * setting.length * setting.answers


def media_bytes(network: Network, setting: Setting) -> float:
    """What the projectors keep: every sample has one item of every modality, all of its segments full."""
    e = 2 if setting.bf16 and setting.stage is not None else 4
    return float(e * sum(setting.batch * m.segments * m.kept for m in network.media))


def working_bytes(network: Network, setting: Setting) -> float:
    """What exists for a moment in a layer's backward, as far as it exceeds the logits, which are gone by then."""
    e, places = _compute(network, setting), setting.batch * setting.length
    moment = RECOMPUTED * places * network.intermediate * e
    if network.attention == "eager":
        moment = max(moment, 2 * network.heads * setting.batch * setting.length**2 * 4)
    return max(0.0, moment - logit_bytes(network, setting))
