"""The stand-in for Vast's API, asked by the real client: what the tests of launches rest on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from vast_server import VastServer, offer

if not os.environ.get("CI"):
    pytest.importorskip("vastai", reason="vastai is not installed")


def test_an_instance_is_found_made_seen_and_destroyed(vast: VastServer) -> None:
    """The real client rents the cheapest offer, sees it load and run, reads its log, ends it."""
    from vastai import VastAI

    vast.loads, vast.lingers = 1, 1
    vast.offers.append(offer(14, dph_total=0.1, geolocation="Texas, US"))
    client = VastAI(api_key=vast.api_key, server_url=vast.url, quiet=True)
    query = {"gpu_name": {"in": ["RTX 4090"]}, "geolocation": {"in": ["SE"]}}
    found = client.search_offers(query=query, order="dph_total", storage=40)
    assert [one["id"] for one in found] == [11, 12]
    made = client.create_instance(11, image="debian", disk=40, env={"A": "b"}, ssh=True)
    number = made["new_contract"]
    assert made["success"]
    assert [client.show_instance(number)["actual_status"] for _ in range(2)] == [
        "loading",
        "running",
    ]
    assert client.show_instances()[0]["extra_env"] == {"A": "b"}
    vast.instances[number].log = "one\ntwo\n"
    assert client.logs(number, tail="1") == "two\n"
    own = VastAI(api_key=made["instance_api_key"], server_url=vast.url, quiet=True)
    assert own.destroy_instance(number)["success"]
    assert client.show_instance(number) is not None
    assert client.show_instance(number) is None
    assert vast.destroyed == [number]
    assert [one["id"] for one in client.search_offers(query=query)] == [12]


def test_an_instances_key_opens_that_instance_alone(vast: VastServer) -> None:
    """A key of one instance is refused for another one, for a list and for a search."""
    from vastai import VastAI

    one, other = vast.launch(), vast.launch()
    client = VastAI(api_key=one.key, server_url=vast.url, quiet=True)
    for ask in (
        lambda: client.destroy_instance(other.id),
        client.show_instances,
        lambda: client.search_offers(query={}),
    ):
        with pytest.raises(requests.HTTPError, match="401"):
            ask()
    assert set(vast.instances) == {one.id, other.id}


@pytest.mark.parametrize("fault", [401, 404, 500, "refuse", "pretend", "hang up"])
def test_it_misbehaves_as_told(vast: VastServer, fault: int | str) -> None:
    """A fault of the service reaches the real client as itself, and destroys nothing."""
    from vastai import VastAI

    instance = vast.launch()
    vast.misbehave("destroy", fault)
    client = VastAI(api_key=vast.api_key, server_url=vast.url, quiet=True)
    if isinstance(fault, int):
        with pytest.raises(requests.HTTPError, match=str(fault)):
            client.destroy_instance(instance.id)
    elif fault == "hang up":
        with pytest.raises(requests.ConnectionError):
            client.destroy_instance(instance.id)
    else:
        assert client.destroy_instance(instance.id)["success"] is (fault == "pretend")
    assert client.show_instance(instance.id)["actual_status"] == "running"
    vast.misbehave("destroy", None)
    assert client.destroy_instance(instance.id)["success"]


def test_the_command_line_destroys(vast: VastServer, tmp_path: Path) -> None:
    """`vastai destroy instance ID -y`, as a process, with the instance's own variables."""
    instance = vast.launch()
    kept = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "VAST_URL": vast.url}
    main = "import sys; from vastai.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", main, "destroy", "instance", str(instance.id), "-y"],
        env={**kept, "VAST_API_KEY": instance.environment["CONTAINER_API_KEY"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert f"destroying instance {instance.id}" in done.stdout, done.stderr
    assert vast.destroyed == [instance.id]
    assert [request.kind for request in vast.requests if request.key] == ["account", "destroy"]
