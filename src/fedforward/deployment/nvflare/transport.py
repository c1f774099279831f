"""Envelopes as FLARE's tasks, as the `Transport` that a coordinator asks for.

A message to a site is a task for that site alone, so that FLARE's authorisation, audit and filters
see it. Its data object has one entry: the envelope's bytes. Nothing else of ours travels.
"""

import queue
import threading
from collections.abc import Sequence
from typing import Any

from nvflare.apis.controller_spec import Task
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable

from fedforward.deployment.coordinator import Stopped
from fedforward.deployment.nvflare.names import ABORTED, KEY, TASK
from fedforward.deployment.transport import Reply


def wrap(data: bytes) -> Shareable:
    """An envelope as what a task or its result carries."""
    return DXO(data_kind=DataKind.APP_DEFINED, data={KEY: data}).to_shareable()


def unwrap(content: Shareable) -> bytes:
    """The envelope in a task or a result; empty if there is none."""
    try:
        data = from_shareable(content).data.get(KEY)
    except (ValueError, AttributeError):
        return b""
    return data if isinstance(data, bytes) else b""


class FlareTransport:
    """See the module. A site's name is the one in its FLARE certificate.

    Which sites a job has is settled when FLARE deploys it; one that dies is gone until the next
    job. Replies come in FLARE's threads, and wait here until the coordinator asks.
    """

    def __init__(self, controller: Any, engine: Any, abort: Any) -> None:
        """`controller`: a FLARE `Controller` in its `control_flow`; `abort`: its signal."""
        self.controller = controller
        self.engine = engine
        self.abort = abort
        self._tasks: dict[str, Any] = {}
        self._came: queue.SimpleQueue[tuple[Any, Reply]] = queue.SimpleQueue()
        self._bell = threading.Event()

    def present(self) -> Sequence[str]:
        """The job's sites that FLARE does not take for disconnected."""
        names = [client.name for client in self.engine.get_clients()]
        return [n for n in names if self.controller.get_client_disconnect_time(n) is None]

    def send(self, site: str, data: bytes) -> None:
        """See `Transport`."""
        task = Task(
            TASK, wrap(data), result_received_cb=self._received, task_done_cb=self._finished
        )
        self._tasks[site] = task
        with self.engine.new_context() as context:
            self.controller.send(task, context, targets=[site])

    def receive(self) -> Sequence[Reply]:
        """See `Transport`.

        Raises:
            Stopped: FLARE has aborted the job.
        """
        if self.abort.triggered:
            raise Stopped(ABORTED)
        self._bell.clear()
        replies = []
        while not self._came.empty():
            task, reply = self._came.get()
            # A task that was given up may still be answered.
            if self._tasks.get(reply.site) is task:
                del self._tasks[reply.site]
                replies.append(reply)
        for site in self._tasks.keys() - set(self.present()):
            task = self._tasks.pop(site)
            self.controller.cancel_task(task)
            replies.append(Reply(site, error="it is gone from the job"))
        return replies

    def wait(self, seconds: float) -> None:
        """Wait until a reply comes, for so many seconds at most."""
        self._bell.wait(seconds)

    def _received(self, client_task: Any, fl_ctx: Any) -> None:
        """FLARE's callback for a result."""
        site, result = client_task.client.name, client_task.result
        code = result.get_return_code(ReturnCode.OK)
        if code == ReturnCode.OK:
            reply = Reply(site, unwrap(result))
        else:
            reply = Reply(site, error=f"no answer: {code}; the site's log says more")
        # Only its bytes are kept.
        client_task.result = None
        self._put(client_task.task, reply)

    def _finished(self, task: Any, fl_ctx: Any) -> None:
        """FLARE's callback for a task that is over, answered or not."""
        words = f"no answer: {getattr(task.completion_status, 'value', task.completion_status)}"
        self._put(task, Reply(task.targets[0], error=words))

    def _put(self, task: Any, reply: Reply) -> None:
        self._came.put((task, reply))
        self._bell.set()
