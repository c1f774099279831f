"""Flower's client app, which forwards to the site's worker.

Flower starts a process for every message; it imports no more than it must.
"""

import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedforward.deployment.flower.transport import unwrapped, wrapped
from fedforward.deployment.model_server import ask

#: Where the client app finds its site's worker.
SOCKET = "FEDFORWARD_SOCKET"

client_app = ClientApp()


@client_app.query("letter")  # type: ignore[untyped-decorator]
def letter(message: Message, context: Context) -> Message:
    """Hand a letter to the site's worker and bring back the answer."""
    path = os.environ.get(SOCKET) or str(context.node_config.get("socket", ""))
    return Message(wrapped(ask(path, unwrapped(message.content))), reply_to=message)
