"""How a submitted job ended, asked over Ray's job API: what the on-start script goes by.

usage: python -m raywb.launch.vast.job ADDRESS NAME [--wait]

It prints the exit code of the job's driver once the job has ended. `ray job submit` itself says
no more than 0 or 1, and 0 for a job that was stopped.
Exit codes: 0 the job is there, 3 Ray knows no such job, 4 there is no Ray that answers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

__all__ = ["main"]

EXIT_UNKNOWN = 3
EXIT_NO_RAY = 4

#: Pause between two looks at a job that runs, in seconds.
LOOK_PAUSE_S = 1.0


def main(arguments: Sequence[str]) -> int:
    """Look at one job, and with ``--wait`` until it has ended."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    address, name, *rest = arguments
    try:
        client = JobSubmissionClient(address)
        while not (job := client.get_job_info(name)).status.is_terminal():
            if "--wait" not in rest:
                return 0
            time.sleep(LOOK_PAUSE_S)
    except ConnectionError as error:
        sys.stderr.write(f"no Ray answers at {address}: {error}\n")
        return EXIT_NO_RAY
    except RuntimeError as error:
        sys.stderr.write(f"Ray says nothing of job {name}: {error}\n")
        return EXIT_UNKNOWN
    code = 0 if job.status == JobStatus.SUCCEEDED else (job.driver_exit_code or 1)
    # A driver that a signal ended has its number below 0; shells count such ends from 128.
    sys.stdout.write(f"{code if code >= 0 else 128 - code}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
