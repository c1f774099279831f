"""Flower's client app, which forwards to the site's model server, for Flower's own SuperExec.

That starts a process for every message, so this imports no more than it must. `fedforward client`
has `executor` in its place.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedforward.deployment.flower.transport import unwrap, wrap
from fedforward.deployment.model_server import ask

client_app = ClientApp()


@client_app.query("envelope")  # type: ignore[untyped-decorator]
def forward(message: Message, context: Context) -> Message:
    """Hand an envelope to the site's model server and bring back the reply."""
    path = str(context.node_config.get("socket", ""))
    return Message(wrap(ask(path, unwrap(message.content))), reply_to=message)
