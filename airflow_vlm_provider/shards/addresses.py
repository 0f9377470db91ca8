"""Which network addresses a dataset's URLs may lead to.

A worker sits inside a network whose services trust their neighbours, and whose cloud hands out credentials on a
link-local address. So what counts is not how a URL is spelled but the address that it leads to.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Literal

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Reach = Literal["public", "private", "loopback"]
"""How near a root lets its URLs come: the internet only, the local networks too, this machine too."""

_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Where clouds answer with credentials and configuration, beside 169.254.169.254: AWS, Alibaba, Azure, Oracle.
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
)


def address_refusal(address: str, reach: Reach) -> str | None:
    """
    Say why an address must not be connected to.

    :param address: A numeric IPv4 or IPv6 address, as a socket or the resolver gives it.
    :return: What kind of address it is, or None when it is within reach.
    """
    ip = _embedded(ipaddress.ip_address(address.partition("%")[0]))
    if ip.is_link_local:
        return "link-local"
    if ip in _METADATA:
        return "a cloud's metadata service"
    if ip.is_loopback:
        return None if reach == "loopback" else "loopback"
    if ip.is_multicast or ip.is_unspecified or ip.is_reserved or (ip.version == 4 and ip in _THIS_NETWORK):
        return "not a host's"
    if not ip.is_global or (ip.version == 6 and ip.is_site_local):
        return "private" if reach == "public" else None
    return None


def parse_address(host: str) -> Address | None:
    """Read a host as an IP address in any spelling that the resolver takes (``2130706433``, ``0x7f.1``, ...)."""
    try:
        return _embedded(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return ipaddress.ip_address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None


def _embedded(ip: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for: mapped, 6to4 or NAT64."""
    if ip.version == 4:
        return ip
    if ip in _NAT64:
        return ipaddress.ip_address(ip.packed[12:])
    return ip.ipv4_mapped or ip.sixtofour or ip
