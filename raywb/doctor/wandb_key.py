"""W&B's key and server: is there a key where the service runs, and is it let in?"""

from __future__ import annotations

from raywb.doctor.findings import Finding, trouble, warning, well
from raywb.doctor.look import ServerLook, WandbLook

__all__ = ["check_key", "check_server"]

KEY, SERVER = "W&B key", "W&B server"


def check_key(
    here: WandbLook, head: WandbLook | None, mode: str | None, *, handed_over: bool = False
) -> list[Finding]:
    """Whether the process that needs the key finds one: the service, which runs on the head.

    Args:
        here: W&B as this process sees it.
        head: as a process on the head sees it; None without a cluster.
        mode: of the run that there is, or that the environment asks for; None leaves it to the
            key.
        handed_over: the service has one, whoever gave it.
    """
    looked, place = (here, "here") if head is None else (head, "on the head node")
    if mode in ("offline", "disabled"):
        return [well(KEY, f"none is needed: the run is {mode}")]
    put = (
        "put it where the service finds it at each start, on the head: "
        f"`wandb login --host {looked.base_url}` there (netrc), WANDB_API_KEY in the environment "
        "of `ray start --head`, or `raywb.start(api_key_file=…)`; never into a runtime_env, which "
        "everybody can read"
    )
    if looked.key is not None:
        found = f"found {place} in {looked.key.origin}"
        if looked.key.problem is None:
            return [well(KEY, found)]
        return [
            trouble(
                KEY,
                f"{found}, but {looked.key.problem}",
                f"copy it again from {looked.base_url}/authorize (or your server's), and {put}",
            )
        ]
    if handed_over or (head is not None and here.key is not None):
        origin = f"found here in {here.key.origin}" if here.key else "handed over by a driver"
        return [
            warning(
                KEY,
                f"{origin}, not on the head node, where the service runs",
                "raywb.start() hands over the key of its own process, but a service that is made "
                f"by an attach(), or started again after its cluster was, has none: {put}",
            )
        ]
    found = f"none for {looked.base_url} {place}"
    if mode == "online":
        return [trouble(KEY, found, f"rows wait on disk until there is one: {put}")]
    return [
        warning(KEY, found, f"runs are offline without one, and `raywb sync DIR` sends them: {put}")
    ]


def check_server(
    look: WandbLook, entity: str | None, place: str, mode: str | None
) -> list[Finding]:
    """Whether W&B's server answers, takes the key, and lets it write to the entity.

    Args:
        look: W&B as the process sees it that has to reach it.
        entity: team or user that runs go to; None is the key's own.
        place: where that process is, as a part of a sentence.
        mode: as for :func:`check_key`; a server that nobody needs may be out of reach.
    """
    if look.server is None:
        return [well(SERVER, "not asked: the run is offline")]
    server, url = look.server, look.base_url
    is_needed = mode == "online" or (mode is None and look.key is not None)
    if not server.reached:
        say = trouble if is_needed else warning
        return [
            say(
                SERVER,
                f"{url} cannot be reached {place}: {server.error}",
                f"`curl -sS {url}/graphql` there shows the same: open the way (HTTPS_PROXY in the "
                "environment of `ray start --head`, the firewall), or correct WANDB_BASE_URL; "
                "with WANDB_MODE=offline nothing is sent, and `raywb sync DIR` sends it later",
            )
        ]
    if look.key is None:
        return [well(SERVER, f"{url} answers {place}; without a key it was asked no more")]
    if server.accepted is False:
        return [
            trouble(
                SERVER,
                f"{url} does not accept the key of {look.key.origin} ({server.error})",
                f"make a new one on {url}/authorize and replace it there; WANDB_BASE_URL has to "
                "be the server that the key is of. Rows are safe on disk until then",
            )
        ]
    if server.accepted is None:
        return [
            warning(
                SERVER,
                f"{url} answers, but not well: {server.error}",
                "rows wait on disk while it is so; look at https://status.wandb.com, or ask "
                "whoever runs the server",
            )
        ]
    return [_writable(server, url, entity)]


def _writable(server: ServerLook, url: str, entity: str | None) -> Finding:
    known = ", ".join(server.entities) or "nobody"
    if entity and entity not in server.entities and entity != server.username:
        return warning(
            SERVER,
            f"{url} knows {server.username}, who is no member of {entity} (but of {known})",
            f"correct WANDB_ENTITY, or let an administrator of {entity} invite {server.username}: "
            "a run in a foreign entity is refused (403)",
        )
    return well(SERVER, f"{url} knows {server.username}, who may write to {known}")
