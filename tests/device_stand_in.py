"""A device that is not there: tensors on it, its streams and events, with torch's interface.

No test machine has a GPU. What stands here in for ``torch`` is this module: a tensor on the
device ``standin`` finds ``device_stand_in.standin`` as a CUDA tensor finds ``torch.cuda``. What
is queued is done when the test says so, and asking a tensor for its value before is an error,
since that is the wait that must not happen.
"""

from __future__ import annotations

import numpy


class Device:
    """The device's queue; ``done`` counts how much of it is computed."""

    type = "standin"

    def __init__(self) -> None:
        self.queued = 0
        self.done = 0
        self.broken = False
        self.capturing = False

    def compute(self, count: int | None = None) -> None:
        """Do that many further pieces of work; all of them by default."""
        self.done = self.queued if count is None else min(self.done + count, self.queued)


DEVICE = Device()


class Tensor:
    """One element on the device, computed at its place in the queue."""

    shape = ()
    device = DEVICE

    def __init__(self, value: float) -> None:
        self.value = value
        DEVICE.queued += 1

    def detach(self) -> Tensor:
        return self

    def to(self, where: str, *, non_blocking: bool) -> numpy.float64:
        assert (where, non_blocking) == ("cpu", True)
        return numpy.float64(self.value)

    def item(self) -> float:
        raise AssertionError("item() waits for the device")


class Event:
    def record(self, stream: Device) -> None:
        assert stream is DEVICE
        DEVICE.queued += 1
        self.place = DEVICE.queued

    def query(self) -> bool:
        assert not DEVICE.capturing, "this would end the capture"
        if DEVICE.broken:
            raise RuntimeError("device-side assert triggered")
        return DEVICE.done >= self.place


class standin:
    """What ``torch.cuda`` is to a CUDA tensor."""

    Event = Event

    @staticmethod
    def current_stream(device: Device) -> Device:
        return device

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return DEVICE.capturing
