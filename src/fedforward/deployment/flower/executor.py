"""A site's client app as one resident process, which takes the SuperNode's tasks one at a time.

    python -m fedforward.deployment.flower.executor HOST:PORT SECRET_FILE SOCKET HOME LOG

Flower's SuperExec starts a process for every message, one to two seconds of CPU. A SuperNode with
`--isolation process` leaves tasks to whoever has its secret; this process forwards their envelopes
to the site's model server. Nothing of the app that the server sends along is unpacked or run.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    pull_and_inflate_object_from_tree,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fedforward.deployment.flower.timings import Timings
from fedforward.deployment.flower.transport import MESSAGE_TYPE, unwrap, wrap
from fedforward.deployment.model_server import ModelServerGoneError, ask

LOGGER = logging.getLogger("fedforward.deployment.executor")
#: Seconds between two looks at the SuperNode's log, which grows when a message comes.
LOG_INTERVAL_S = 0.03
#: Seconds for which a task is asked for after that, and between two questions then and otherwise.
EAGER_S, EAGER_INTERVAL_S, POLL_INTERVAL_S = 0.3, 0.06, 1.0
#: Seconds after a question that was not answered.
RETRY_S = 0.5
#: Seconds for the message of a task to be there, and between two looks.
MESSAGE_TIMEOUT_S, MESSAGE_INTERVAL_S = 60.0, 0.05
#: Seconds between two signs of life for a task; without one it is given up after a minute.
HEARTBEAT_INTERVAL_S = 10.0
#: The request that needs the SuperNode's secret.
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class _TaskToken:
    """Adds the token of the task at hand to requests."""

    token = ""

    def intercept(self, context: Any, call_next: Any) -> Any:
        """See Flower's `ProtobufClientInterceptor`."""
        if self.token:
            context.request.headers[TASK_TOKEN_HEADER] = self.token
        return call_next(context)


class Executor:
    """See the module."""

    def __init__(self, address: str, secret: bytes, socket: str, timings: Timings) -> None:
        """`address` is the SuperNode's, on the loopback; `socket` the model server's."""
        self.socket = socket
        self.timings = timings
        self._task = _TaskToken()
        signed = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=frozenset({_ACQUIRE})
        )
        self.client = RuntimeHttpClient.from_server_address(
            server_address=address,
            insecure=True,
            root_certificates=None,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
                signed,
                self._task,
            ],
        )

    def take(self) -> bool:
        """Carry out a task if there is one.

        Raises:
            httpx.HTTPError: the SuperNode is gone, or no longer knows the task.
        """
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        acquired = self.client.AcquireTask(request)
        if not acquired.token:
            return False
        self._task.token = acquired.token
        try:
            with self._kept_alive():
                self._carry_out()
        finally:
            self._task.token = ""
        return True

    def _carry_out(self) -> None:
        self.timings.note("taken")
        message, context = self._read()
        self.timings.note("asked")
        reply = self._reply(message)
        self.timings.note("replied")
        push_message(self.client, reply, context)
        push_task_output(self.client, context, SubStatus.COMPLETED, "")
        self.timings.note("pushed")

    def _read(self) -> tuple[Message, Context]:
        """The message of the task.

        A SuperNode offers a task a little before it has the message. Flower's own client app, which
        takes long to start, would then wait for a second.

        Raises:
            RuntimeError: there is no message, or not the whole of it.
        """
        told = self.client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = told.task_id, told.run.run_id
        TaskIdentity.node_id = told.context.node_id
        context = context_from_proto(told.context)
        last = time.monotonic() + MESSAGE_TIMEOUT_S
        while not (found := self.client.PullMessages(PullAppMessagesRequest())).messages_list:
            if time.monotonic() > last:
                raise RuntimeError("the SuperNode has no message for its task")
            time.sleep(MESSAGE_INTERVAL_S)
        tree, node = found.message_object_trees[0], Node(node_id=context.node_id)
        try:
            message = pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(self.client.PullObject, node, context.run_id),
                make_confirm_message_received_fn_protobuf(
                    self.client.ConfirmMessageReceived, node, context.run_id
                ),
                return_type=Message,
                initial_backoff=MESSAGE_INTERVAL_S,
            )
        except ObjectPullError as error:
            raise RuntimeError(str(error)) from error
        # It is not among what was sent: it is the name of that.
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message, context

    def _reply(self, message: Message) -> Message:
        """The model server's answer, or why there is none."""
        try:
            if message.metadata.message_type == MESSAGE_TYPE:
                return Message(wrap(ask(self.socket, unwrap(message.content))), reply_to=message)
            reason = f"the site knows no type {message.metadata.message_type!r}"
        except Exception as error:
            # What an error says may come out of the site's files, and stays in its log.
            LOGGER.warning(f"a message cannot be answered: {error}")
            gone = isinstance(error, ModelServerGoneError)
            reason = "the site's model server does not answer" if gone else type(error).__name__
        return Message(
            Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message
        )

    @contextmanager
    def _kept_alive(self) -> Iterator[None]:
        """Tell the SuperNode meanwhile that somebody works on the task."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(HEARTBEAT_INTERVAL_S):
                # A task that is no longer known shows when it is answered.
                with suppress(httpx.HTTPError):
                    self.client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class Waiting:
    """When to ask for a task: that costs two processes milliseconds, a look at a file nothing."""

    def __init__(self, log: Path) -> None:
        """`log` is the SuperNode's, which says there what it receives and sends."""
        self.log = log
        self._size = -1
        self._next = self._eager_until = 0.0

    def over(self, now: float) -> bool:
        """Whether to ask now."""
        try:
            size = self.log.stat().st_size
        except OSError:
            size = -1
        if size != self._size:
            self._size = size
            self._eager_until = now + EAGER_S
            self._next = min(self._next, now)
        return now >= self._next

    def asked(self, now: float, found: bool) -> None:
        """There was a task, or none."""
        eager = now < self._eager_until and not found
        self._next = now + (EAGER_INTERVAL_S if eager else POLL_INTERVAL_S)


def main() -> None:
    """Take tasks until whoever started this is gone; the log goes to standard output."""
    from fedforward.core.logs import shown, tolerate_narrow_encodings

    tolerate_narrow_encodings()
    address, secret, socket, home, log = sys.argv[1:6]
    parent = os.getppid()
    with shown(logging.StreamHandler(sys.stdout)):
        executor = Executor(address, Path(secret).read_bytes(), socket, Timings.of(Path(home)))
        waiting = Waiting(Path(log))
        while os.getppid() == parent:
            try:
                if waiting.over(time.monotonic()):
                    waiting.asked(time.monotonic(), executor.take())
            except httpx.ConnectError:
                # The SuperNode is being started.
                time.sleep(RETRY_S)
            except (httpx.HTTPError, RuntimeError) as error:
                LOGGER.warning(f"a task could not be carried out: {error!r}")
                time.sleep(RETRY_S)
            time.sleep(LOG_INTERVAL_S)


if __name__ == "__main__":
    main()
