"""The one piece of the protocol buffer encoding that is read by hand, of ONNX files and of requests."""

from __future__ import annotations


def read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends. Raises IndexError if it is cut short, ValueError beyond ten bytes.

    Source: protobuf.dev, "Encoding", base 128 varints.
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
