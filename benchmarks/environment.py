"""The machine and versions of a measurement: the head of every result file."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

import paper_layers

_FOLDER = Path(paper_layers.__file__).resolve().parent.parent


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return versions, processor and date."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "paper_layers": paper_layers.show_config().replace(f"{_FOLDER}{os.sep}", "").splitlines(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # Before the run: on a busy machine, times mean little.
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
