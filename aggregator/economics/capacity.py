"""What a node can carry: memory, and tokens per second of a model class and a mix of tokens. Pure.

Speed and memory are those of aggregator/intake.py, so that a purchase and the first placement agree.
"""

import re

import msgspec

from aggregator import intake
from shared import chips
from shared.errors import Refused

MONTH_H = 730.5
MONTH_S = MONTH_H * 3600
CLASSES = {
    "8B": (8.03, 8.03, 128.0, "llama-3.1-8b"),
    "14B": (14.77, 14.77, 160.0, "qwen3-14b"),
    "20B-A4B": (20.91, 3.61, 39.0, "gpt-oss-20b"),
    "30B-A3B": (30.53, 3.35, 96.0, "qwen3-30b-a3b"),
    "32B": (32.76, 32.76, 256.0, "qwen3-32b"),
    "70B": (70.55, 70.55, 320.0, "llama-3.3-70b"),
    "120B-A5B": (116.8, 5.13, 58.5, "gpt-oss-120b"),
}
"""Model classes by an example: billions of parameters and of active ones, KiB of KV cache per token, the example's name
at API hosts."""
_INSTEAD = "give node-price and watts, with memory and a measured node-tok-s"
_SIZE = re.compile(r"(\d{1,5}(?:\.\d+)?)B(?:-A(\d{1,5}(?:\.\d+)?)B)?")


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """The mix: shares of prompt and answer tokens, together 1, and the share of prompt tokens that repeats."""

    prompt: float
    answer: float
    cached: float


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The model that takes over the work. ``example`` is the name at API hosts of an open model of its class."""

    name: str
    params_b: float
    active_b: float
    kv_kib_per_tok: float
    bits: float = chips.BITS_PER_WEIGHT
    example: str = ""

    @property
    def need_bytes(self) -> int:
        """Peak memory of one loader."""
        weights_gb = self.params_b * self.bits / 8
        asked = intake.Model(name=self.name, weights_gb=weights_gb, kv_kib_per_tok=self.kv_kib_per_tok)
        return intake.need_bytes(asked, None)


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """The node to buy."""

    chip: str
    memory_gb: float

    @property
    def machine(self) -> intake.Machine:
        """As the first placement takes it."""
        return intake.Machine(id="node", chip=self.chip, memory_gb=self.memory_gb, kind="other")

    @property
    def budget_bytes(self) -> int:
        """Its memory budget for models."""
        return intake.budget_bytes(self.machine)


def bought(name: str, memory_gb: float, busy: float = 1.0) -> tuple[float | None, float | None, tuple[str, ...]]:
    """List price (USD) and watts at this busy share of the mini or Studio with a chip and so much memory, each None
    without a public figure; and what is said of both. Raises Refused for a chip that the table does not know, or no
    such Mac."""
    chip = chips.find(name)
    if chip is None:
        raise Refused(f"economics: {chips.unknown(name)}; {_INSTEAD}")
    mac = chips.desktop(chip)
    if mac is None:
        raise Refused(f"economics: no mini or Studio has {chip.name}; {_INSTEAD}")
    if memory_gb not in mac.memory_gb:
        held = ", ".join(map(str, mac.memory_gb))
        raise Refused(f"economics: a {mac.name} with {chip.name} has {held} GB; give one of them as memory")
    price, told = chips.price(mac, memory_gb)
    return price, mac.watts(busy), (told, chips.power(mac))


def model(name: str) -> Model:
    """A model of a class like 8B or 235B-A22B; one that the table lacks has the KV cache of the nearest in size. Raises
    Refused."""
    match = _SIZE.fullmatch(name.upper())
    sizes = (float(match[1]), float(match[2] or match[1])) if match else (0.0, 0.0)
    if not 0 < sizes[1] <= sizes[0]:
        raise Refused(f"economics: model-class {name!r}; give a size like 27B or 235B-A22B, or {', '.join(CLASSES)}")
    if name.upper() in CLASSES:
        params_b, active_b, kv, example = CLASSES[name.upper()]
        return Model(name=name.upper(), params_b=params_b, active_b=active_b, kv_kib_per_tok=kv, example=example)
    near = min(CLASSES.values(), key=lambda one: abs(one[0] - sizes[0]))
    return Model(name=name.upper(), params_b=sizes[0], active_b=sizes[1], kv_kib_per_tok=near[2])


def node_tok_s(model: Model, work: Work, node: Node) -> tuple[float, str]:
    """Tokens (prompt and answer) per second that a node computes if it works all the time, and from what."""
    chip = intake.chip_of(node.machine)
    load = intake.Workload(model="model", qps=0, prompt_tok=work.prompt, answer_tok=work.answer, cached=work.cached)
    seconds = intake.request_s(load, model.active_b * 1e9 * model.bits / 8, chip, model.bits)
    unsure = f" ({chips.UNCONFIRMED})" if "tflops" in chip.unconfirmed else ""
    return 1 / seconds, (
        f"estimated: prefill by the {chip.name}'s {chip.tflops:.1f} TFLOPS{unsure}, decode by its "
        f"{chip.bandwidth_gb_s:g} GB/s with {intake.BATCHED:g} requests in a batch"
    )
