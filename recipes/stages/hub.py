"""Datasets of the Hugging Face hub, each held at one commit from the listing on.

    hf://[datasets/]ORG/NAME[@REVISION]              all data files of a dataset
    hf://[datasets/]ORG/NAME[@REVISION]/PATH         one file, a folder or a glob of it

The revision (main, unless another is named) is looked up once, and every file's address carries
the commit that was found: whatever is pushed while a recipe runs, it reads one state. A file's
version is its blob, so that a new commit makes no file anew that it left alone. Token and endpoint
are huggingface_hub's own affair (``HF_TOKEN``, ``HF_ENDPOINT``, ``hf auth login``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote

from recipes.errors import InputError
from recipes.stages.remote import RemoteSource
from recipes.stages.sources import StoredFile
from recipes.stages.store_errors import missing_package, told_clearly

__all__ = ["HubSource"]

_ADDRESS = re.compile(
    r"hf://(?:datasets/)?(?P<dataset>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/convert/[^/]+|refs/pr/\d+|[^/]+))?(?:/(?P<path>.*))?"
)
_OTHER_KINDS = ("models", "spaces", "buckets", "kernels")


class HubSource(RemoteSource):
    """Datasets of the hub; what a commit holds never changes."""

    #: Of a dataset's own folder: its card and its loading script are no data.
    left_out = (".md", ".py", ".rst")
    changes = False

    def list(self, location: str) -> Iterator[tuple[StoredFile, bool]]:
        """Yield the files of a dataset, or of a path in it, at the commit of now."""
        address = _ADDRESS.fullmatch(location.rstrip("/"))
        if address is None or address["dataset"].partition("/")[0] in _OTHER_KINDS:
            raise InputError(
                f"input.paths: {location} is no dataset; write hf://datasets/ORG/NAME, "
                "with @REVISION and /PATH behind it where wanted"
            )
        with told_clearly("list", location):
            commit = _commit(address["dataset"], address["revision"])
        pinned = f"hf://datasets/{address['dataset']}@{commit}"
        yield from super().list(f"{pinned}/{address['path']}" if address["path"] else pinned)


def _commit(dataset: str, revision: str | None) -> str:
    """Return the commit that a revision stands for now."""
    try:
        from huggingface_hub import HfApi, constants
    except ImportError as error:
        raise missing_package("hf", error) from error
    found = HfApi().dataset_info(
        dataset,
        revision=unquote(revision) if revision else None,
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )
    return str(found.sha)
