"""How long a process may live. Free of JAX: workers that score samples import this."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
_prctl: Any = (
    ctypes.CDLL(None).prctl if sys.platform == "linux" else None
)  # not looked up between a fork and what follows


def die_with(parent: int) -> None:
    """On Linux the kernel kills this process when its parent, the process `parent`, is gone, even by SIGKILL."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # gone before that
        os._exit(1)
