"""What a figure was measured on."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """Model of the CPU as far as the system tells, and its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
