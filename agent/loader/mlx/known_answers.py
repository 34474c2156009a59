"""Answers of tiny models whose weights come from a seed, to compare this machine's MLX with one known to be right.

The record in known_answers.json was made by MLX's CPU build. Weights are bytes of SHAKE-256, which is the same
everywhere and in every version. Each device of this machine reads the recorded tokens, so that one near tie does not
change the rest.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cache, llama

RECORD = Path(__file__).with_name("known_answers.json")
CASES = {"float32": 0, "4-bit bfloat16": 4}
"""The models: bits of their weights, 0 for ones that are not quantized."""
PROMPTS_TOK = (1, 7, 64, 300)
STEPS = 8
TOP = 5
_VOCABULARY = 512
_SCALE = 0.12
_SETTINGS: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": _VOCABULARY,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def main(*, recording: bool = False) -> int:
    """Print one line of JSON: MLX's version, the record, and what each device of this machine answers; or,
    ``recording``, write the record."""
    if recording:
        RECORD.write_text(json.dumps(_answers(mx.Device(mx.cpu), None)) + "\n")
        return 0
    recorded = json.loads(RECORD.read_text())
    devices = {"gpu": mx.Device(mx.gpu), "cpu": mx.Device(mx.cpu)}
    names = ["gpu", "cpu"] if mx.default_device() == devices["gpu"] else ["cpu"]
    found = {name: _answers(devices[name], recorded) for name in names}
    version = getattr(mx, "__version__", "")
    print(json.dumps({"mlx": version, "recorded": recorded, "found": found}))
    return 0


def _answers(device: mx.Device, recorded: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """For each model and prompt: the most likely token at each step, the recorded ids looked at (or the most likely
    ones), and their logits."""
    found = []
    with mx.stream(device):
        for case, bits in CASES.items():
            model = _model(case, bits)
            for n, length in enumerate(PROMPTS_TOK):
                prompt = [token % _VOCABULARY for token in hashlib.shake_256(f"prompt {n}".encode()).digest(length)]
                entry: dict[str, Any] = {"case": case, "prompt_tok": length, "tokens": [], "ids": [], "logits": []}
                known = next((r for r in recorded or () if (r["case"], r["prompt_tok"]) == (case, length)), None)
                for token, ids, logits in _steps(model, prompt, known):
                    entry["tokens"].append(token)
                    entry["ids"].append(ids)
                    entry["logits"].append([round(float(one), 5) for one in logits])
                found.append(entry)
    return found


def _steps(
    model: llama.Model, prompt: list[int], known: dict[str, Any] | None
) -> Iterator[tuple[int, list[int], list[float]]]:
    """Prefill, then one token at a time."""
    states, tokens = cache.make_prompt_cache(model), prompt
    for step in range(STEPS):
        row = np.array(model(mx.array([tokens]), cache=states)[0, -1].astype(mx.float32))
        ids = known["ids"][step] if known else [int(one) for one in np.argsort(-row)[:TOP]]
        best = int(row.argmax())
        yield best, ids, [row[one] for one in ids]
        tokens = [known["tokens"][step] if known else best]


def _model(name: str, bits: int) -> llama.Model:
    model = llama.Model(llama.ModelArgs.from_dict(_SETTINGS))
    if bits:
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, group_size=64, bits=bits)
    shapes: Any = tree_flatten(model.parameters())
    model.update(tree_unflatten([(key, _weights(f"{name} {key}", value)) for key, value in shapes]))
    with contextlib.suppress(AttributeError):
        model.eval()
    return model


def _weights(name: str, like: mx.array) -> mx.array:
    """Packed numbers as they come; scales and offsets so that four bits cover what floating point does."""
    if name.endswith(".scales"):
        return mx.full(like.shape, _SCALE / 8, dtype=like.dtype)
    if name.endswith(".biases"):
        return mx.full(like.shape, -_SCALE, dtype=like.dtype)
    packed = like.dtype == mx.uint32
    raw = hashlib.shake_256(name.encode()).digest(like.size * (4 if packed else 1))
    if packed:
        return mx.array(np.frombuffer(raw, dtype="<u4").reshape(like.shape))
    spread = (np.frombuffer(raw, dtype=np.uint8).astype(np.float32) - 127.5) / 127.5
    weights = 1 + 0.1 * spread if "norm" in name else _SCALE * spread
    return mx.array(weights.reshape(like.shape)).astype(like.dtype)
