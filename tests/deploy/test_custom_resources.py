"""Objects of other projects' kinds, against typed models.

KEDA's and the Prometheus operator's come from their CRDs; for the Gateway API they are ours, of the fields used.
"""

import re
import runpy
from typing import Any, Literal

import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.metrics import ServerMetrics

GAUGE = "attendant_predicted_queue_seconds"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metadata(Strict):
    name: str
    namespace: str
    labels: dict[str, str] = {}


class Port(Strict):
    number: int = Field(ge=1, le=65535)


class PickerReference(Strict):
    group: str = ""
    kind: str = "Service"
    name: str
    port: Port
    failureMode: Literal["FailOpen", "FailClose"] = "FailClose"


class LabelSelector(Strict):
    matchLabels: dict[str, str] = Field(min_length=1)


class PoolSpec(Strict):
    selector: LabelSelector
    targetPorts: list[Port] = Field(min_length=1, max_length=8)
    appProtocol: Literal["http", "kubernetes.io/h2c"] = "http"
    endpointPickerRef: PickerReference


class InferencePool(Strict):
    apiVersion: Literal["inference.networking.k8s.io/v1"]
    kind: Literal["InferencePool"]
    metadata: Metadata
    spec: PoolSpec


class ParentReference(Strict):
    name: str


class Path(Strict):
    type: Literal["Exact", "PathPrefix", "RegularExpression"]
    value: str = Field(pattern="^/")


class Match(Strict):
    path: Path


class Backend(Strict):
    group: str = ""
    kind: str = "Service"
    name: str


class Timeouts(Strict):
    request: str = Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")


class Rule(Strict):
    matches: list[Match]
    backendRefs: list[Backend]
    timeouts: Timeouts


class RouteSpec(Strict):
    parentRefs: list[ParentReference]
    rules: list[Rule]


class HTTPRoute(Strict):
    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    metadata: Metadata
    spec: RouteSpec


KINDS: dict[str, tuple[str, type[BaseModel]]] = {
    "ScaledObject": ("keda", ScaledObject),
    "PodMonitor": ("prometheus-operator", PodMonitor),
    "PrometheusRule": ("prometheus-operator", PrometheusRule),
    "InferencePool": ("inference-pool", InferencePool),
    "HTTPRoute": ("inference-pool", HTTPRoute),
}


@pytest.fixture
def find(render):
    def find(component: str, kind: str) -> dict[str, Any]:
        (found,) = [each for each in render("cpu", component) if each["kind"] == kind]
        return found

    return find


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_s_own_model_accepts_it_and_would_find_a_misspelt_field(find, kind: str) -> None:
    component, model = KINDS[kind]
    found = find(component, kind)
    model.model_validate(found, extra="forbid")
    with pytest.raises(ValidationError, match="misspelt"):
        model.model_validate(found | {"spec": found["spec"] | {"misspelt": 1}}, extra="forbid")


def test_the_models_know_every_kind_that_kubernetes_does_not(render) -> None:
    custom = {
        each["kind"]
        for component in ("keda", "prometheus-operator", "inference-pool")
        for each in render("cpu", component)
        if "." in each["apiVersion"] and not each["apiVersion"].startswith(("networking.k8s.io", "scheduling.k8s.io"))
    }
    assert custom == KINDS.keys()


def test_both_autoscalers_rest_on_the_predicted_queue_and_behave_alike(find) -> None:
    assert GAUGE in {family.name for family in ServerMetrics((64,)).registry.collect()}
    keda, hpa = find("keda", "ScaledObject")["spec"], find("hpa", "HorizontalPodAutoscaler")["spec"]
    (metric,) = hpa["metrics"]
    (trigger,) = keda["triggers"]
    assert metric["pods"]["metric"]["name"] == GAUGE
    assert set(re.findall(r"attendant_\w+", trigger["metadata"]["query"])) == {GAUGE}
    assert trigger["metricType"] == metric["pods"]["target"]["type"] == "AverageValue"
    assert trigger["metadata"]["threshold"] == metric["pods"]["target"]["averageValue"]
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert keda["scaleTargetRef"] == hpa["scaleTargetRef"]


def test_the_gateway_sends_our_services_to_the_port_of_the_pods(find) -> None:
    pool, route = find("inference-pool", "InferencePool"), find("inference-pool", "HTTPRoute")
    (rule,) = route["spec"]["rules"]
    assert rule["backendRefs"][0]["name"] == pool["metadata"]["name"]
    served = {match["path"]["value"] for match in rule["matches"]}
    assert served == {"/attendant.v1.InferenceService", "/attendant.v1.ModelService"}
    deployment = find("inference-pool", "Deployment")["spec"]["template"]
    ports = {port["name"]: port["containerPort"] for port in deployment["spec"]["containers"][0]["ports"]}
    assert pool["spec"]["targetPorts"] == [{"number": ports["grpc"]}]
    assert pool["spec"]["selector"]["matchLabels"].items() <= deployment["metadata"]["labels"].items()


def test_the_operator_gets_the_rules_that_promtool_tests(root, find) -> None:
    script = runpy.run_path(str(root / "deploy/kubernetes/prometheus_rule.py"))
    assert script["TARGET"].read_text() == script["prometheus_rule"](), (
        "deploy/prometheus has changed: run deploy/kubernetes/prometheus_rule.py"
    )
    written = [yaml.safe_load(path.read_text()) for path in sorted((root / "deploy/prometheus").glob("*.yml"))]
    groups = [group for each in written for group in each.get("groups", ())]
    assert groups
    assert find("prometheus-operator", "PrometheusRule")["spec"]["groups"] == groups
