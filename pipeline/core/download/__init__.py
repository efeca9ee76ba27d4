"""Downloads of files over HTTP: in pieces side by side, hashed while they arrive, resumed after a
kill.

`session` has all files of a download, `attempt` one try at a file, `partial` what is on the disk
of it, `remote` any range of it on the server, `answers` whether an answer is what was asked for.
"""

from .partial import bytes_kept, discard
from .remote import Locate, Location, read_range
from .session import Content, Downloads

__all__ = [
    "Content",
    "Downloads",
    "Locate",
    "Location",
    "bytes_kept",
    "discard",
    "read_range",
]
