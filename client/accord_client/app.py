"""Flower's side of a site: a ClientApp that decodes, asks the site, encodes. No logic of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from accord_shared.errors import AccordError
from accord_shared.messages import Message, Refusal
from accord_shared.wire import decode, encode

log = logging.getLogger(__name__)


def answered(handler: Callable[[Message], Message], content: RecordDict) -> RecordDict:
    """What a site says to the content of a message, whatever that is: a refusal is an answer too."""
    try:
        reply = handler(decode(content))
    except AccordError as error:
        reply = Refusal.of(error)
    except Exception as error:  # its text, which Flower would send, may quote private records
        log.exception("a message could not be answered")
        reply = Refusal.of(error)
    return encode(reply)


def client_app(handler_of: Callable[[Context], Callable[[Message], Message]]) -> ClientApp:
    """A ClientApp whose messages go to the handler of their node.

    Nothing is written to Flower's `Context`: it may be stored where secrets must not be.
    """
    app = ClientApp()

    def answer(message: FlowerMessage, context: Context) -> FlowerMessage:
        return FlowerMessage(answered(handler_of(context), message.content), reply_to=message)

    app.train()(answer)
    app.query()(answer)
    return app
