"""``make docs``: generates the table of docs/operating.md that says how much memory models need."""

import sys
from pathlib import Path

from agent.operator.recommended import CACHE_BYTES, CHUNK_TOK, MODELS, Recommended
from shared import chips
from shared.memory_plan import default_budget_bytes, kv_bytes, plan

PAGE = Path(__file__).parent.parent / "docs/operating.md"
BEGIN, END = "<!-- memory: generated -->\n", "\n<!-- memory: end -->"
USES = ((8, 2048), (1, 8192), (4, 8192), (1, 32768))
"""Requests at the same time, and tokens of each: the defaults of agent.toml first."""
SIZES_GB = sorted({gb for mac in chips.macs() if mac.kind != "other" for gb in mac.memory_gb if gb >= 16})
"""Memory of minis and Studios."""
KV_TOK = 1 << 14
"""Tokens over which the growth of the KV cache is measured, beyond any sliding window."""


def kv_kib_per_tok(model: Recommended) -> float:
    """KiB that a token adds to the KV cache of a long context."""
    shape = model.shape
    grown = [kv_bytes(shape, rows=1, row_tok=tok, chunk_tok=CHUNK_TOK) for tok in (KV_TOK, 2 * KV_TOK)]
    return (grown[1] - grown[0]) / KV_TOK / 1024


def need_bytes(model: Recommended, rows: int, row_tok: int) -> int:
    """Bytes planned for a loader."""
    sizes = {"rows": rows, "row_tok": row_tok, "chunk_tok": CHUNK_TOK, "cache_bytes": CACHE_BYTES}
    return plan(model.shape, model.weights_bytes, **sizes, fused=True).need_bytes


def smallest_gb(model: Recommended) -> str:
    """The smallest Mac whose memory budget holds the model as agent.toml's defaults plan it."""
    need = need_bytes(model, *USES[0])
    return next((f"{gb} GB" for gb in SIZES_GB if need <= default_budget_bytes(gb << 30)), "none")


def markdown() -> str:
    """The table."""
    uses = [f"{rows} x {tok:,}" for rows, tok in USES]
    head = ("Model", "Weights", "KV cache per token", *uses, f"Smallest Mac for {uses[0]}")
    rows = [
        (
            model.repo.partition("/")[2],
            f"{model.weights_bytes / 1e9:.1f} GB",
            f"{kv_kib_per_tok(model):.0f} KiB",
            *(f"{need_bytes(model, *use) / 1e9:.1f} GB" for use in USES),
            smallest_gb(model),
        )
        for model in MODELS
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def main() -> int:
    """Rewrite the generated part of the page."""
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(head + BEGIN + markdown() + END + rest.split(END.lstrip("\n"), 1)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
