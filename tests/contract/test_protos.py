"""The protos say what design and clients rely on, and the generated files are theirs."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor

from attendant.v1 import generation_pb2, inference_service_pb2, model_service_pb2

ROOT = Path(__file__).parents[2]
FILES: list[FileDescriptor] = [pb.DESCRIPTOR for pb in (generation_pb2, inference_service_pb2, model_service_pb2)]
MESSAGES: list[Descriptor] = [message for file in FILES for message in file.message_types_by_name.values()]


def tool(name: str, *arguments: str) -> None:
    command = [Path(sys.executable).with_name(name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_buf_finds_nothing():
    tool("buf", "lint", "proto")


def test_nothing_that_was_published_is_broken():
    tool("buf", "breaking", "proto", "--against", "proto/baseline.binpb")


def test_committed_stubs_are_what_the_protos_generate(tmp_path):
    """Only for files with a service is there a file of services."""
    protos = sorted((ROOT / "proto").glob("attendant/*/*.proto"))
    with_service = [path for path in protos if "\nservice " in path.read_text()]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I", ROOT / "proto"]
    subprocess.run([*protoc, f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", *protos], check=True, cwd=ROOT)
    subprocess.run([*protoc, f"--grpc_python_out={tmp_path}", *with_service], check=True, cwd=ROOT)
    generated = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*.py*")}
    committed = (ROOT / "proto").rglob("*_pb2*.py*")
    assert generated == {
        path.relative_to(ROOT / "proto"): path.read_text() for path in committed if "__pycache__" not in path.parts
    }


def test_stubs_load_under_protobuf_6_and_7():
    """Generated code of version 6 runs under the next major version too; code of 7 would refuse 6."""
    for path in (ROOT / "proto").rglob("*_pb2.py"):
        assert "# Protobuf Python Version: 6." in path.read_text(), path


@pytest.mark.parametrize(
    "message", [generation_pb2.SamplingParams, generation_pb2.StopConditions, generation_pb2.OutputOptions]
)
def test_a_request_tells_zero_from_absent(message):
    for field in message.DESCRIPTOR.fields:
        assert field.is_repeated or field.has_presence, f"{field.full_name} cannot be absent"


def test_requests_have_no_plain_number_or_flag_whose_zero_would_mean_something():
    plain = {FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE}
    # Documented where it is declared: a page of 0 is the default page.
    allowed = {"attendant.v1.ListModelsRequest.page_size"}
    for message in MESSAGES:
        if message.name.endswith("Request"):
            for field in message.fields:
                if not (field.is_repeated or field.has_presence or field.cpp_type in plain):
                    assert field.full_name in allowed


def test_the_zero_of_every_enum_is_unspecified():
    for file in FILES:
        for enum in file.enum_types_by_name.values():
            assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")


def test_every_request_that_runs_a_model_names_it_first():
    for method in inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods:
        assert method.input_type.fields_by_number[1].name == "model", method.full_name


def test_only_generation_and_explanation_stream_and_only_towards_the_caller():
    streams = {
        method.name: (method.client_streaming, method.server_streaming)
        for file in FILES
        for service in file.services_by_name.values()
        for method in service.methods
        if method.client_streaming or method.server_streaming
    }
    assert streams == {"Generate": (False, True), "Explain": (False, True)}
