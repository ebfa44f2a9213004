"""The parent's group reaches what it starts: on every path, and with any name (SPEC C)."""

from __future__ import annotations

import inspect
import json
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import submitit
from omegaconf import OmegaConf
from ray.job_submission import JobStatus, JobSubmissionClient
from ray_cluster import RayCluster, until
from wandb_file import read_runs

import raywb
from raywb.errors import SettingsError
from raywb.groups import resolve_group, setup_with_group

SOURCE = "source /opt/venv/bin/activate"
HYDRA = "export HYDRA_FULL_ERROR=1"
EXPORT = "export WANDB_GROUP=slurm-12345"

HOSTILE = [
    "two words",
    "it's",
    'say "no"',
    "$(touch ran)",
    "`touch ran`",
    "; touch ran #",
    "' ; touch ran ; '",
    "a\ntouch ran\n",
    "a\n#SBATCH --wrap='touch ran'",
    "\\",
    "${HOME}",
    "!!",
    "*",
    "~",
    "-n",
    "Grüße 🦊 \u202e",
    "=x",
    "\t",
]


@pytest.mark.parametrize(
    ("setup", "injected"),
    [
        ([], [EXPORT]),
        (["module load cuda"], [EXPORT, "module load cuda"]),
        ([SOURCE], [SOURCE, EXPORT]),
        ([HYDRA, "nvidia-smi"], [HYDRA, EXPORT, "nvidia-smi"]),
        (["a", SOURCE, "b", HYDRA, "c"], ["a", SOURCE, "b", HYDRA, EXPORT, "c"]),
        ([". ./env.sh", "cd /work"], [". ./env.sh", EXPORT, "cd /work"]),
        (["cd /w && source env", "x"], ["cd /w && source env", EXPORT, "x"]),
        (["if true; then source e; fi", "x"], ["if true; then source e; fi", EXPORT, "x"]),
        (["export A=1 HYDRA_FULL_ERROR=1", "x"], ["export A=1 HYDRA_FULL_ERROR=1", EXPORT, "x"]),
        (["set -e\nsource env", "x"], ["set -e\nsource env", EXPORT, "x"]),
        # It is exported whether the condition holds or not.
        (
            ["if [ -f e ]; then", "  source e", "fi", "x"],
            ["if [ -f e ]; then", "  source e", "fi", EXPORT, "x"],
        ),
        (["source e && \\", "  f", "x"], ["source e && \\", "  f", EXPORT, "x"]),
        (["echo what if", SOURCE, "x"], ["echo what if", SOURCE, EXPORT, "x"]),
        # None of these sources or exports anything of the kind.
        (["# source env"], [EXPORT, "# source env"]),
        (["echo the source of HYDRA_FULL_ERROR"], [EXPORT, "echo the source of HYDRA_FULL_ERROR"]),
        (["./source x", "source_env x"], [EXPORT, "./source x", "source_env x"]),
        # What somebody else wrote stays as it is.
        (["export WANDB_GROUP=x && y"], [EXPORT, "export WANDB_GROUP=x && y"]),
        (['export WANDB_GROUP="x"'], [EXPORT, 'export WANDB_GROUP="x"']),
        (["echo 'open", "quote'"], [EXPORT, "echo 'open", "quote'"]),
    ],
)
def test_where_the_export_stands(setup: list[str], injected: list[str]) -> None:
    """After what is sourced and HYDRA_FULL_ERROR, else first; a second time changes nothing."""
    given = list(setup)
    assert setup_with_group(setup, "slurm-12345") == injected
    assert setup == given
    assert setup_with_group(injected, "slurm-12345") == injected
    other = [EXPORT.replace("12345", "6") if line == EXPORT else line for line in injected]
    assert setup_with_group(injected, "slurm-6") == other


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_runs_anything(name: str, shell: str, tmp_path: Path) -> None:
    """Whatever is in a name, the script's shell exports just that, and runs nothing."""
    (tmp_path / "env").write_text("export WANDB_GROUP=from-the-file\n")
    setup = raywb.inject_group(["set -eu", "source ./env" if shell == "bash" else ". ./env"], name)
    assert raywb.inject_group(setup, name) == setup
    script = tmp_path / "script"
    script.write_text("\n".join([*setup, "env -0"]), encoding="utf-8")
    done = subprocess.run(
        [shell, "./script"], cwd=tmp_path, capture_output=True, check=True, env={"PATH": "/bin"}
    )
    assert f"WANDB_GROUP={name}".encode() in done.stdout.split(b"\0")
    assert done.stderr == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env", "script"]


