"""Downloads with httpx that reach public addresses only, unless the caller allows others.

A name is resolved once, every address that it has is checked, and the connection goes to a checked one: neither a
redirect nor a second answer of the name server leads elsewhere.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from typing import BinaryIO

import httpx

MAX_REDIRECTS = 10
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also where IPv6 wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        wrapped.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        if not all(v4.is_global for v4 in wrapped if v4 is not None):
            return False
    return ip.is_global and not ip.is_multicast


class _Transport(httpx.HTTPTransport):
    """Sends a request to an address of its host that was checked; the name stays in the header and in TLS."""

    def __init__(self, private: bool) -> None:
        super().__init__(trust_env=False, retries=1)
        self._private = private

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if url.scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"it redirects to {str(url)[:80]!r}")
        if not self._private:
            try:
                found = socket.getaddrinfo(url.host, url.port or 0, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as e:
                raise httpx.ConnectError(getattr(e, "strerror", None) or str(e)) from None
            addresses = [str(entry[4][0]) for entry in found]
            if not addresses or not all(map(is_public, addresses)):
                raise httpx.ConnectError(f"{url.host} is a private, local or reserved address, which is not allowed")
            request.extensions = {**request.extensions, "sni_hostname": url.raw_host.decode("ascii")}
            request.url = url.copy_with(host=addresses[0])
        try:
            return super().handle_request(request)
        finally:
            request.url = url  # what redirects are relative to


def download(
    url: str, file: BinaryIO, *, max_bytes: int, timeout: float, patience: float, private: bool = False
) -> bool:
    """Writes what an address holds.

    Args:
      url: http or https; spaces and letters beyond ASCII are encoded.
      max_bytes: that may come.
      timeout: seconds to wait for the other side to send something.
      patience: seconds that the whole may take.
      private: allow addresses that are not of the public internet.
    Returns:
      False where there is more than `max_bytes`.
    Raises:
      OSError, httpx.HTTPError, httpx.InvalidURL, ValueError: it cannot be fetched.
    """
    headers = {"User-Agent": "omni-jax", "Accept-Encoding": "identity"}
    size, ends = 0, time.monotonic() + patience
    # httpx applies proxies of the environment only without a transport; with one, the check above would not hold.
    with (
        httpx.Client(
            transport=_Transport(private), follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=timeout
        ) as client,
        client.stream("GET", url, headers=headers) as response,
    ):
        if response.is_error:
            raise OSError(f"{response.status_code} {response.reason_phrase}")
        declared = response.headers.get("Content-Length", "")
        if declared.isdigit() and int(declared) > max_bytes:
            return False
        for block in response.iter_bytes():
            size += len(block)
            if size > max_bytes:
                return False
            if time.monotonic() > ends:
                raise OSError(f"only {size} bytes came in {patience:.0f} s")
            file.write(block)
    return True
