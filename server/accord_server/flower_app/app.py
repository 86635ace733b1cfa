"""Nothing runs from here: Flower wants a bundle that names two apps before it starts a run."""

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()
