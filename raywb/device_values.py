"""Values that lie on a GPU or another device, taken to the host without waiting for the device.

A training step is queued on the device long before it is computed there. To ask such a tensor for
its value waits until all of it is done; a copy that is queued behind it costs some microseconds,
and an event says later that it has arrived. It has the value of this moment in the queue, also if
the tensor is overwritten afterwards.

torch is never imported: whoever has a tensor of it has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["Copies", "is_on_device"]

#: Devices whose values are there at once, and the one without any.
_NOT_AWAY = ("cpu", "meta")


def is_on_device(value: Any) -> bool:
    """Whether it is a tensor of one element on a device that we can queue a copy on."""
    if isinstance(value, (bool, int, float, str)):
        return False
    try:
        kind = getattr(getattr(value, "device", None), "type", None)
        if not isinstance(kind, str) or kind in _NOT_AWAY:
            return False
        # A distributed tensor lies on several; only it knows how to come by its value.
        if any(size != 1 for size in value.shape) or hasattr(value, "device_mesh"):
            return False
        return _backend_of(value) is not None
    except Exception:  # noqa: BLE001 - somebody's own property; the look at the value tells
        return False


def _backend_of(value: Any) -> Any | None:
    """What ``torch.cuda`` is for a CUDA tensor; None where there is nothing like it."""
    for kind in type(value).__mro__:
        root = sys.modules.get(kind.__module__.partition(".")[0])
        backend = getattr(root, value.device.type, None)
        if hasattr(backend, "Event") and hasattr(backend, "current_stream"):
            return backend
    return None


def _is_capturing(backend: Any) -> bool:
    """Whether a graph is being captured, during which nobody may ask the device anything."""
    asked = getattr(backend, "is_current_stream_capturing", None)
    return asked is not None and bool(asked())


class Copies:
    """One-element tensors on their way to the host.

    Args:
        values: the tensors, by key.

    Attributes:
        errors: why a value cannot be had, by key.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.errors: dict[str, str] = {}
        self._hosts: dict[str, Any] = {}
        self._events: list[tuple[Any, Any]] = []
        devices: dict[Any, Any] = {}
        for key, value in values.items():
            try:
                backend = _backend_of(value)
                if _is_capturing(backend):
                    self.errors[key] = "a graph is being captured on its device: log() after it"
                    continue
                self._hosts[key] = value.detach().to("cpu", non_blocking=True)
                devices[value.device] = backend
            except (RuntimeError, ValueError, TypeError) as error:
                self.errors[key] = f"it cannot be copied from its device: {error}"
        for device, backend in devices.items():
            try:
                event = backend.Event()
                event.record(backend.current_stream(device))
                self._events.append((backend, event))
            except RuntimeError as error:
                self._fail(f"its device failed: {error}")

    def _fail(self, why: str) -> None:
        self.errors |= dict.fromkeys(self._hosts, why)
        self._hosts, self._events = {}, []

    @property
    def arrived(self) -> bool:
        """Whether nothing more is under way; asks the device, and does not wait."""
        try:
            while self._events:
                backend, event = self._events[-1]
                if _is_capturing(backend) or not event.query():
                    return False
                self._events.pop()
        except RuntimeError as error:
            self._fail(f"its device failed: {error}")
        return True

    def give_up(self) -> None:
        """Wait no longer for what has not arrived."""
        if not self.arrived:
            self._fail("its device did not come to it in time")

    def items(self) -> Iterable[tuple[str, Any]]:
        """Key and Python value of what has arrived."""
        return [(key, host.item()) for key, host in self._hosts.items()]
