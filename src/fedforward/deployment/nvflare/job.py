"""A run as a FLARE job: a folder that a FLARE administrator submits as it is.

It has FLARE's own files and the run's `run.toml`, and no code: classes come from the `fedforward`
that is installed, which each party's `class_allow_list` must have.
"""

import json
from pathlib import Path
from typing import Any

from fedforward.config.schema import Config
from fedforward.config.template import to_toml
from fedforward.core.errors import FedForwardError
from fedforward.deployment.nvflare.names import RUN_NAME, RUN_TOML, TASK
from fedforward.training.assembly import quorum_of
from fedforward.training.run_directory import write_text

#: What FLARE's `class_allow_list` must have at the server and at every site.
ALLOWED = "fedforward.deployment.nvflare."
#: Seconds between two questions of an idle site for a task.
TASK_REQUEST_INTERVAL_S = 0.1
#: Seconds from FLARE's report of a job process that is gone until its site counts as gone.
DEAD_SITE_GRACE_S = 10.0


def job_files(config: Config, name: str) -> dict[str, dict[str, Any] | str]:
    """The files of a job by path: JSON as objects, the rest as text.

    Args:
        name: of the job and of the run's folder at the server.
    """
    meta = {
        "name": name,
        "resource_spec": {},
        # FLARE ends a job that has fewer.
        "min_clients": quorum_of(config),
        "mandatory_clients": [],
        "deploy_map": {"app": ["@ALL"]},
    }
    server = {
        "format_version": 2,
        "server": {"heart_beat_timeout": 600, "task_request_interval": TASK_REQUEST_INTERVAL_S},
        "dead_client_grace_period": DEAD_SITE_GRACE_S,
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
        "workflows": [
            {
                "id": "coordinator",
                "path": ALLOWED + "controller.CoordinatorController",
                "args": {"run": name},
            }
        ],
    }
    site = {
        "format_version": 2,
        "default_task_fetch_interval": TASK_REQUEST_INTERVAL_S,
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
        "executors": [
            {
                "tasks": [TASK],
                "executor": {"path": ALLOWED + "executor.SiteExecutor", "args": {}},
            }
        ],
    }
    return {
        "meta.json": meta,
        "app/config/config_fed_server.json": server,
        "app/config/config_fed_client.json": site,
        f"app/config/{RUN_TOML}": to_toml(config),
    }


def write_job(config: Config, folder: Path, name: str) -> Path:
    """Write a job's folder; returns it.

    Args:
        folder: is new, or holds this very job.
        name: as in `job_files`.

    Raises:
        FedForwardError: a name is not allowed, or the folder holds something else.
    """
    if not RUN_NAME.fullmatch(name):
        raise FedForwardError(
            f"--name {name!r} is not allowed: it must be at most 64 letters, digits, '.', '_' or "
            "'-', and begin with a letter or digit."
        )
    if not RUN_NAME.fullmatch(folder.absolute().name):
        raise FedForwardError(
            f"--out {folder}: FLARE takes the last part for a job's name, which must be letters, "
            "digits, '.', '_' and '-'. Choose another."
        )
    files = {
        path: content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        for path, content in job_files(config, name).items()
    }
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        if found != files.keys():
            raise FedForwardError(
                f"--out {folder} is there and is no job's folder. Remove it, or choose another."
            )
        for path, text in files.items():
            if (folder / path).read_text(encoding="utf-8", errors="replace") != text:
                raise FedForwardError(
                    f"--out {folder} holds another job: its {path} differs. Nothing was written. "
                    "Remove the folder, or choose another."
                )
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    return folder
