"""``python -P -m agent.loader --fd N --engine mlx --path MODEL``: started by the daemon, never by hand."""

import argparse
import os
import resource
import signal
import socket
import sys
from pathlib import Path

from agent.loader import blas
from agent.loader.disk_cache import DiskCache
from agent.loader.generation import Engine
from agent.loader.serve import serve
from agent.wire.progress import Progress


def main() -> int:
    """Serve one model on the socket that the daemon handed over."""
    parser = argparse.ArgumentParser(prog="agent.loader")
    parser.add_argument("--device", action="store_true", help="print MLX's device information and exit")
    parser.add_argument("--describe", default="", help="print what the probe of a chat template finds, and exit")
    parser.add_argument("--answers", action="store_true", help="print answers beside recorded ones, and exit")
    parser.add_argument("--fd", type=int, default=-1, help="descriptor of the connected Unix socket")
    parser.add_argument("--progress-fd", type=int, default=None, help="descriptor of the file that tells progress")
    parser.add_argument("--engine", choices=("mlx", "fake"), default="mlx")
    parser.add_argument("--path", default="", help="model folder")
    parser.add_argument("--rows", type=int, default=8, help="requests decoded together")
    parser.add_argument("--prefill-chunk", type=int, default=512, help="prompt tokens per step")
    parser.add_argument("--stall-s", type=float, default=0.75, help="longest wait of decoding rows for a prefill chunk")
    parser.add_argument("--cache-bytes", type=int, default=0, help="budget of the prompt cache")
    parser.add_argument("--max-tokens", type=int, default=4096, help="max_tokens for requests that set none")
    parser.add_argument("--kv-tok", type=int, default=8 * 2048, help="KV cache limit in tokens, all requests together")
    parser.add_argument("--reuse-bytes", type=int, default=256 << 20, help="freed buffers that MLX may keep for reuse")
    parser.add_argument("--disk-cache", default="", help="folder of the disk cache; its secret is read from stdin")
    parser.add_argument("--disk-cache-bytes", type=int, default=0, help="budget of the disk cache")
    parser.add_argument("--fingerprint", default="", help="model version that the disk cache's states belong to")
    for name in ("step-s", "row-s", "prefill-tps", "load-s"):
        parser.add_argument(f"--fake-{name}", type=float, default=0.0)
    for name in ("cache-tok", "held-bytes"):
        parser.add_argument(f"--fake-{name}", type=int, default=0)
    args = parser.parse_args()
    if args.device:
        from agent.loader.mlx import device

        return device.main()
    if args.describe:
        from agent.loader.mlx import describe

        return describe.main(args.describe)
    if args.answers:
        blas.install()
        from agent.loader.mlx import known_answers

        return known_answers.main()
    if args.fd < 0:
        parser.error("--fd is required")
    # a core file would contain prompts
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # a Ctrl-C in the terminal reaches the whole group; the daemon decides when a loader ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    status = serve(socket.socket(fileno=args.fd), lambda: _engine(args), Progress(args.progress_fd))
    sys.stdout.flush()
    return status


def _engine(args: argparse.Namespace) -> Engine:
    if args.engine == "fake":
        from agent.loader.fake_engine import FakeEngine, Pretence

        speed = Pretence(
            step_s=args.fake_step_s,
            row_s=args.fake_row_s,
            prefill_tps=args.fake_prefill_tps,
            cache_tok=args.fake_cache_tok,
            kv_tok=args.kv_tok,
        )
        return FakeEngine(
            speed, load_s=args.fake_load_s, salt=args.path, rows=args.rows, held_bytes=args.fake_held_bytes
        )
    from agent.files.model_folder import ModelFolder

    # mlx-lm and transformers open files by their names; the daemon's look at the folder may be hours old
    ModelFolder(Path(args.path), f"model folder {args.path}").check()
    name = blas.install()
    from agent.loader.mlx.encoder import EncoderEngine, is_encoder
    from agent.loader.mlx.engine import MLXEngine

    if is_encoder(args.path):
        return EncoderEngine(args.path, batch_tok=args.prefill_chunk, blas=name)
    return MLXEngine(
        args.path,
        rows=args.rows,
        prefill_chunk_tok=args.prefill_chunk,
        stall_s=args.stall_s,
        cache_bytes=args.cache_bytes,
        default_max_tokens=args.max_tokens,
        kv_tok=args.kv_tok,
        disk=_disk(args),
        reuse_bytes=args.reuse_bytes,
        blas=name,
    )


def _disk(args: argparse.Namespace) -> DiskCache | None:
    if not args.disk_cache_bytes:
        return None
    return DiskCache(Path(args.disk_cache), sys.stdin.buffer.read(), args.fingerprint, args.disk_cache_bytes)


if __name__ == "__main__":
    sys.exit(main())
