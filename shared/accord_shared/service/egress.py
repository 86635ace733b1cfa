"""The way out of a site's network: straight, or through one HTTP proxy that is asked to CONNECT.

It is one setting for all connections to the coordinator. The variables HTTP_PROXY, HTTPS_PROXY, grpc_proxy, no_proxy
and their like are read by none of them: libraries read different ones, so they would hold for some calls only.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from pydantic import SecretStr

_ADDRESS = re.compile(r"http://(([A-Za-z0-9_.-]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5})/?")


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy. It prints without its credentials."""

    address: str
    """host:port."""
    credentials: SecretStr | None = None
    """user:password, shown by the scheme Basic."""

    @property
    def url(self) -> str:
        """http://host:port."""
        return f"http://{self.address}"

    @property
    def authorization(self) -> str | None:
        """The value of the header `Proxy-Authorization`. It holds the credentials."""
        if self.credentials is None:
            return None
        return "Basic " + base64.b64encode(self.credentials.get_secret_value().encode()).decode()


def proxy_address(url: str) -> str:
    """host:port of a proxy's URL.

    Raises:
        ValueError: it is not http://host:port; the text does not repeat it, since it may hold a password.
    """
    found = _ADDRESS.fullmatch(url)
    if found is None:
        why = " (name credentials by proxy_credentials)" if "@" in url else ""
        raise ValueError(f"proxy is not http://HOST:PORT{why}")
    return found[1]
