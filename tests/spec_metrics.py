"""The names of SPEC D, once: what the run, the JSONL and the rows of a pipeline must have."""

from __future__ import annotations

#: Of a pipeline, at every snapshot.
PIPELINE_METRICS = frozenset(
    {
        "pipeline_duration_s",
        "main_loop_rate_hz",
        "progress",
        "num_input_remaining",
        "num_outputs",
        "inputs_processed_per_s",
        "outputs_per_s",
        *(
            f"cluster/{of}_{what}"
            for of in ("total", "avail")
            for what in ("cpus", "gpus", "mem_gb")
        ),
    }
)

#: Of each stage, below ``stage/<name>/``, at every snapshot.
STAGE_METRICS = frozenset(
    {
        *(f"actors_{state}" for state in ("target", "ready", "running", "idle", "pending")),
        "tasks_completed",
        "tasks_returned_none",
        "queue_in",
        "queue_out",
        "slots_used",
        "slots_empty",
        "resource/cpu_util_pct",
        "resource/mem_gb",
        "resource/actor_count",
    }
)

#: Of a stage once it is known, so not at every snapshot.
STAGE_SPEED = "speed_tasks_per_s"
