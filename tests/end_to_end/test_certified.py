"""A server with a state directory certifies what it loads for the machine that it runs on."""

import json

from attendant.processor import processor_features
from attendant.v1 import model_service_pb2 as models_pb


def test_a_model_is_certified_at_its_first_load_and_known_as_such_afterwards(start, tmp_path) -> None:
    state = tmp_path / "state"
    arguments = ("--models", "tiny-fp32", "--state-dir", str(state))
    first = start(*arguments).wait_ready()
    model = first.models.GetModel(models_pb.GetModelRequest(model="tiny-fp32")).model
    assert model.certified_on == " ".join(processor_features())
    (path,) = state.glob("certificate-*.json")
    kept = json.loads(path.read_text())
    assert kept["of"]["sha256"] == model.bundle_sha256
    measured = {(check.name, check.measured, check.bound, check.grid) for check in model.checks}
    assert {tuple(check.values()) for check in kept["checks"]} <= measured
    assert "is certified on" in first.log.read_text()
    first.signal()
    assert first.wait() == 0
    second = start(*arguments).wait_ready()
    again = second.models.GetModel(models_pb.GetModelRequest(model="tiny-fp32")).model
    assert again.certified_at == model.certified_at
    assert "was certified on" in second.log.read_text()


def test_without_a_state_directory_nothing_is_certified_and_everything_is_checked(server) -> None:
    model = server.models.GetModel(models_pb.GetModelRequest(model="tiny-fp32")).model
    assert (model.certified_on, model.HasField("certified_at")) == ("", False)
    assert "golden replay" in {check.name for check in model.checks}
