"""GPUs and their processes as the driver's NVML would tell of them, without a driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pynvml
import pytest

MIB = 1 << 20


class MadeNvml:
    """Answers instead of the driver; `calls` counts how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = 0
        self.names: Sequence[str] = ()
        self.driver = "580.95.05"
        self.used: Mapping[int, int | None] = {}
        self.processes: Sequence[tuple[int, int, str, int | None]] = ()
        self.error: Exception | None = None
        functions = {
            "nvmlInit": self._init,
            "nvmlShutdown": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: self.driver,
            "nvmlDeviceGetCount": lambda: len(self.names),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda index: self.names[index],
            "nvmlDeviceGetUUID": lambda index: f"GPU-{index:08d}-aaaa",
            "nvmlDeviceGetMemoryInfo": self._memory,
            "nvmlDeviceGetComputeRunningProcesses": self._processes,
            "nvmlSystemGetProcessName": self._name,
        }
        for name, function in functions.items():
            monkeypatch.setattr(pynvml, name, function)

    def show(
        self,
        *names: str,
        driver: str = "580.95.05",
        used: Mapping[int, int | None] | None = None,
        processes: Sequence[tuple[int, int, str, int | None]] = (),
    ) -> None:
        """Show these GPUs; MiB in use by index (None: not told), processes as index, pid, name, MiB."""
        self.names, self.driver, self.used, self.processes = names, driver, used or {}, processes

    def _init(self) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error

    def _name(self, pid: int) -> str:
        return next(name for _, number, name, _ in self.processes if number == pid)

    def _memory(self, index: int) -> SimpleNamespace:
        used = self.used.get(index, 1)
        if used is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=143771 * MIB, used=used * MIB)

    def _processes(self, index: int) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=None if mib is None else mib * MIB)
            for gpu, pid, _, mib in self.processes
            if gpu == index
        ]
