"""Requests that protobuf cannot parse, so that the caller still learns which field is to blame.

gRPC answers a failed parse with UNKNOWN and protobuf does not say where it failed. Nearly always a string is not UTF-8:
the same bytes are parsed again with every string declared as bytes, and the first one that does not decode is named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import DecodeError, Message

from service.errors import InvalidField


@dataclass(frozen=True, slots=True)
class Malformed:
    """The bytes of a request that are not a message of the type they should be."""

    message_class: type[Message]
    content: bytes

    def explain(self) -> InvalidField:
        """Return the error that names the field, or the message if nothing better is known."""
        descriptor = cast(Descriptor, self.message_class.DESCRIPTOR)  # upb's class says the same and is not it
        try:
            lenient = _lenient_class(descriptor).FromString(self.content)
        except DecodeError:
            return InvalidField(descriptor.name, self.content[:32], "these bytes are not such a message")
        found = _find(lenient, descriptor, "")
        return found or InvalidField(descriptor.name, self.content[:32], "these bytes are not such a message")


def tolerant(message_class: type[Message]) -> Callable[[bytes], Message | Malformed]:
    """Return a deserializer that never raises."""

    def parse(content: bytes) -> Message | Malformed:
        try:
            return message_class.FromString(content)
        except DecodeError:
            return Malformed(message_class, content)

    return parse


@cache
def _lenient_class(descriptor: Descriptor) -> type[Message]:
    """Return the same message type with every string declared as bytes."""
    pool = descriptor_pool.DescriptorPool()
    _add_lenient(pool, descriptor.file, set())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(descriptor.full_name))


def _add_lenient(pool: descriptor_pool.DescriptorPool, file: FileDescriptor, added: set[str]) -> None:
    if file.name in added:
        return
    added.add(file.name)
    for dependency in file.dependencies:
        _add_lenient(pool, dependency, added)
    copy = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(copy)
    for message in copy.message_type:
        _strings_to_bytes(message)
    pool.Add(copy)


def _strings_to_bytes(message: descriptor_pb2.DescriptorProto) -> None:
    for field in message.field:
        if field.type == descriptor_pb2.FieldDescriptorProto.TYPE_STRING:
            field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    for nested in message.nested_type:
        if not nested.options.map_entry:  # a map's key cannot be bytes
            _strings_to_bytes(nested)


def _find(message: Message, original: Descriptor, prefix: str) -> InvalidField | None:
    for field, value in message.ListFields():
        declared = original.fields_by_name[field.name]
        is_list = isinstance(value, list) or hasattr(value, "append")
        for i, element in enumerate(value if is_list else [value]):
            path = f"{prefix}{field.name}" + (f"[{i}]" if is_list else "")
            found = None
            if declared.type == FieldDescriptor.TYPE_STRING and isinstance(element, bytes):
                found = _decode_error(path, element)
            elif isinstance(element, Message) and declared.message_type is not None:
                found = _find(element, declared.message_type, f"{path}.")
            if found is not None:
                return found
    return None


def _decode_error(path: str, value: bytes) -> InvalidField | None:
    try:
        value.decode()
    except UnicodeDecodeError as error:
        around = value[error.start : error.start + 8]
        return InvalidField(path, around, f"must be UTF-8, is not at byte {error.start}")
    return None
