"""Models as people run them on minis, quantised to 4 bits: their parameters, weights, and KV cache per token follow
from their published shapes. Rates and nodes are of a small rack; take what differs with ``msgspec.structs.replace``."""

from tests.made_loader import MadeModel

CHAT = MadeModel(
    name="chat",
    per_hour=420,
    prompt_tok=1_300,
    share=0.7,
    params=8.0e9,
    weights_bytes=4_520_000_000,
    kv_tok_bytes=131_072,
    rows=8,
    need_bytes=10_900_000_000,
    key="support",
)
"""Llama 3.1 8B."""
CODE = MadeModel(
    name="code",
    per_hour=64,
    prompt_tok=5_200,
    share=0.9,
    answer_tok=180,
    params=32.8e9,
    weights_bytes=18_450_000_000,
    kv_tok_bytes=262_144,
    rows=4,
    need_bytes=30_200_000_000,
)
"""Qwen3 32B."""
EXTRACT = MadeModel(
    name="extract",
    per_hour=700,
    prompt_tok=700,
    answer_tok=60,
    params=4.3e9,
    weights_bytes=2_600_000_000,
    kv_tok_bytes=139_264,
    rows=8,
    need_bytes=6_400_000_000,
    key="etl",
)
"""Gemma 3 4B."""
LONG = MadeModel(
    name="long",
    per_hour=14,
    prompt_tok=12_000,
    answer_tok=420,
    share=0.35,
    params=14.8e9,
    weights_bytes=8_330_000_000,
    kv_tok_bytes=163_840,
    rows=2,
    need_bytes=21_800_000_000,
)
"""Qwen3 14B."""
TRANSLATE = MadeModel(
    name="translate",
    per_hour=0.9,
    burst=8,
    prompt_tok=650,
    answer_tok=380,
    share=0.1,
    params=27.4e9,
    weights_bytes=15_600_000_000,
    kv_tok_bytes=507_904,
    rows=4,
    need_bytes=24_600_000_000,
    key="etl",
)
"""Gemma 3 27B."""

COMPARE = """\
[[compare]]
model = "chat"
same_as = "llama-3.1-8b-instruct"
frontier = "openai/gpt-4o"
[[compare]]
model = "code"
same_as = "qwen3-32b"
frontier = "anthropic/claude-sonnet-4-5"
[[compare]]
model = "extract"
same_as = "gemma-3-4b-it"
[[compare]]
model = "long"
same_as = "qwen3-14b"
[[compare]]
model = "translate"
same_as = "gemma-3-27b-it"
"""
"""What each is compared with: the same model at API hosts."""