@pytest.mark.parametrize("name", ["nul\0", "half \ud83e"])
def test_names_that_no_environment_holds_are_refused(name: str) -> None:
    """They are told of where they are given, before anything is started or submitted."""
    with pytest.raises(SettingsError, match="group"):
        raywb.inject_group([], name)
    with pytest.raises(SettingsError, match="group"):
        raywb.Settings(group=name)


def test_a_group_in_the_environment_may_be_any_bytes() -> None:
    """Bytes that are no text are named in a way that every part takes."""
    assert resolve_group(
        None, None, {"WANDB_GROUP": b"a\xff".decode(errors="surrogateescape")}
    ) == (
        "a?",
        "WANDB_GROUP",
    )


@pytest.mark.parametrize(
    ("environment", "group", "name"),
    [
        ({"WANDB_GROUP": "parent", "SLURM_JOB_ID": "7"}, None, "parent"),
        ({"WANDB_GROUP": "parent"}, "mine", "mine"),
        ({"SLURM_JOB_ID": "7"}, None, "slurm-7"),
        ({"SUBMITIT_JOB_ID": "6", "SLURM_JOB_ID": "7"}, None, "slurm-6"),
        ({"WANDB_GROUP": "parent"}, "", None),
        ({"WANDB_GROUP": "parent", "WANDB_MODE": "disabled"}, None, None),
        ({"WANDB_MODE": "disabled"}, "mine", None),
        ({"WANDB_MODE": "offline"}, "mine", "mine"),
    ],
)
def test_what_is_injected(
    environment: Mapping[str, str],
    group: str | None,
    name: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The name wins, then the environment in its order; one line of JSON tells of an injection."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    setup = [SOURCE]
    injected = raywb.inject_group(setup, group)
    assert injected is not setup
    assert setup == [SOURCE]
    printed = capsys.readouterr().out
    if name is None:
        assert (injected, printed) == ([SOURCE], "")
        return
    assert injected == [SOURCE, f"export WANDB_GROUP={name}"]
    said = {"debug": "injected_wandb_group", "group": name, "node": platform.node()}
    assert printed.endswith("\n")
    assert [json.loads(line) for line in printed.splitlines()] == [said]
    assert raywb.inject_group(injected, group) == injected
    assert capsys.readouterr().out == ""


def test_nothing_to_inject_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Without any group the jobs would each get their own, which nobody should find out late."""
    assert raywb.inject_group([SOURCE]) == [SOURCE]
    assert "no group to inject" in caplog.text


@pytest.mark.parametrize("setup", ["source env", {"a": 1}, 3, b"x"])
def test_what_is_no_setup_is_refused(setup: Any) -> None:
    """A string is not taken for a list of its letters."""
    with pytest.raises(SettingsError, match="list of setup commands"):
        raywb.inject_group(setup, "g")


def test_a_config_s_list_is_taken() -> None:
    """Hydra's launchers have their setup in an OmegaConf list."""
    setup = OmegaConf.create({"setup": [SOURCE]}).setup
    assert raywb.inject_group(setup, "g") == [SOURCE, "export WANDB_GROUP=g"]
    assert list(setup) == [SOURCE]


@pytest.fixture
def with_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which submitit finds Slurm's commands; none of them is run."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(srun.parent), prepend=":")
    return tmp_path


@pytest.mark.parametrize("kind", ["auto", "slurm"])
def test_submitit_s_executors_write_it_into_their_scripts(kind: str, with_srun: Path) -> None:
    """The script for sbatch has the export, with other parameters as they were."""
    executor: Any
    if kind == "auto":
        executor = submitit.AutoExecutor(with_srun / "logs", cluster="slurm")
        executor.update_parameters(slurm_setup=[SOURCE, "nvidia-smi"], slurm_partition="gpu")
        real = executor._executor
    else:
        executor = real = submitit.SlurmExecutor(with_srun / "logs")
        executor.update_parameters(setup=[SOURCE, "nvidia-smi"], partition="gpu")
    setup = [SOURCE, EXPORT, "nvidia-smi"]
    for _ in range(2):
        assert raywb.inject_group(executor, "slurm-12345") == setup
        script = real._make_submission_file_text("work", "1").splitlines()
        start = script.index(SOURCE)
        assert script[start : start + 3] == setup
        assert script.count(EXPORT) == 1
        assert "#SBATCH --partition=gpu" in script
    bare = submitit.SlurmExecutor(with_srun / "logs")
    assert raywb.inject_group(bare, "") == []
    assert "WANDB_GROUP" not in bare._make_submission_file_text("work", "1")
    assert raywb.inject_group(bare, "g") == ["export WANDB_GROUP=g"]
    assert "export WANDB_GROUP=g" in bare._make_submission_file_text("work", "1").splitlines()


def test_submitit_s_local_jobs_inherit_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that submitit runs on this machine resolves the injected group, whatever its own id."""
    monkeypatch.setenv("SLURM_JOB_ID", "child")
    monkeypatch.setenv("PYTHONPATH", str(Path(raywb.__file__).parents[1]), prepend=":")
    code = """
        import json, os, sys
        from raywb.groups import resolve_group
        print(json.dumps(resolve_group(None, None, os.environ)))
    """
    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="local")
    work = submitit.helpers.CommandFunction([sys.executable, "-c", inspect.cleandoc(code)])
    jobs = [executor.submit(work)]
    raywb.inject_group(executor, HOSTILE[6])
    jobs.append(executor.submit(work))
    own, inherited = (json.loads(job.result().splitlines()[-1]) for job in jobs)
    assert own == ["slurm-child", "SLURM_JOB_ID"]
    assert inherited == [HOSTILE[6], "WANDB_GROUP"]


def test_submitit_s_debug_executor_has_no_setup(tmp_path: Path) -> None:
    """It runs jobs in this process, with this process's environment; nothing breaks."""
    executor = submitit.AutoExecutor(tmp_path, cluster="debug")
    assert raywb.inject_group(executor, "g") == ["export WANDB_GROUP=g"]


# ----------------------------------------------------------------------------------------------
# runtime_env


PARENT = {
    "WANDB_GROUP": "parent",
    "WANDB_PROJECT": "p",
    "WANDB_ENTITY": "e",
    "WANDB_MODE": "offline",
    "WANDB_BASE_URL": "https://wandb.example",
    "RAYWB_JOURNAL_DIR": "/scratch",
}


def test_a_runtime_env_says_where_runs_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """It carries the group and the settings; not a key, nor what belongs to one run or service."""
    assert raywb.runtime_env() == {}
    others = ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_NAME", "RAYWB_DIR", "SLURM_JOB_ID", "NETRC")
    for key, value in (PARENT | dict.fromkeys(others, "not this")).items():
        monkeypatch.setenv(key, value)
    assert raywb.runtime_env() == {"env_vars": PARENT}
    monkeypatch.delenv("WANDB_GROUP")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert raywb.runtime_env()["env_vars"]["WANDB_GROUP"] == "slurm-7"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "WANDB_GROUP" not in raywb.runtime_env()["env_vars"]


def test_the_caller_s_own_values_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller has in a runtime_env stays, the object itself as well."""
    for key, value in PARENT.items():
        monkeypatch.setenv(key, value)
    base = {"pip": ["x"], "env_vars": {"WANDB_PROJECT": "mine", "A": "1"}}
    assert raywb.runtime_env(base) == {
        "pip": ["x"],
        "env_vars": {**PARENT, "WANDB_PROJECT": "mine", "A": "1"},
    }
    assert base == {"pip": ["x"], "env_vars": {"WANDB_PROJECT": "mine", "A": "1"}}
    assert raywb.runtime_env({"env_vars": None})["env_vars"] == PARENT
    disabled = raywb.runtime_env({"env_vars": {"WANDB_MODE": "disabled"}})
    assert "WANDB_GROUP" not in disabled["env_vars"]


def test_what_the_job_sets_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses a variable that both a job's runtime_env and ray.init's name."""
    for key, value in PARENT.items():
        monkeypatch.setenv(key, value)
    job = {"runtime_env": {"env_vars": {"WANDB_GROUP": "parent", "WANDB_MODE": "offline"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    left = {
        key: value for key, value in PARENT.items() if key not in job["runtime_env"]["env_vars"]
    }
    assert raywb.runtime_env() == {"env_vars": left}
    monkeypatch.setenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    assert raywb.runtime_env() == {"env_vars": PARENT}


# ----------------------------------------------------------------------------------------------
# Real clusters


@pytest.fixture(scope="module")
def jobs_cluster() -> Iterator[RayCluster]:
    """A cluster to which jobs can be submitted."""
    with RayCluster.start(num_cpus=4, dashboard=True) as started:
        yield started


def submit(cluster: RayCluster, name: str, script: str, runtime_env: Any = None) -> Any:
    """Run a script as a Ray job of this submission id; returns what it calls ``tell`` with."""
    path = cluster.root / f"{name}.py"
    answer = path.with_suffix(".json")
    head = (
        f"import json\ntell = lambda value: open({str(answer)!r}, 'w').write(json.dumps(value))\n"
    )
    path.write_text(head + textwrap.dedent(script))
    client = JobSubmissionClient(cluster.dashboard_address)
    client.submit_job(
        entrypoint=f"{sys.executable} {path}", submission_id=name, runtime_env=runtime_env
    )
    until(f"the job {name} to end", lambda: client.get_job_status(name).is_terminal())
    assert client.get_job_status(name) == JobStatus.SUCCEEDED, client.get_job_logs(name)
    return json.loads(answer.read_text())


@pytest.mark.ray
def test_the_group_reaches_tasks_actors_and_other_jobs(jobs_cluster: RayCluster) -> None:
    """Each is in the parent's group, though it has a job id of its own."""
    parent = jobs_cluster.driver(
        """
        import os
        import ray, raywb
        from ray_cluster import report, told

        own_id = {"env_vars": {"SLURM_JOB_ID": "1234"}}

        @ray.remote(num_cpus=0, runtime_env=own_id)
        def task():
            with raywb.attach("task") as client:
                client.log({"i": 1})
                return client.run.group, os.environ.get("WANDB_GROUP")

        @ray.remote(num_cpus=0, runtime_env=own_id)
        class Actor:
            def group(self):
                with raywb.attach("actor") as client:
                    client.log({"i": 1})
                    # What a worker submits is a child of the same parent.
                    return client.run.group, raywb.inject_group([])

        ray.init()
        run = raywb.start(project="together")
        report([run.group, ray.get(task.remote()), ray.get(Actor.remote().group.remote())])
        report([os.environ["WANDB_GROUP"], raywb.runtime_env({"env_vars": {"MINE": "1"}})])
        told()
        raywb.start(project="together")
        report(raywb.finish().run.dir)
        """,
        {"SLURM_JOB_ID": "77"},
    )
    export = "export WANDB_GROUP=slurm-77"
    assert parent.next_report() == ["slurm-77", ["slurm-77", None], ["slurm-77", [export]]]
    exported, runtime_env = parent.next_report()
    assert exported == "slurm-77"
    variables = {"WANDB_GROUP": "slurm-77", "WANDB_PROJECT": "together", "MINE": "1"}
    assert runtime_env == {"env_vars": variables}
    said = "[orchestrator] Setting WANDB_GROUP=slurm-77 for child stages"
    assert parent.output.splitlines().count(said) == 1

    joined = """
        import os, raywb
        client = raywb.attach("second")
        client.log({"i": 1})
        attached = [client.run.group, os.environ.get("WANDB_GROUP")]
        run = raywb.start()
        client.close()
        tell([*attached, run.id == client.run.id, os.environ.get("WANDB_GROUP")])
    """
    own_id = {"env_vars": {"SLURM_JOB_ID": "1234"}}
    second = submit(jobs_cluster, "second", joined, own_id)
    assert second == ["slurm-77", None, True, "slurm-77"]
    parent.tell()
    directory = parent.succeed()
    assert parent.output.splitlines().count(said) == 1, "it was set already"

    child = """
        import ray, raywb
        from raywb.groups import resolve_group
        try:
            ray.init(runtime_env={"env_vars": {"WANDB_GROUP": "slurm-77"}})
        except ValueError as error:
            refused = "Failed to merge" in str(error)
        ray.init(runtime_env=raywb.runtime_env({"env_vars": {"TASKS": "1"}}))

        @ray.remote(num_cpus=0)
        def task():
            import os
            return [os.environ[name] for name in ("WANDB_GROUP", "WANDB_PROJECT", "MINE", "TASKS")]

        run = raywb.start(name="child")
        after = raywb.runtime_env()["env_vars"]["WANDB_GROUP"]
        raywb.finish()
        tell([refused, run.group, run.project, ray.get(task.remote()), after])
    """
    runtime_env["env_vars"]["SLURM_JOB_ID"] = "1234"
    answer = submit(jobs_cluster, "child", child, runtime_env)
    of_a_task = ["slurm-77", "together", "1", "1"]
    assert answer == [True, "slurm-77", "together", of_a_task, "slurm-77"]

    runs = read_runs(directory).values()
    assert {run.group for run in runs} == {"slurm-77"}
    first, last = sorted(runs, key=lambda run: run.name == "child")
    assert last.name == "child"
    assert [first.values(f"{stage}/i") for stage in ("task", "actor", "second")] == [[1]] * 3


@pytest.mark.ray
def test_a_submitted_job_names_the_group(jobs_cluster: RayCluster) -> None:
    """Nothing else names one: it is the job's submission id, for its workers as for its driver."""
    script = """
        import ray, raywb
        from ray_cluster import without_service

        @ray.remote(num_cpus=0)
        def worker():
            return raywb.attach("first").run.group

        ray.init()
        without_service()
        group = ray.get(worker.remote())
        run = raywb.start(project="job")
        raywb.finish()
        tell([group, run.group, run.group_source])
    """
    answer = submit(jobs_cluster, "alone", script)
    assert answer == ["ray-alone", "ray-alone", "Ray's job submission id"]


@pytest.mark.ray
def test_a_subprocess_with_a_cluster_of_its_own_is_in_the_group(jobs_cluster: RayCluster) -> None:
    """The environment carries the group to another cluster, and beats the child's job id there."""
    child = """
        import ray, raywb
        ray.init(address="local", num_cpus=1, include_dashboard=False)
        run = raywb.start(project="child", job_type="classify")
        raywb.finish()
    """
    script = f"""
        import os, pathlib, subprocess, sys
        import ray, raywb
        from ray_cluster import report, without_service

        ray.init()
        without_service()
        parent = raywb.start(project="parent", group="it's ours")
        raywb.finish()
        environment = dict(os.environ, SLURM_JOB_ID="9", RAY_TMPDIR=str(pathlib.Path.home()))
        del environment["RAY_ADDRESS"]
        child = {textwrap.dedent(child)!r}
        subprocess.run([sys.executable, "-c", child], env=environment, check=True)
        report(parent.dir)
    """
    jobs_cluster.run_driver(script)
    runs = read_runs(jobs_cluster.home / "raywb")
    groups = {run.job_type: run.group for run in runs.values() if run.group == "it's ours"}
    assert groups == {"orchestrator": "it's ours", "classify": "it's ours"}


@pytest.mark.ray
def test_what_start_exports(jobs_cluster: RayCluster) -> None:
    """The group, once; nothing where there is none, and then no earlier one of ours either."""
    steps = jobs_cluster.run_driver(
        """
        import os
        import ray, raywb
        from ray_cluster import report, without_service

        def begin(**settings):
            run = raywb.start(project="exports", **settings)
            raywb.start()
            seen = [run.group, os.environ.get("WANDB_GROUP"), raywb.inject_group([])]
            seen.append(raywb.runtime_env()["env_vars"].get("WANDB_GROUP"))
            raywb.finish()
            return seen

        # The head's environment would name a group to W&B's client.
        ray.init(runtime_env={"env_vars": {"WANDB_RUN_GROUP": "stray"}})
        without_service()
        report([
            begin(group=""),
            begin(mode="disabled"),
            begin(group="one"),
            begin(group="two"),
            begin(),
            begin(group=""),
            begin(group="three"),
            begin(mode="disabled"),
        ])
        """,
        {"WANDB_GROUP": "before"},
    )

    def with_group(name: str) -> list[Any]:
        return [name, name, [f"export WANDB_GROUP={name}"], name]

    assert steps == [
        [None, "before", [], None],
        ["before", "before", [], None],
        with_group("one"),
        with_group("two"),
        with_group("two"),
        [None, "before", [], None],
        with_group("three"),
        ["three", "before", [], None],
    ]
    runs = read_runs(jobs_cluster.home / "raywb" / "exports").values()
    in_order = sorted(runs, key=lambda run: run.name)
    assert sorted(run.group for run in in_order) == ["", "", "one", "three", "two", "two"]
