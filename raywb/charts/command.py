"""``raywb charts``: makes the recommended W&B charts, or brings them up to date."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from raywb.charts.saving import DEFAULT_TITLE

if TYPE_CHECKING:
    from raywb.reports import Status

__all__ = ["charts"]


@click.command()
@click.option(
    "--project", help="W&B project; by default WANDB_PROJECT, else that of the cluster's run."
)
@click.option(
    "--entity",
    help="W&B team or user; by default WANDB_ENTITY, else that of the run, else the key's own.",
)
@click.option(
    "--stage",
    "stages",
    multiple=True,
    help="A stage to be charted over its own step; by default the training stages of the cluster's "
    "run, or the recipes' where no cluster is asked.",
)
@click.option("--title", default=DEFAULT_TITLE, show_default=True, help="The view's name.")
@click.option("--timeout-s", default=60.0, show_default=True, help="Longest that W&B may take.")
def charts(
    project: str | None,
    entity: str | None,
    stages: tuple[str, ...],
    title: str,
    timeout_s: float,
) -> None:
    """Save the recommended charts as a view of the project in W&B.

    Pipeline, cluster, stages, nodes, training and delivery. Called again it brings that view up to
    date, and leaves alone what you added to it. A cluster is asked only where neither --project
    nor WANDB_PROJECT names a project: with one of them no Ray is needed.
    """
    import msgspec

    from raywb.charts.saving import save_charts, stages_of
    from raywb.settings import process_environment, resolve

    settings = resolve(overrides={"project": project, "entity": entity})
    status = None
    if settings.project is None:
        status = _status()
        run = status.run
        if run.mode != "online":
            settings = msgspec.structs.replace(settings, mode=run.mode)
        settings = msgspec.structs.replace(
            settings, project=run.project, entity=settings.entity or run.entity
        )
    saved = save_charts(
        settings,
        process_environment(),
        stages=list(stages) or stages_of(status),
        title=title,
        timeout_s=timeout_s,
    )
    what = "made" if saved.is_new else "up to date"
    click.echo(f"✓ {saved.panels} charts {what}: {saved.url}")


def _status() -> Status:
    """The service's status on the cluster that the command names.

    Raises:
        NoClusterError: there is none.
        ServiceUnavailable: no service runs on it, or it does not answer.
    """
    import raywb
    from raywb.cli import _connect

    _connect()
    return raywb.status()
