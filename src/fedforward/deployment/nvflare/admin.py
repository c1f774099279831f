"""FLARE's session of an administrator, in a process of its own: it has threads and prints.

    python -m fedforward.deployment.nvflare.admin WORKSPACE USER

Reads a JSON list a line, what to do and its arguments, and prints a JSON object for each.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from fedforward.core.errors import FedForwardError

#: Seconds for a session to begin, and for anything that is asked in it.
LOGIN_TIMEOUT_S, TIMEOUT_S = 10.0, 60.0


class Session:
    """Does what is asked in a session, and begins another where one has ended."""

    def __init__(self, workspace: str, user: str) -> None:
        self.workspace = workspace
        self.user = user
        self._session: Any = None

    def __call__(self, what: str, arguments: list[Any]) -> Any:
        """What one of the methods below returns; whatever FLARE raises, the second time."""
        acts: dict[str, Callable[..., Any]] = {
            "sites": self.sites,
            "submit": self.submit,
            "job": self.job,
        }
        act = acts[what]
        try:
            return act(self._open(), *arguments)
        except Exception:
            # The server may be another process by now.
            self.close()
            return act(self._open(), *arguments)

    def _open(self) -> Any:
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        if self._session is None:
            self._session = new_secure_session(
                self.user, self.workspace, timeout=LOGIN_TIMEOUT_S, command_timeout=TIMEOUT_S / 2
            )
        return self._session

    def close(self) -> None:
        """End the session, if there is one."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(Exception):
                session.close()

    @staticmethod
    def sites(session: Any) -> dict[str, float]:
        """By connected site: when it was last heard of, in seconds since 1970."""
        return {c.name: c.last_connect_time for c in session.get_system_info().client_info}

    @staticmethod
    def submit(session: Any, folder: str) -> str:
        """Submit a job's folder; returns its number."""
        return str(session.submit_job(folder))

    @staticmethod
    def job(session: Any, number: str) -> str:
        """A job's status in FLARE's words."""
        return str(session.get_job_meta(number)["status"])


class Admin:
    """The process above, from outside."""

    def __init__(self, workspace: Path, user: str) -> None:
        """Begins with the first question; `workspace` has the kit of the administrator `user`."""
        self.workspace = workspace
        self.user = user
        self.log = workspace / "admin.log"
        self._process: subprocess.Popen[str] | None = None

    def sites(self) -> dict[str, float]:
        """See `Session`; raises `FedForwardError`, as the others, where there is no answer."""
        return dict(self._ask("sites"))

    def submit(self, folder: Path) -> str:
        """See `Session`."""
        return str(self._ask("submit", str(folder.absolute())))

    def job(self, number: str) -> str:
        """See `Session`."""
        return str(self._ask("job", number))

    def _ask(self, *question: Any) -> Any:
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(2 * TIMEOUT_S, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError) as error:
            self.stop()
            raise FedForwardError(
                f"FLARE's administrator session ended; see {self.log}."
            ) from error
        finally:
            timer.cancel()
        if "error" in answer:
            raise FedForwardError(f"FLARE's server says: {answer['error']}")
        return answer["value"]

    def _start(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "fedforward.deployment.nvflare.admin"]
            command += [str(self.workspace.absolute()), self.user]
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    encoding="utf-8",
                    cwd=self.workspace,
                    start_new_session=True,
                )
        return self._process

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def answer_all(questions: IO[str], answers: IO[str], session: Session) -> None:
    """Answer line by line until there are no more."""
    for line in questions:
        what, *arguments = json.loads(line)
        try:
            answer = {"value": session(what, arguments)}
        except Exception as error:
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """See the module."""
    workspace, user = sys.argv[1:3]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What FLARE prints is no answer.
    os.dup2(2, 1)
    answer_all(sys.stdin, answers, Session(workspace, user))
    # FLARE's threads would keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
