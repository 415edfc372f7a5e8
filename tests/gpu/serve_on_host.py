"""`python -m service` for a machine without a GPU: bundles for CUDA go all their way, on the host's memory.

Nothing but CUDA's own library and kernels is another here: states, buckets, captures, the sampler's graphs and the
engine are those of a GPU, in sessions on the CPU, which has kernels for fp16 and none for bf16.
"""

import sys

from service.__main__ import main
from service.engine import assembly
from service.engine.device import HostDevice

if __name__ == "__main__":
    assembly.CudaDevice = HostDevice
    sys.exit(main())
