"""The kinds of panels that the dashboards have, and the frame around them."""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24
"""Columns of a dashboard."""
RUNBOOK = "docs/operations.md"
"""Where the procedure of each alert is, under its name in small letters. See `deploy.grafana.generate`."""


@dataclass(frozen=True)
class Query:
    """An expression and what its lines are called (``{{label}}`` is a label's value)."""

    expression: str
    legend: str = ""


class Book:
    """Makes the panels of a dashboard.

    Args:
        runbook: document that links of panels lead to.
    """

    def __init__(self, runbook: str) -> None:
        self._runbook = runbook

    def graph(
        self,
        title: str,
        about: str,
        unit: str,
        *queries: Query,
        alerts: Sequence[str] = (),
        stacked: bool = False,
        limit: float | None = None,
        width: int = 8,
    ) -> timeseries.Panel:
        """Lines over time.

        Args:
            unit: Grafana's name of it.
            alerts: those that tell of what the panel shows.
            stacked: the lines are parts of a whole.
            limit: where an alert's line is.
            width: in columns of `WIDTH`.
        """
        panel = timeseries.Panel().title(title).description(about).datasource(SOURCE).unit(unit).span(width).height(8)
        panel = panel.min(0).fill_opacity(10 if not stacked else 40).line_width(1).links(self._links(alerts))
        if stacked:
            panel = panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
        if limit is not None:
            panel = panel.thresholds(_red_from(limit)).thresholds_style(
                common.GraphThresholdsStyleConfig().mode(shapes.GraphThresholdsStyleMode.DASHED)
            )
        legend = common.VizLegendOptions().show_legend(True).display_mode(shapes.LegendDisplayMode.LIST)
        panel = panel.legend(legend.placement(shapes.LegendPlacement.BOTTOM))
        for number, query in enumerate(queries):
            panel = panel.with_target(_target(query, number))
        return panel

    def number(
        self,
        title: str,
        about: str,
        unit: str,
        query: Query,
        *,
        alerts: Sequence[str] = (),
        red: float | None = None,
        width: int = 4,
    ) -> stat.Panel:
        """One number, as it is now; ``red`` is from where on it is bad."""
        panel = stat.Panel().title(title).description(about).datasource(SOURCE).unit(unit).span(width).height(4)
        panel = panel.links(self._links(alerts)).with_target(_target(query, 0).instant())
        panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        return panel if red is None else panel.thresholds(_red_from(red))

    def heat(
        self, title: str, about: str, unit: str, query: Query, *, alerts: Sequence[str] = (), width: int = 8
    ) -> heatmap.Panel:
        """How values are distributed over time, from a histogram's buckets."""
        panel = heatmap.Panel().title(title).description(about).datasource(SOURCE).span(width).height(8)
        color = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
        panel = panel.links(self._links(alerts)).calculate(False).color(color)
        panel = panel.y_axis(heatmap.YAxisConfig().unit(unit))
        return panel.with_target(_target(query, 0).format(PromQueryFormat.HEATMAP))

    def rows(self, title: str, about: str, query: Query, *, width: int = WIDTH) -> table.Panel:
        """Labels in columns, one row for each series."""
        panel = table.Panel().title(title).description(about).datasource(SOURCE).span(width).height(6)
        return panel.with_target(_target(query, 0).instant().format(PromQueryFormat.TABLE))

    def _links(self, alerts: Sequence[str]) -> list[Builder[models.DashboardLink]]:
        return [
            dashboard.DashboardLink(alert)
            .type(models.DashboardLinkType.LINK)
            .url(f"{self._runbook}#{alert.lower()}")
            .target_blank(True)
            for alert in alerts
        ]


def frame(name: str, title: str, about: str) -> dashboard.Dashboard:
    """A dashboard without panels: its variables, and links to the others."""
    made = dashboard.Dashboard(title).uid(f"deltamem-{name}").description(about).tags(["deltamem"])
    made = made.refresh("30s").time("now-1h", "now").timezone("browser").readonly()
    made = made.tooltip(models.DashboardCursorSync.CROSSHAIR)
    made = made.link(
        dashboard.DashboardLink("δ-mem")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags(["deltamem"])
        .as_dropdown(True)
        .keep_time(True)
        .include_vars(True)
    )
    made = made.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for variable, query in (
        ("job", "label_values(deltamem_up, job)"),
        ("instance", 'label_values(deltamem_up{job=~"$job"}, instance)'),
    ):
        made = made.with_variable(
            dashboard.QueryVariable(variable)
            .label(variable)
            .datasource(SOURCE)
            .query({"query": query, "refId": variable})
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(models.VariableOption(selected=True, text="All", value="$__all"))
        )
    return made


def row(title: str) -> dashboard.Row:
    """A heading."""
    return dashboard.Row(title)


def _target(query: Query, number: int) -> prometheus.Dataquery:
    made = prometheus.Dataquery().ref_id(chr(ord("A") + number)).expr(query.expression).datasource(SOURCE)
    return made.legend_format(query.legend or "__auto")


def _red_from(value: float) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(value=None, color="green"), models.Threshold(value=value, color="red")]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
