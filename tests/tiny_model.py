"""Makes a model folder small enough for any test and valid for mlx-lm."""

import importlib
import json
from pathlib import Path
from typing import Any

VOCABULARY = 260
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 257,
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


MAMBA = {
    "model_type": "mamba",
    "hidden_size": 32,
    "intermediate_size": 64,
    "state_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
}
"""A recurrent model: its state cannot be trimmed by tokens."""
SLIDING = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 24,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 32,
}
"""A model that mixes full attention with sliding windows."""
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
"""A template that opens the reasoning, as reasoning models' templates do."""


def write_tiny_model(
    folder: Path, *, seed: int, config: dict[str, Any] | None = None, template: str = TEMPLATE, thinks: bool = False
) -> None:
    """Random weights from ``seed``, a byte-level tokenizer with a few special tokens, a chat template."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    mx.random.seed(seed)
    whole: dict[str, Any] = {**CONFIG, **(config or {})}
    family = importlib.import_module(f"mlx_lm.models.{whole['model_type']}")
    model = family.Model(family.ModelArgs.from_dict(whole))
    shapes: Any = tree_flatten(model.parameters())
    weights = {name: mx.random.normal(value.shape) * 0.3 for name, value in shapes}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(whole))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|unk|>", "<|end|>", *(["<think>", "</think>"] if thinks else [])]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template,
        "eos_token": "<|end|>",
        "unk_token": "<|unk|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
