"""Flower's client app, which forwards to the site's model server.

Flower starts a process for every message; it imports no more than it must.
"""

import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedforward.deployment.flower.transport import unwrap, wrap
from fedforward.deployment.model_server import ask

#: Environment variable with the socket of the site's model server.
SOCKET = "FEDFORWARD_SOCKET"

client_app = ClientApp()


@client_app.query("envelope")  # type: ignore[untyped-decorator]
def forward(message: Message, context: Context) -> Message:
    """Hand an envelope to the site's model server and bring back the reply."""
    path = os.environ.get(SOCKET) or str(context.node_config.get("socket", ""))
    return Message(wrap(ask(path, unwrap(message.content))), reply_to=message)
