"""An optimized BLAS for MLX's CPU build on Linux, which otherwise uses the reference BLAS (30 times slower).

A shim that forwards ``cblas_sgemm``, ``cblas_dgemm`` and ``cblas_cgemm`` to OpenBLAS is loaded into the global
namespace before MLX is imported. It is compiled once into the user's cache; without a compiler or the library the
loader uses MLX's own BLAS and reports it.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

REFERENCE = "reference (slow: install a C compiler and the scipy-openblas32 package)"

_SHIM = r"""
/* CBLAS entry points under their plain names, for a library whose own are prefixed. */
#define GEMM_REAL(name, T) \
  extern void scipy_##name(int, int, int, int, int, int, T, const T *, int, const T *, int, T, T *, int); \
  void name(int o, int ta, int tb, int m, int n, int k, T al, const T *a, int la, const T *b, int lb, T be, \
            T *c, int lc) \
  { scipy_##name(o, ta, tb, m, n, k, al, a, la, b, lb, be, c, lc); }
GEMM_REAL(cblas_sgemm, float)
GEMM_REAL(cblas_dgemm, double)
extern void scipy_cblas_cgemm(int, int, int, int, int, int, const void *, const void *, int, const void *, int,
                              const void *, void *, int);
void cblas_cgemm(int o, int ta, int tb, int m, int n, int k, const void *al, const void *a, int la, const void *b,
                 int lb, const void *be, void *c, int lc)
{ scipy_cblas_cgemm(o, ta, tb, m, n, k, al, a, la, b, lb, be, c, lc); }
"""


def install() -> str:
    """Load OpenBLAS for MLX; call before mlx is imported. Returns a description of the BLAS in use."""
    if sys.platform == "darwin":
        return "Accelerate"
    try:
        import scipy_openblas32
    except ImportError:
        return REFERENCE
    library = Path(scipy_openblas32.get_lib_dir()) / "libscipy_openblas.so"
    try:
        shim = _built(library)
        # OpenBLAS first and globally, so that the shim finds it without a path of its own (paths may contain spaces)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.SubprocessError):
        return REFERENCE
    return f"OpenBLAS ({os.environ.get('OPENBLAS_NUM_THREADS', 'default')} threads)"


def _built(library: Path) -> Path:
    """The compiled shim, built when missing; several loaders may race, the last rename wins."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mlxrack", "blas")
    stamp = hashlib.sha256(f"{_SHIM}{library.stat().st_size}".encode()).hexdigest()[:12]
    shim = folder / f"libmlxrack-blas-{stamp}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for one in (folder.parent, folder):
        _take(one)
    if shim.is_file() and not shim.is_symlink() and shim.stat().st_uid in (0, os.geteuid()):
        return shim
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, made = Path(scratch, "shim.c"), Path(scratch, "shim.so")
        source.write_text(_SHIM)
        command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", str(made), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        with contextlib.suppress(FileExistsError):
            made.rename(shim)
    return shim


def _take(folder: Path) -> None:
    """Nobody else may put a library there that we would run. Raises OSError for another user's folder."""
    seen = os.lstat(folder)
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid not in (0, os.geteuid()):
        raise OSError(errno.EPERM, "another user's", str(folder))
    if seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        folder.chmod(0o700)
