"""Downloads of files over HTTP: in parallel pieces, hashed while they arrive, resumed after a kill.

`session` has all files of a download, `attempt` one try at a file, `partial` its bytes on the disk,
`remote` its ranges on the server, `answers` checks the server's responses.
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
