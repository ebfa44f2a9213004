"""``raywb grafana``: puts the dashboard where the Grafana of a Ray cluster looks for dashboards."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["grafana"]

#: Ray's own dashboards lie beside it; a second run replaces this file.
FILE_NAME = "raywb_grafana_dashboard.json"


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write it to this file instead, and ask no cluster; - prints it.",
)
def grafana(output: Path | None) -> None:
    """Add raywb's dashboard to those that Ray keeps for Grafana.

    Ray writes a configuration for Grafana on the head node, and dashboards of its own: a Grafana
    that was started with it shows raywb's within seconds. Ray writes all of it anew when the
    cluster starts, so call this once for each cluster; again, it replaces its own file only.
    """
    from raywb.view.grafana.dashboard import FILE
    from raywb.view.grafana.provisioning import find_grafana, write_dashboard

    text = FILE.read_text()
    if output is not None and str(output) == "-":
        click.echo(text, nl=False)
        return
    if output is not None:
        what = write_dashboard(output.absolute(), text)
        click.echo(f"✓ {what} {output}")
        click.echo("In Grafana: Dashboards → New → Import, and choose Ray's Prometheus.")
        return
    from raywb.cli import _connect

    _connect()
    found = find_grafana()
    path = found.dashboards / FILE_NAME
    what = write_dashboard(path, text)
    click.echo(f"✓ {what} {path}")
    click.echo(
        "A Grafana that runs with Ray's configuration shows it within seconds, in the folder Ray. "
        "Else start one on this machine, and Prometheus:\n"
        f"  prometheus --config.file={found.prometheus_config}\n"
        f"  grafana server --homepath /usr/share/grafana --config {found.grafana_config}"
    )
