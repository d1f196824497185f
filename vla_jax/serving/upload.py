"""PUT requests with a body, which the WebSocket library refuses, on the same port."""

from collections.abc import Callable
from typing import Any

_MAX_HEADERS = 2**14  # bytes


def make_connection_class(max_bytes: int, allowed: Callable[[str, str], bool]) -> type:
    """Returns a class of connections that reads the body of a PUT request into `body`.

    The request goes on as a GET without a body; `body` is None for every other request. A body over
    the size, or of unknown size, is not read: `is_too_large` is True. Neither is one that is not
    allowed: its bytes are dropped, and the answer to the request says why.

    Args:
      max_bytes: greatest size of a body.
      allowed: (path, header Authorization) -> whether a body is read at all.

    Raises:
      ImportError: websockets is missing.
    """
    from websockets.asyncio.server import ServerConnection

    class UploadConnection(ServerConnection):
        """A connection whose first bytes may be a PUT request; state until these have arrived."""

        body: bytes | None = None
        is_too_large = False

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._passes = False  # the bytes that come are not of a PUT request
            self._drops = False  # they are after its body, or of one that is not read
            self._bytes = bytearray()  # that have come before, without the head once it is known
            self._head: bytes | None = None  # to hand on when the body is complete
            self._size: int | None = None  # bytes of the body; None = there is none to read

        def data_received(self, data: bytes) -> None:
            """Hands on the bytes, or keeps them until a PUT request is complete."""
            if self._passes:
                super().data_received(data)
            if self._passes or self._drops:
                return
            self._bytes += data
            if self._head is None and not self._read_head():
                return
            if self._size is not None:
                if len(self._bytes) < self._size:
                    return
                self.body = bytes(self._bytes[: self._size])
            self._passes, self._drops = self._head is None, self._head is not None
            head, self._bytes = self._head or bytes(self._bytes), bytearray()
            super().data_received(head)

        def _read_head(self) -> bool:
            """Looks at the first bytes; returns False if more are needed."""
            start = bytes(self._bytes[: _MAX_HEADERS + 4])
            if not start.startswith(b"PUT "[: len(start)]):
                return True
            head, end, _ = start.partition(b"\r\n\r\n")
            if not end:
                return len(start) > _MAX_HEADERS
            del self._bytes[: len(head) + len(end)]
            lines = head.split(b"\r\n")
            size, path = _body_size(lines), lines[0].split(b" ")[1].decode("latin-1")
            if allowed(path, _header(lines, b"authorization")):
                self.is_too_large = size is None or size > max_bytes
                self._size = None if self.is_too_large else size
            kept = [line for line in lines if not _describes_body(line)]
            self._head = b"\r\n".join([b"GET" + kept[0][3:], *kept[1:], b"", b""])
            return True

    return UploadConnection


def _describes_body(line: bytes) -> bool:
    name = line.partition(b":")[0].strip().lower()
    return name in (b"content-length", b"transfer-encoding", b"expect")


def _body_size(lines: list[bytes]) -> int | None:
    """Returns the size of the body; None if the request does not say."""
    value = _header(lines, b"content-length")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None


def _header(lines: list[bytes], wanted: bytes) -> str:
    """Returns the value of a header, "" without it."""
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == wanted:
            return value.strip().decode("latin-1")
    return ""
