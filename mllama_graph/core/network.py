"""The network interface over which another host is reached. Imports no torch."""

import fcntl
import socket
import struct

# Linux ioctl: the IPv4 address of an interface, and where it lies in the answer.
SIOCGIFADDR, ADDRESS = 0x8915, slice(20, 24)


def interface_towards(address: str) -> str | None:
    """The interface with the IPv4 address from which packets to `address` leave; None where that can't be found.

    For an address of this host itself, it is the interface that has the address.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Connecting a UDP socket sends nothing; the system only chooses a route.
            probe.connect((address, 9))
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                try:
                    found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
                except OSError:
                    # An interface without an IPv4 address.
                    continue
                if found[ADDRESS] == own:
                    return name
    except OSError:
        pass
    return None
