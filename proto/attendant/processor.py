"""Which processor this is, as far as it can change the last bit of a result.

Export records the answer in a bundle and the service compares it with its own: integer kernels are replayed
bit for bit only where the same instructions are at hand.
"""

import platform
from pathlib import Path

# The instruction sets between which ONNX Runtime's CPU kernels choose.
_RELEVANT = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


def processor_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Return the machine's architecture and the instruction sets that ONNX Runtime's kernels choose between.

    Args:
        cpuinfo: the kernel's description of the processors; if it cannot be read only the architecture is
            known.
    """
    flags: set[str] = set()
    try:
        for line in cpuinfo.read_text(encoding="ascii", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass
    return (platform.machine(), *(name for name in _RELEVANT if name in flags))
