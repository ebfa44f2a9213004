"""Values that lie on a GPU or another device, taken to the host without waiting for the device.

A training step is queued on the device long before it is computed there. To ask such a tensor for
its value waits until all of it is done; a copy that is queued behind it costs some microseconds,
and an event says later that it has arrived. It has the value of this moment in the queue, also if
the tensor is overwritten afterwards.

torch is never imported: whoever has a tensor of it has imported it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

__all__ = ["Copies", "forget_devices", "is_on_device"]

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


#: Devices that were waited for in vain, and an event that they had not come to: nothing more is
#: queued there until they have.
_silent: dict[Any, Any] = {}


def forget_devices() -> None:
    """A forked child: it must not ask its parent's devices."""
    _silent.clear()


def _is_silent(device: Any) -> bool:
    """Whether a device was waited for in vain, and has not answered since."""
    event = _silent.get(device)
    if event is None:
        return False
    try:
        # From any thread: whoever would capture a graph there waits for the device himself.
        if not event.query():
            return True
    except RuntimeError:
        pass  # it has failed, as the copy that is tried next will say
    _silent.pop(device, None)
    return False


class Copies:
    """One-element tensors on their way to the host.

    To ask for an event while any thread captures a graph ends that capture, and only the thread
    that captures can know of it. So the thread that made the copies asks for them, and another
    one only where it has to.

    Args:
        values: the tensors, by key.

    Attributes:
        errors: why a value cannot be had, by key.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.errors: dict[str, str] = {}
        self._hosts: dict[str, Any] = {}
        self._events: list[tuple[Any, Any, Any]] = []
        self._thread = threading.current_thread()
        devices: dict[Any, Any] = {}
        for key, value in values.items():
            try:
                backend = _backend_of(value)
                if _is_capturing(backend):
                    self.errors[key] = "a graph is being captured on its device: log() after it"
                    continue
                if _is_silent(value.device):
                    self.errors[key] = "its device does not answer"
                    continue
                self._hosts[key] = value.detach().to("cpu", non_blocking=True)
                devices[value.device] = backend
            except (RuntimeError, ValueError, TypeError) as error:
                self.errors[key] = f"it cannot be copied from its device: {error}"
        for device, backend in devices.items():
            try:
                event = backend.Event()
                event.record(backend.current_stream(device))
                self._events.append((device, backend, event))
            except RuntimeError as error:
                self._fail(f"its device failed: {error}")

    def _fail(self, why: str) -> None:
        self.errors |= dict.fromkeys(self._hosts, why)
        self._hosts, self._events = {}, []

    def arrived(self, *, ask_from_any_thread: bool = False) -> bool:
        """Whether nothing more is under way; asks the device, and does not wait.

        Args:
            ask_from_any_thread: ask also if the thread that made the copies still runs.
        """
        mine = self._thread is threading.current_thread() or not self._thread.is_alive()
        if self._events and not mine and not ask_from_any_thread:
            return False
        try:
            while self._events:
                _, backend, event = self._events[-1]
                if _is_capturing(backend) or not event.query():
                    return False
                self._events.pop()
        except RuntimeError as error:
            self._fail(f"its device failed: {error}")
        return True

    @property
    def devices(self) -> set[Any]:
        """Those that it waits for."""
        return {device for device, _, _ in self._events}

    def give_up(self) -> None:
        """Wait no longer for what has not arrived."""
        if not self.arrived(ask_from_any_thread=True):
            self._fail("its device did not come to it in time")

    def give_up_devices(self) -> set[Any]:
        """The same, and queue nothing more on these devices until they answer; returns them."""
        devices = self.devices
        _silent.update({device: event for device, _, event in self._events})
        if devices:
            self._fail("its device did not come to it in time")
        return devices

    def items(self) -> Iterable[tuple[str, Any]]:
        """Key and Python value of what has arrived."""
        return [(key, host.item()) for key, host in self._hosts.items()]
