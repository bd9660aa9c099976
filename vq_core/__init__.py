"""The data plane of vq, compiled: rings, chains, ports and the worker loop.

Nothing here imports the control plane (`vq`). For Cython users the declarations in the .pxd files are the
reference; `get_include` names the directory of the C header that they need.
"""

import os
import sys

if sys.byteorder != "little":
    raise ImportError("vq_core runs on little-endian machines only: so are virtqueues since VIRTIO 1.0")


def get_include() -> str:
    """The directory of vq_core's C headers, for ``include_dirs`` of extensions that cimport vq_core."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "include")
