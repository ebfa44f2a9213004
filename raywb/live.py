"""What the newest rows of a run say: pipelines, stages that train, nodes; for those who watch.

All views show this: the terminal, the web page and Ray's dashboard. It is made of the rows that
W&B gets, so none of them knows more, or something else, than W&B does.
"""

from __future__ import annotations

import msgspec

__all__ = ["Live", "NodeUsage", "PipelineProgress", "PipelineStageProgress", "StageProgress"]


class PipelineStageProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of a xenna pipeline, as its newest snapshot says.

    Attributes:
        name: as in the metrics' keys: ``bin_idx_tokenization_stage``.
        tasks_completed: tasks that came back.
        tasks_known: those, and the ones that are known to come; it grows while the stage before
            this one works.
        queue_in, queue_out: tasks that wait in front of it, and results behind it.
        slots_used, slots_empty: slots of its actors that hold a task, and that do not.
        actors_ready, actors_pending: actors that can work, and that are being set up.
        speed_tasks_per_s: of one actor; None while unknown.
        cpu_percent, memory_gb: what its actors use together; None where the row does not say.
        is_bottleneck: it holds the pipeline up.
    """

    name: str
    tasks_completed: int
    tasks_known: int
    queue_in: int
    queue_out: int
    slots_used: int
    slots_empty: int
    actors_ready: int
    actors_pending: int
    speed_tasks_per_s: float | None = None
    cpu_percent: float | None = None
    memory_gb: float | None = None
    is_bottleneck: bool = False


class PipelineProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One xenna pipeline, as its newest snapshot says.

    Attributes:
        name: its namespace among the keys: ``xenna``, ``xenna/sft_2``.
        run: number of the run that it logs to.
        state: ``running``, ``done`` (everything is worked off) or ``failed``.
        percent: how much of the work is done, 0–100.
        duration_s: how long it has been running, in seconds.
        inputs_left, outputs: inputs not yet taken in, and what has left the last stage.
        inputs_per_s, outputs_per_s: the two rates; None while unknown.
        stages: in their order in the pipeline.
        error: what ended it, in one sentence, when it failed.
        time_s: when the snapshot was taken, in seconds since the epoch.
    """

    name: str
    run: int
    state: str
    percent: float
    duration_s: float
    inputs_left: int
    outputs: int
    stages: list[PipelineStageProgress]
    time_s: float
    inputs_per_s: float | None = None
    outputs_per_s: float | None = None
    error: str | None = None


class StageProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of the user's own that logs rows: a training, a validation, anything.

    Attributes:
        stage: its namespace among the keys: ``training/pretrain``.
        run: number of the run that it logs to.
        step: the step of its newest row; None where its rows have none.
        steps_per_s: over the latest rows; None while they are of one moment.
        metrics: the newest value of each number below the namespace, by key without it; the
            first of them by the order in which they came, when there are very many.
        main: which of them is drawn: its loss where it has one, else the first.
        history: values of that one over the whole run so far, evenly thinned, oldest first.
        ranks: how many ranks the newest row was made of; None where it is of no ranks.
        slowest_rank, rank_spread_s: which came last, and by how much, in seconds.
        time_s: when the newest row was logged, in seconds since the epoch.
    """

    stage: str
    run: int
    step: float | None
    steps_per_s: float | None
    metrics: dict[str, float]
    main: str | None
    history: list[float]
    time_s: float
    ranks: int | None = None
    slowest_rank: int | None = None
    rank_spread_s: float | None = None


class NodeUsage(msgspec.Struct, frozen=True, kw_only=True):
    """How busy one node is, as its agent last said.

    Attributes:
        name: the node's name among the series, as in :class:`raywb.reports.NodeStatus`.
        values: percentages and the rest by the keys of the ``nodes/<name>/`` series:
            ``cpu_percent``, ``memory_percent``, ``gpu_percent``, ``gpu_memory_percent`` …
        time_s: when it was read, in seconds since the epoch.
        stale: later readings of other nodes came without this one, or none has come for some
            intervals.
    """

    name: str
    values: dict[str, float]
    time_s: float
    stale: bool = False


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """The newest state of everything that logs rows.

    Attributes:
        pipelines: those that run first, then those that ended; of each the one with the newest
            row first.
        stages: by their newest row, the latest to come first.
        nodes: by name; empty on clusters so large that rows hold means only.
        all_nodes: what rows say of all nodes together: ``mean/cpu_percent``, ``answered`` … by
            the key behind ``nodes/``. When none has come for some intervals: ``alive``, and
            ``answered`` as 0.
        series: how many series there are.
        untracked_series: series beyond the limit that are in W&B, and not in here; at least.
        more_pipelines, more_stages: how many there are beside those that are listed.
        dropped_stages: those of them that made room for others, or found none; their rows are in
            W&B, and not in here.
    """

    pipelines: list[PipelineProgress] = []
    stages: list[StageProgress] = []
    nodes: list[NodeUsage] = []
    all_nodes: dict[str, float] = {}
    series: int = 0
    untracked_series: int = 0
    more_pipelines: int = 0
    more_stages: int = 0
    dropped_stages: int = 0
