"""Fetches pictures from hosts that the operator allows. Every hop's address is checked, and connected to as checked.

A name may resolve to another address at each look-up (DNS rebinding), so the connection is made to the very address
that was checked, and a redirect is a new request with all checks.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

from mllama_graph.core.errors import UserError

HOPS, SECONDS, CONNECT_SECONDS = 3, 15.0, 5.0
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
# NAT64 (RFC 6052) and 6to4: an IPv4 address within an IPv6 one, which a translator would reach.
_EMBEDDING = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2002::/16"))


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, not of this machine, a private network or a group."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        elif ip.teredo or any(ip in network for network in _EMBEDDING):
            return False
    return ip.is_global and not ip.is_multicast


class Fetcher:
    """Fetches from `hosts`: names, `*.example.com` for all names below one, or `*` for all; `name:port` for a port.

    `most`: the largest picture in bytes. `public` decides which addresses may be connected to.
    """

    def __init__(self, hosts: Sequence[str], most: int, public: Callable[[str], bool] = is_public):
        self._hosts, self._most, self._public = [host.lower() for host in hosts], most, public

    def fetch(self, url: str) -> bytes:
        """The bytes at an address. Raises UserError with the reason."""
        until = time.monotonic() + SECONDS
        for _ in range(HOPS + 1):
            try:
                data, redirect = self._get(url, until)
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = "it took too long" if time.monotonic() >= until else f"{type(error).__name__}"
                raise UserError(f"it can't be fetched: {why}.") from error
            if redirect is None:
                return data
            url = urljoin(url, redirect)
        raise UserError(f"it is redirected more than {HOPS} times.")

    def _get(self, url: str, until: float) -> tuple[bytes, str | None]:
        """The bytes at an address, or where it is redirected to."""
        parts = urlsplit(url)
        port = self._checked(parts)
        host = parts.hostname or ""
        address = self._resolved(host, port)
        left = max(0.1, until - time.monotonic())
        connection = _Pinned(host, port, address, min(left, CONNECT_SECONDS), parts.scheme == "https")
        # A peer that sends a byte at a time would renew every timeout of the socket.
        timer = threading.Timer(left, connection.cut)
        timer.daemon = True
        timer.start()
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "mllama_graph"}
            connection.request("GET", target, headers=headers)
            answer = connection.getresponse()
            if answer.status in REDIRECTS and (location := answer.getheader("location")):
                return b"", location
            if answer.status != 200:
                raise UserError(f"its host answered {answer.status}.")
            kind = (answer.getheader("content-type") or "").partition(";")[0].strip().lower()
            if not kind.startswith("image/") and kind != "application/octet-stream":
                raise UserError(f"its host sends {kind[:60] or 'no type'}, not a picture.")
            data = answer.read(self._most + 1)
            if len(data) > self._most:
                raise UserError(f"it has more than {self._most / (1 << 20):g} MiB.")
            return data, None
        finally:
            timer.cancel()
            connection.close()

    def _checked(self, parts: SplitResult) -> int:
        """The port of an address that may be fetched."""
        if parts.scheme not in PORTS:
            raise UserError("only http: and https: addresses are fetched.")
        if parts.username is not None or parts.password is not None:
            raise UserError("an address with a user name is not fetched.")
        host, port = (parts.hostname or "").lower().rstrip("."), parts.port or PORTS[parts.scheme]
        for allowed in self._hosts:
            name, colon, own = allowed.partition(":")
            if colon and own != str(port) or not colon and port != PORTS[parts.scheme]:
                continue
            if name in ("*", host) or name.startswith("*.") and host.endswith(name[1:]):
                return port
        raise UserError(f"its host {host[:80]}:{port} is not one of the server's fetch_hosts=.")

    def _resolved(self, host: str, port: int) -> str:
        """The address of a host. Refused if any of its addresses is not public."""
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        if not found or not all(map(self._public, found)):
            raise UserError("its host has an address that is not of the public internet.")
        return sorted(found, key=lambda address: (":" in address, address))[0]


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, with the host's name for its Host header and certificate."""

    def __init__(self, host: str, port: int, address: str, timeout: float, tls: bool):
        super().__init__(host, port, timeout=timeout)
        self._address, self._tls = address, tls
        self.default_port = PORTS["https" if tls else "http"]

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._tls:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

    def cut(self) -> None:
        """End the connection from another thread."""
        if self.sock is not None:
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return
