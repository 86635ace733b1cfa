"""A plain Flower app that only sends vectors to and fro: copied into a bundle of its own, it imports nothing of Accord.

`accord bench deployment` runs it by Flower's own commands, with Flower's defaults, beside Accord.
"""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server = ServerApp()
client = ClientApp()


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Send a vector of the asked size back."""
    values = int(str(context.run_config["values-up"]))
    return Message(RecordDict({"update": ArrayRecord([np.ones(values, np.float32)])}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Time trips to all nodes; the first is not counted, since processes start and connections open in it."""
    settings = context.run_config
    nodes: list[int] = []
    while len(nodes) < int(str(settings["nodes"])):
        time.sleep(0.2)
        nodes = list(grid.get_node_ids())
    weights = RecordDict({"weights": ArrayRecord([np.ones(int(str(settings["values-down"])), np.float32)])})
    seconds: list[float] = []
    for _ in range(1 + int(str(settings["trips"]))):
        messages = [Message(weights, dst_node_id=node, message_type="train") for node in nodes]
        started = time.monotonic()
        replies = list(grid.send_and_receive(messages))
        seconds.append(time.monotonic() - started)
        if len(replies) != len(nodes) or any(reply.has_error() for reply in replies):
            Path(str(settings["out"])).write_text(json.dumps({"problem": "a node did not answer"}))
            return
    Path(str(settings["out"])).write_text(json.dumps({"trip_s": seconds[1:]}))
