"""A run's config and summary, as a client sees them: write only, and later values win."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raywb.rows import ConfigUpdate, SummaryUpdate
from raywb.settings import as_mapping
from raywb.values import plain

if TYPE_CHECKING:
    from raywb.client import Client

__all__ = ["Config", "Summary"]


class Config:
    """The run's config."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def update(self, values: Mapping[str, Any], allow_val_change: bool = True) -> None:
        """Add values; OmegaConf objects and nested mappings will do.

        ``allow_val_change`` is there for those who come from ``wandb``; changes are allowed.
        """
        del allow_val_change
        connection, channel = self._client._connection, self._client._channel
        connection.say(ConfigUpdate(channel, plain(as_mapping(values))))

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})


class Summary:
    """The run's summary."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def update(self, values: Mapping[str, Any]) -> None:
        """Set values; keys get the stage as prefix."""
        connection, channel = self._client._connection, self._client._channel
        connection.say(SummaryUpdate(channel, plain(values)))

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})
