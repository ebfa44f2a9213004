"""The house rules: who imports whom, what an import costs, what the public door shows."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import raywb

ROOT = Path(raywb.__file__).parent
REPOSITORY = ROOT.parent


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of the code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(module: str) -> set[str]:
    return {
        str(path.relative_to(REPOSITORY))
        for path in modules("raywb", "recipes")
        if any(name == module or name.startswith(module + ".") for name in imports_of(path))
    }


def test_the_public_door_is_complete_and_sorted() -> None:
    """Every public name can be had, and the list is sorted."""
    assert raywb.__all__ == sorted(raywb.__all__)
    for name in raywb.__all__:
        assert getattr(raywb, name) is not None
    assert set(raywb.__all__) <= set(dir(raywb))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        raywb.nothing  # noqa: B018 - the access is the test


def test_only_the_sink_and_the_hook_touch_wandb() -> None:
    """Nobody but the processes of sink, fleet collector and charts has to do with wandb."""
    assert importers("wandb") == {
        "raywb/charts/views_process.py",
        "raywb/fleet/wandb_runs.py",
        "raywb/service/transaction_log.py",
        "raywb/service/wandb_sink.py",
        "raywb/service/wandb_updates.py",
    }


def test_only_the_hook_and_the_recipes_touch_xenna() -> None:
    """cosmos_xenna is imported by raywb.xenna and the recipes alone."""
    allowed = {name for name in importers("cosmos_xenna") if name.startswith("raywb/xenna")}
    others = importers("cosmos_xenna") - allowed
    assert all(name.startswith("recipes/") for name in others)


def test_client_and_service_do_not_import_each_other() -> None:
    """They share rows, journals on disk, reports and settings.

    Only raywb.cluster knows both, to make the actor; the command works without a cluster, and the
    page reads what the service wrote.
    """
    importing = {name for name in importers("raywb.service") if "/service/" not in name}
    assert {name for name in importing if "/view/" not in name} == {
        "raywb/cli.py",
        "raywb/cluster.py",
        "raywb/launch/left_here.py",
    }
    assert all(
        name.startswith(("raywb/view/history/", "raywb/view/page/", "raywb/view/report/"))
        for name in importing
        if "/view/" in name
    )
    client_side = {f"raywb.{name}" for name in ("client", "connection", "shipping")}
    client_side |= {"raywb.cluster", "raywb.lifecycle", "raywb.orphans", "raywb.sweep"}
    for path in modules("raywb/service"):
        assert not imports_of(path) & client_side, path


def test_only_settings_reads_the_environment() -> None:
    """Environment variables are read in one place of the package."""
    readers = {
        str(path.relative_to(ROOT))
        for path in modules("raywb")
        if re.search(r"os\.(environ|getenv)", path.read_text())
    }
    assert readers == {"settings.py"}


def test_an_import_costs_and_changes_nothing(tmp_path: Path) -> None:
    """`import raywb` and attach's own modules load no heavy package and leave no trace."""
    code = """
import json, os, sys, threading
before = dict(os.environ)
import raywb
same = dict(os.environ) == before
light = sorted(set(sys.modules) & {"wandb", "torch", "pynvml", "cosmos_xenna", "ray"})
import ray  # which writes to the environment itself
before = dict(os.environ)
raywb.attach, raywb.start, raywb.Client
heavy = sorted(set(sys.modules) & {"wandb", "torch", "pynvml", "cosmos_xenna"})
print(json.dumps([light, heavy, same and dict(os.environ) == before, threading.active_count(),
                  os.listdir(".")]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    light, heavy, same_environment, threads, files = json.loads(done.stdout)
    assert light == heavy == files == []
    assert same_environment
    assert threads == 1  # ray's own import starts none either


@pytest.mark.parametrize("path", modules("raywb", "recipes"), ids=lambda path: path.stem)
def test_names_and_sizes(path: Path) -> None:
    """No file is called after nothing in particular, and each can be read in one sitting."""
    forbidden = {"utils", "util", "helpers", "helper", "common", "core", "manager", "misc"}
    assert path.stem not in forbidden
    assert len(path.read_text().splitlines()) <= 600
    assert path.read_text().startswith('"""') or not path.read_text()


def pages() -> list[Path]:
    """Every page of the project; environments lie in hidden directories."""
    found = (path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("README.md"))
    return sorted(page for page in found if not any(part[0] == "." for part in page.parts))


@pytest.mark.parametrize("page", pages(), ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of every page leads to a file."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (REPOSITORY / page).read_text()):
        if "://" not in target:
            assert (REPOSITORY / page.parent / target).exists(), f"{page}: {target}"
