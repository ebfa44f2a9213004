"""One W&B run for a whole Ray cluster: nothing lost, nothing in the way.

training workers      xenna driver        stage scripts
       └───────────────────┼──────────────────┘
                    client.py          attach() → Client.log(): appends, and returns
                           │
                    journal.py         one per process, outlives it
                           │
                    shipping.py        a thread, HTTP; Ray only tells where
─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─│─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
                    service/ingest.py  inside the actor "raywb": detached, head, 0 CPU
                           │
                    service/ledger.py  everything received, once, durable
                           │
                    service/merge.py   rows get their names and axes
                           │
                    service/outbox.py  finished rows, numbered, per W&B run
                           │
                    service/wandb_sink.py  W&B, in a child process per run

import raywb

raywb.start(project="demo")                    # once, in the driver
client = raywb.attach("training/operator")     # in any task, actor or driver
client.log({"loss": 0.5}, step=100)
raywb.finish()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raywb.errors import RaywbError

if TYPE_CHECKING:
    from raywb import xenna
    from raywb.children import inject_group, runtime_env
    from raywb.client import Client
    from raywb.lifecycle import attach, finish, start, status
    from raywb.logger import WandbLogger
    from raywb.nodes.compute import collect_compute_metadata
    from raywb.reports import RunInfo
    from raywb.settings import Settings

__all__ = [
    "Client",
    "RaywbError",
    "RunInfo",
    "Settings",
    "WandbLogger",
    "attach",
    "collect_compute_metadata",
    "finish",
    "inject_group",
    "runtime_env",
    "start",
    "status",
    "xenna",
]

__version__ = "0.1.0"

#: Where each public name lives; they are imported at first use, so that ``import raywb`` costs
#: next to nothing in a process that only passes it on.
_HOMES = {
    "Client": "raywb.client",
    "attach": "raywb.lifecycle",
    "collect_compute_metadata": "raywb.nodes.compute",
    "finish": "raywb.lifecycle",
    "inject_group": "raywb.children",
    "runtime_env": "raywb.children",
    "start": "raywb.lifecycle",
    "status": "raywb.lifecycle",
    "WandbLogger": "raywb.logger",
    "RunInfo": "raywb.reports",
    "Settings": "raywb.settings",
}

#: Public modules, imported at first use. Of these the two for Ray's own libraries need them
#: installed (``ray[train]``, ``ray[tune]``), so they are not among the names of the door.
_ROOMS = ("log_handler", "ray_train", "ray_tune", "xenna")


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"raywb.{name}")
    raise AttributeError(f"module 'raywb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
