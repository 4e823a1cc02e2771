"""The protobuf messages of our serving protocols, in a descriptor pool of their own.

The default pool knows each name once, so a process that also loads TensorFlow (or a client library with its copies)
would fail on ours. `slotd.binpb` is the compiled form of the .proto files beside this module (`make protos`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from agent.errors import InvalidInput, Overloaded

FOLDER = Path(__file__).parent
POOL = descriptor_pool.DescriptorPool()

for _file in descriptor_pb2.FileDescriptorSet.FromString((FOLDER / "slotd.binpb").read_bytes()).file:
    POOL.Add(_file)  # the compiler writes them in the order of their imports


def message(name: str) -> Any:
    """The class of a message by its full name, such as `tensorflow.TensorProto`. Raises KeyError."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


def parse(kind: Any, data: bytes | memoryview) -> Any:
    """A message of a generated class. Raises InvalidInput, Overloaded if it takes more memory than there is."""
    try:
        return kind.FromString(bytes(data))
    except DecodeError as error:
        if "alloc failed" in str(error):  # the only sign that protobuf gives of it
            raise Overloaded("has too many parts to be parsed in the memory it may have", field="request") from None
        raise InvalidInput(
            f"the bytes are not a {kind.DESCRIPTOR.full_name}",
            field="request",
            hint="check the message type, and that its texts are UTF-8",
        ) from None


PredictRequest = message("tensorflow.serving.PredictRequest")
PredictResponse = message("tensorflow.serving.PredictResponse")
TensorProto = message("tensorflow.TensorProto")
ModelInferRequest = message("inference.ModelInferRequest")
ModelInferResponse = message("inference.ModelInferResponse")
DataType = POOL.FindEnumTypeByName("tensorflow.DataType")
