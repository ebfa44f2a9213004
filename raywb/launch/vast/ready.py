"""Whether this environment can end the instance, asked before there is anything to lose.

usage: python -m raywb.launch.vast.ready WORDS…, those for `raywb shutdown`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Read the arguments as the end will, and import what it will need.

    Raises:
        ImportError: Vast.ai's client or that of the store for the outputs is not installed.
        ValueError: nobody knows such an address.
        click.UsageError: this version of raywb does not take these arguments.
    """
    import vastai  # noqa: F401

    from raywb.launch.shutdown.command import shutdown

    asked = shutdown.make_context("raywb shutdown", list(arguments)).params
    if (url := asked.get("upload_to")) is not None:
        import fsspec

        fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))


if __name__ == "__main__":
    main(sys.argv[1:])
