"""Which machine is asked for, which are offered, and what they cost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raywb.errors import NoOffer
from raywb.launch.vast.client import asking

__all__ = ["DEFAULT_IMAGE", "Offer", "Wanted", "find_offers"]

#: Has Python 3.11, torch and CUDA; the project is installed beside them.
DEFAULT_IMAGE = "pytorch/pytorch:2.7.1-cuda12.8-cudnn9-runtime"

#: Most offers that are looked at.
MOST_OFFERS = 10

_CUDA = re.compile(r"cu(?:da)?-?(\d+\.\d+)")


@dataclass(frozen=True)
class Wanted:
    """The machine that is asked for.

    Attributes:
        gpu_names: any of these, as Vast.ai writes them, with blanks.
        gpu_count: this many.
        max_price: dollars an hour, the disk among it.
        disk_gb: its size, which cannot be changed later.
        image: the container's; a CUDA version in its tag asks for a driver that has it.
        regions: two-letter codes of countries; empty for everywhere.
        reliability: the least share of time that the machine was there, 0 to 1.
        number: this offer and no other.
    """

    gpu_names: Sequence[str]
    gpu_count: int
    max_price: float
    disk_gb: float
    image: str
    regions: Sequence[str] = ()
    reliability: float = 0.98
    number: int | None = None

    def query(self) -> dict[str, dict[str, Any]]:
        """The conditions in the words of Vast.ai's search (``POST /api/v0/bundles/``)."""
        conditions: dict[str, dict[str, Any]] = {
            "verified": {"eq": True},
            "rentable": {"eq": True},
            "rented": {"eq": False},
            "external": {"eq": False},
            "gpu_name": {"in": [name.replace("_", " ") for name in self.gpu_names]},
            "num_gpus": {"eq": self.gpu_count},
            "dph_total": {"lte": self.max_price},
            "disk_space": {"gte": self.disk_gb},
            "reliability": {"gte": self.reliability},
        }
        if found := _CUDA.search(self.image):
            conditions["cuda_max_good"] = {"gte": float(found[1])}
        if self.regions:
            conditions["geolocation"] = {"in": [name.upper() for name in self.regions]}
        return conditions

    def in_words(self) -> str:
        """The same for a person."""
        where = f" in {', '.join(name.upper() for name in self.regions)}" if self.regions else ""
        names = " or ".join(name.replace("_", " ") for name in self.gpu_names)
        return (
            f"{self.gpu_count} x {names}{where}, {self.disk_gb:g} GB of disk, at most "
            f"{self.max_price:.2f} $/h, there at least {self.reliability:.1%} of the time"
        )


@dataclass(frozen=True)
class Offer:
    """One machine that is to be had.

    Attributes:
        number: what accepts it.
        price: dollars an hour, with the disk that was asked for.
        download_price: dollars for a GB that comes in; None where it is not told.
    """

    number: int
    machine: str
    price: float
    download_price: float | None = None

    def in_words(self) -> str:
        """What it is, and what it costs."""
        traffic = ""
        if self.download_price:
            traffic = f", and {self.download_price:.3f} $ for each GB that it downloads"
        return f"{self.machine}: {self.price:.3f} $/h, {self.price * 24:.2f} $ a day{traffic}"


def find_offers(client: Any, wanted: Wanted) -> list[Offer]:
    """The cheapest offers, the cheapest one first.

    Raises:
        NoOffer: there is none.
        LaunchError: Vast.ai cannot be asked.
    """
    with asking("search for offers"):
        rows = client.search_offers(
            query=wanted.query(), order="dph_total", limit=MOST_OFFERS, storage=wanted.disk_gb
        )
        found = [_offer(row) for row in rows]
    if wanted.number is not None:
        found = [one for one in found if one.number == wanted.number]
    if not found:
        one = f"offer {wanted.number} is not among" if wanted.number else "there are no"
        raise NoOffer(
            f"{one} offers of {wanted.in_words()}: a higher --max-price, another --gpu, more "
            "--region or a lower --reliability may find one"
        )
    return found


def _offer(row: dict[str, Any]) -> Offer:
    memory_gb = float(row.get("cpu_ram") or 0) / 1000
    parts = [
        f"{row['num_gpus']} x {row['gpu_name']}",
        f"{float(row.get('cpu_cores_effective') or 0):.0f} CPUs, {memory_gb:.0f} GB",
        str(row.get("geolocation") or "place unknown"),
    ]
    traffic = row.get("inet_down_cost")
    return Offer(
        number=int(row["id"]),
        machine=f"offer {row['id']}, {', '.join(parts)}",
        price=float(row["dph_total"]),
        download_price=None if traffic is None else float(traffic),
    )
