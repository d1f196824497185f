"""PUT requests with a body, which the WebSocket library refuses, on the same port."""

_MAX_HEADERS = 2**14  # bytes


def make_connection_class(max_bytes: int) -> type:
    """Returns a class of connections that reads the body of a PUT request into `body`.

    The request goes on as a GET without a body; `body` is None for every other request. A body over
    the size, or of unknown size, is not read: `is_too_large` is True.

    Args:
      max_bytes: greatest size of a body.

    Raises:
      ImportError: websockets is missing.
    """
    from websockets.asyncio.server import ServerConnection

    class UploadConnection(ServerConnection):
        """A connection whose first bytes may be a PUT request; state until these have arrived."""

        body: bytes | None = None
        is_too_large = False
        _start: bytes | None = b""  # bytes before it is known what they are; None afterwards

        def data_received(self, data: bytes) -> None:
            """Hands on the bytes, or keeps them until a PUT request is complete."""
            if self._start is None:
                super().data_received(data)
                return
            self._start += data
            ready = self._ready(self._start)
            if ready is not None:
                self._start = None
                super().data_received(ready)

        def _ready(self, start: bytes) -> bytes | None:
            """Returns the bytes to hand on; None = more are needed."""
            if not start.startswith(b"PUT "[: len(start)]):
                return start
            head, end, body = start.partition(b"\r\n\r\n")
            if not end:
                return start if len(start) > _MAX_HEADERS else None
            lines = head.split(b"\r\n")
            size = _body_size(lines)
            self.is_too_large = size is None or size > max_bytes
            if size is not None and not self.is_too_large:
                if len(body) < size:
                    return None
                self.body = body[:size]
            kept = [line for line in lines if not _describes_body(line)]
            return b"\r\n".join([b"GET" + kept[0][3:], *kept[1:], b"", b""])

    return UploadConnection


def _describes_body(line: bytes) -> bool:
    name = line.partition(b":")[0].strip().lower()
    return name in (b"content-length", b"transfer-encoding", b"expect")


def _body_size(lines: list[bytes]) -> int | None:
    """Returns the size of the body; None if the request does not say."""
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return int(value)
    return None
