"""torch is asked for the GPUs in a process of its own, and only for so long."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from raywb.nodes import torch_devices
from raywb.nodes.nvml import Gpu
from raywb.nodes.torch_devices import ask

#: A torch that sees two GPUs: no GPU can be had here, and the real one would see none.
TWO_GPUS = """
import os, sys
print("a library that talks on stdout")
sys.stderr.write("and on stderr")
class cuda:
    @staticmethod
    def device_count():
        open(os.environ["ASKED"], "a").write("x")
        return 2
    @staticmethod
    def get_device_properties(ordinal):
        class device:
            name, total_memory, major, minor = "NVIDIA H100 80GB HBM3", 85520809984, 9, 0
            multi_processor_count, uuid = 132, f"uuid-{ordinal}"
        return device
"""


def fake(folder: Path, source: str) -> dict[str, str]:
    """An environment in which `import torch` runs this source."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text(source)
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(folder),
        "ASKED": str(folder / "asked"),
    }


def test_what_torch_sees(tmp_path: Path) -> None:
    """The devices come back with all that torch knows, whatever else it prints; once a life."""
    environment = fake(tmp_path, TWO_GPUS)
    expected = tuple(
        Gpu(place, f"uuid-{place}", "NVIDIA H100 80GB HBM3", 85520809984, 9, 0, 132)
        for place in range(2)
    )
    assert ask(environment) == expected
    assert ask(environment | {"WANDB_GROUP": "g"}) == expected
    assert (tmp_path / "asked").read_text() == "x"
    assert ask(environment | {"CUDA_VISIBLE_DEVICES": "0"}) == expected
    assert (tmp_path / "asked").read_text() == "xx"
    assert "torch" not in sys.modules or not hasattr(sys.modules["torch"], "asked")


def test_a_torch_that_hangs(tmp_path: Path) -> None:
    """After the time limit its process is ended, and there is no answer."""
    pid = tmp_path / "pid"
    source = f"import os, signal\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\nsignal.pause()"
    environment = fake(tmp_path / "path", source)
    before = time.monotonic()
    assert ask(environment, timeout_s=0.5) is None
    assert time.monotonic() - before < 5
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize(
    "source",
    [
        "raise ImportError('no CUDA')",
        "import os; os._exit(1)",
        "import os; os.abort()",
        "print('raywb-devices:[[1, 2'); raise SystemExit",
        "print('raywb-devices:7'); raise SystemExit",
    ],
)
def test_a_torch_that_fails(tmp_path: Path, source: str) -> None:
    """However it ends, there is no answer, and nothing is raised."""
    assert ask(fake(tmp_path, source)) is None


def test_nobody_to_ask(tmp_path: Path) -> None:
    """An interpreter that is not there is no answer."""
    assert ask({}, python=str(tmp_path / "python")) is None
    assert ask({"a": "\0"}, python=sys.executable, timeout_s=9) is None


def test_a_torch_without_cuda_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that is made for CPUs knows of no GPU, and none at all knows nothing."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not torch_devices.installed()
    for version, expected in [("2.13.0", True), ("2.13.0+cu126", True), ("2.13.0+cpu", False)]:
        metadata = tmp_path / version / "torch-1.dist-info/METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path / version)])
        assert torch_devices.installed() is expected
