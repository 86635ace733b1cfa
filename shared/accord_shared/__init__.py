"""What the coordinator and the sites must agree on to the byte."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("accord-federated")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0+source"

PROTOCOL_VERSION = 1
"""Version of the messages between coordinator and site; a different number is refused."""
