"""multipart/form-data read into memory and nowhere else, counted while it arrives."""

from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from lrface.serve.limits import Limits, Refused


class _Parts:
    """What the parser calls: collects each part's name and bytes."""

    def __init__(self, names: frozenset[str], limits: Limits):
        self._names, self._limits = names, limits
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._data: bytearray = bytearray()
        self.found: dict[str, list[bytes]] = {}
        self.whole = False

    def on_part_begin(self) -> None:
        self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def on_headers_finished(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name", b"").decode("utf-8", "replace")
        if name not in self._names:
            wanted = " and ".join(sorted(self._names))
            raise Refused(422, "unknown_field", f"the form has a field of another name than {wanted}")
        if sum(map(len, self.found.values())) >= self._limits.images:
            raise Refused(413, "too_many_images", f"a request takes at most {self._limits.images} images")
        self._data = bytearray()
        self.found.setdefault(name, [])
        self._name = name

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def on_part_end(self) -> None:
        self.found[self._name].append(bytes(self._data))
        self._data = bytearray()

    def on_end(self) -> None:
        self.whole = True


async def read_upload(
    content_type: str | None, body: AsyncIterator[bytes], names: frozenset[str], limits: Limits
) -> dict[str, list[bytes]]:
    """The parts of a form by name; file names and types that the client says are not looked at.

    Args:
        names: fields that the form may have.

    Raises:
        Refused: 415 for another type than multipart/form-data, 422 for a damaged form or a field of another name, 413
            for more bytes or images than the limits allow, as soon as they have arrived.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Refused(415, "wrong_type", "the body must be multipart/form-data with a boundary")
    parts = _Parts(names, limits)
    callbacks = {
        name: getattr(parts, name)
        for name in (
            "on_part_begin",
            "on_header_field",
            "on_header_value",
            "on_header_end",
            "on_headers_finished",
            "on_part_data",
            "on_part_end",
            "on_end",
        )
    }
    size = 0
    try:
        parser = MultipartParser(options[b"boundary"], callbacks)  # type: ignore[arg-type]
        async for chunk in body:
            size += len(chunk)
            if size > limits.upload:
                raise too_large(limits)
            parser.write(chunk)
        parser.finalize()
    except FormParserError:
        parts.whole = False
    if not parts.whole:
        raise Refused(422, "damaged_form", "the multipart form is damaged or cut off")
    return parts.found


def too_large(limits: Limits) -> Refused:
    return Refused(413, "too_large", f"the body is larger than the {limits.upload} bytes allowed")
