"""Room and rights where Ray, the journals and the service write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raywb.doctor.findings import Finding, counted, named, trouble, warning, well
from raywb.doctor.look import DiskLook

__all__ = ["check_disks"]

#: Less than this is as good as nothing: a worker's journal alone may hold 4 GB, in bytes.
TROUBLE_BYTES = 100_000_000

#: Less than this is soon used up, in bytes.
WARNING_BYTES = 5_000_000_000

#: Ray itself refuses to write objects to a disk that is fuller, as a share.
RAY_FULL_SHARE = 0.95

_ROOM = {
    "raywb's directory": "name a larger disk with RAYWB_DIR, or `raywb.start(dir=…)`",
    "the journals' directory": "name a larger disk with RAYWB_JOURNAL_DIR before `ray start`",
}
_RAYS_ROOM = (
    "remove old sessions (`ls -d /tmp/ray/session_*`), or `ray start --temp-dir=DIR` on a larger "
    "disk; RAYWB_JOURNAL_DIR, set before `ray start`, puts the journals elsewhere"
)


def check_disks(disks: Mapping[str, Sequence[DiskLook]]) -> list[Finding]:
    """One finding for each kind of trouble of a kind of place, else one for all.

    Args:
        disks: the places, by node.
    """
    found: dict[tuple[str, str], list[tuple[str, DiskLook]]] = {}
    for node, places in disks.items():
        for place in places:
            if kind := _kind(place):
                found.setdefault((kind, place.use), []).append((node, place))
    findings = [
        _finding(kind, use, hits, len(disks)) for (kind, use), hits in sorted(found.items())
    ]
    all_places = [place for places in disks.values() for place in places]
    if not findings and all_places:
        least = min(place.free_bytes for place in all_places)
        total = counted(len(all_places), "place")
        findings.append(well("disk", f"{total} can be written, at least {_gb(least)} free"))
    return findings


def _kind(place: DiskLook) -> str | None:
    if place.error is not None:
        return "1 cannot"
    if place.free_bytes < TROUBLE_BYTES:
        return "2 full"
    used = 1 - place.free_bytes / max(place.total_bytes, 1)
    if place.free_bytes < WARNING_BYTES or (
        used > RAY_FULL_SHARE and place.use == "Ray's session directory"
    ):
        return "3 little"
    return None


def _finding(kind: str, use: str, hits: list[tuple[str, DiskLook]], total: int) -> Finding:
    where = named([node for node, _ in hits], total)
    place = min((place for _, place in hits), key=lambda one: one.free_bytes)
    room = _ROOM.get(use, _RAYS_ROOM)
    if kind == "1 cannot":
        return trouble(
            "disk",
            f"{use} cannot be written {where}: {place.path}: {place.error}",
            f"rows logged there are counted as lost (`raywb/lost/disk_full`) or wait; make room, "
            f"or let the user that Ray runs as write there; else {room}",
        )
    text = f"{use} has {_gb(place.free_bytes)} of {_gb(place.total_bytes)} left {where}"
    text += f": {place.path}"
    if kind == "2 full":
        return trouble("disk", text, f"it will be full at once: make room, or {room}")
    return warning("disk", text, f"an outage of W&B's fills it: make room, or {room}")


def _gb(count_bytes: int) -> str:
    return f"{count_bytes / 1e9:.1f} GB" if count_bytes >= 1e8 else f"{count_bytes / 1e6:.1f} MB"
