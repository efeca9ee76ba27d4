"""What a server tries from inside the sandbox that may listen on one port; a program of its own.

Gets that port, another one, and one that somebody else listens on. Prints as JSON how each ended.
"""

import errno
import json
import socket
import sys

OWN, OTHER, THEIRS = (int(word) for word in sys.argv[1:])
TCP, TCP6 = (socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET6, socket.SOCK_STREAM)
FAST_OPEN = 0x20000000  # MSG_FASTOPEN: connects while it sends


def listen(kind, port, protocol=0):
    with socket.socket(*kind, protocol) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if port is not None:
            own.bind(("::1" if kind is TCP6 else "127.0.0.1", port))
        own.listen()


def connect(kind, host):
    with socket.socket(*kind) as own:
        own.connect((host, THEIRS))


def connect_late():
    with socket.socket(*TCP) as own:
        own.setsockopt(socket.IPPROTO_TCP, 30, 1)  # TCP_FASTOPEN_CONNECT
        own.connect(("127.0.0.1", THEIRS))


def send_at_once(how):
    with socket.socket(*TCP) as own:
        if how == "message":
            own.sendmsg([b"x"], [], FAST_OPEN, ("127.0.0.1", THEIRS))
        else:
            own.sendto(b"x", FAST_OPEN, ("127.0.0.1", THEIRS))


def opened(*kind):
    socket.socket(*kind).close()


TRIES = {
    "listen": lambda: listen(TCP, OWN),
    "listen_6": lambda: listen(TCP6, OWN),
    "listen_elsewhere": lambda: listen(TCP, OTHER),
    "listen_elsewhere_6": lambda: listen(TCP6, OTHER),
    "listen_anywhere": lambda: listen(TCP, 0),
    "listen_unbound": lambda: listen(TCP, None),
    "connect": lambda: connect(TCP, "127.0.0.1"),
    "connect_6": lambda: connect(TCP6, "::ffff:127.0.0.1"),
    "connect_late": connect_late,
    "send_at_once": lambda: send_at_once("bytes"),
    "send_message_at_once": lambda: send_at_once("message"),
    "udp": lambda: opened(socket.AF_INET, socket.SOCK_DGRAM),
    "unix": lambda: opened(socket.AF_UNIX, socket.SOCK_STREAM),
    "netlink": lambda: opened(16, socket.SOCK_RAW),
    "raw": lambda: opened(socket.AF_INET, socket.SOCK_RAW, 1),
    "mptcp": lambda: opened(*TCP, 262),
    "sctp": lambda: opened(*TCP, 132),
}


def outcome(function):
    try:
        function()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return "done"


print(json.dumps({name: outcome(function) for name, function in TRIES.items()}))
