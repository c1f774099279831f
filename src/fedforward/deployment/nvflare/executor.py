"""FLARE's executor at a site: it hands envelopes to the site's model server, and knows no more.

The model server is the one that `fedforward client` keeps, for all jobs. Where a FLARE client was
started by other means, a job's own process starts one, and ends it with the job. It reads
`site.toml` from the client's `local` folder. Imports no PyTorch.
"""

import logging
import os
import threading
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from fedforward.core.errors import FedForwardError
from fedforward.deployment.model_server import ask
from fedforward.deployment.nvflare.names import SOCKET, TASK
from fedforward.deployment.nvflare.resident import ResidentModel, site_file
from fedforward.deployment.nvflare.transport import unwrap, wrap

LOGGER = logging.getLogger("fedforward.deployment.nvflare")
#: Seconds between two looks at FLARE's signal to abort.
ABORT_INTERVAL_S = 0.5


class SiteExecutor(Executor):  # type: ignore[misc]
    """See the module; FLARE builds it from the job's `config_fed_client.json`."""

    def __init__(self) -> None:
        super().__init__()
        self._model: ResidentModel | None = None
        self._starting = threading.Lock()

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """FLARE's events: the model server of a job ends with it."""
        if event_type == EventType.END_RUN and self._model is not None:
            model, self._model = self._model, None
            model.stop()

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Shareable:
        """Bring an envelope to the model server, and its reply back.

        Whatever goes wrong is told here; the server gets one of FLARE's return codes.
        """
        if task_name != TASK:
            return make_reply(ReturnCode.TASK_UNSUPPORTED)
        try:
            reply = self._ask(self._socket(fl_ctx), unwrap(shareable), abort_signal)
        except (FedForwardError, OSError) as error:
            # FLARE may send logs of errors to the server, so that this is none.
            LOGGER.warning("%s", error)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        return make_reply(ReturnCode.TASK_ABORTED) if reply is None else wrap(reply)

    def _socket(self, fl_ctx: Any) -> str:
        if given := os.environ.get(SOCKET):
            return given
        with self._starting:
            if self._model is None:
                local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
                self._model = ResidentModel(site_file(local, fl_ctx.get_identity_name()))
                LOGGER.info("the site's own log is %s", self._model.log)
            return str(self._model.socket)

    def _ask(self, socket: str, data: bytes, abort_signal: Any) -> bytes | None:
        """The model server's reply; None if FLARE aborts the job first.

        Raises:
            OSError: there is no model server, or it died over the message.
        """
        answers: list[bytes] = []
        errors: list[OSError] = []

        def work() -> None:
            try:
                answers.append(ask(socket, data))
            except OSError as error:
                errors.append(error)

        thread = threading.Thread(target=work, name="ask", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(ABORT_INTERVAL_S)
            if abort_signal.triggered:
                return None
        if errors:
            raise errors[0]
        return answers[0]
