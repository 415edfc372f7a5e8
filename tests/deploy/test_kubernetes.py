"""What `kubectl apply -k` would send, for every overlay and every component that it can take in."""

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.app import process
from service.settings import Settings

OVERLAYS = ("cpu", "gpu")
OPTIONAL = ("models-image", "models-init", "prometheus-operator", "keda", "hpa", "inference-pool")
VARIANTS = [(overlay, component) for overlay in OVERLAYS for component in ("", *OPTIONAL)]
OLDEST, OLDEST_WITH_IMAGE_VOLUMES, NEWEST = "1.30", "1.31", "1.37"
CLUSTER_WIDE = {"Namespace", "PriorityClass"}
POD_LABELS = {"app.kubernetes.io/name": "attendant"}


@pytest.fixture(params=VARIANTS, ids=lambda variant: "+".join(filter(None, variant)))
def objects(request, render) -> list[dict[str, Any]]:
    return render(*request.param)


def only(objects: list[dict[str, Any]], kind: str, name: str = "attendant") -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


@pytest.fixture
def pod(objects) -> dict[str, Any]:
    return only(objects, "Deployment")["spec"]["template"]["spec"]


def is_built_in(each: dict[str, Any]) -> bool:
    group = each["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith("k8s.io") and group.count(".") == 2)


def test_the_schemas_of_the_oldest_and_the_newest_kubernetes_accept_every_object(render) -> None:
    different = {}
    for variant in VARIANTS:
        oldest = OLDEST_WITH_IMAGE_VOLUMES if "models-image" in variant else OLDEST
        built_in = filter(is_built_in, render(*variant))
        different |= {(version, json.dumps(each)): each for each in built_in for version in (oldest, NEWEST)}
    assert len(different) > 30
    for (version, _), each in different.items():
        kubernetes_validate.validate(each, version, strict=True)


def test_a_misspelt_field_would_be_found(render) -> None:
    deployment = yaml.safe_load(yaml.safe_dump(only(render("cpu"), "Deployment")))
    deployment["spec"]["minReadySecond"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, NEWEST, strict=True)


def test_every_name_that_is_referred_to_exists(objects, pod) -> None:
    defined = {(each["kind"], each["metadata"]["name"]) for each in objects}
    for each in objects:
        assert each["kind"] in CLUSTER_WIDE or each["metadata"]["namespace"] == "attendant"
    needed = {("ServiceAccount", pod["serviceAccountName"]), ("PriorityClass", pod["priorityClassName"])}
    containers = [*pod.get("initContainers", ()), *pod["containers"]]
    needed |= {("ConfigMap", source["configMapRef"]["name"]) for each in containers for source in each["envFrom"]}
    for volume in pod["volumes"]:
        if "configMap" in volume:
            needed.add(("ConfigMap", volume["configMap"]["name"]))
        if "persistentVolumeClaim" in volume:
            needed.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    assert needed <= defined
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for each in containers for mount in each["volumeMounts"]} == volumes


def test_every_selector_selects_the_pods_and_clients_are_chosen_by_their_own_label(objects) -> None:
    deployment = only(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels.items() >= POD_LABELS.items()
    selectors = [deployment["spec"]["selector"]["matchLabels"]]
    selectors += [each["spec"]["selector"] for each in objects if each["kind"] == "Service"]
    selectors.append(only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    spread = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    selectors += [each["labelSelector"]["matchLabels"] for each in spread]
    assert len(selectors) == 6
    assert all(selector == POD_LABELS for selector in selectors)
    policy = only(objects, "NetworkPolicy")["spec"]
    clients, prometheus = policy["ingress"]
    assert clients["from"][0]["podSelector"] == {"matchLabels": {"attendant-client": "true"}}
    assert [clients["ports"], prometheus["ports"]] == [[{"port": "grpc"}], [{"port": "metrics"}]]
    assert policy["egress"] == []


def test_the_pods_meet_the_restricted_pod_security_standard(objects, pod) -> None:
    namespace = only(objects, "Namespace")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"
    context = pod["securityContext"]
    assert context["runAsNonRoot"]
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        own = container["securityContext"]
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert own["readOnlyRootFilesystem"]
        assert not own["allowPrivilegeEscalation"]
        assert not own["privileged"]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
    }
    assert {key for volume in pod["volumes"] for key in volume} <= allowed | {"name", "secret"}
    assert pod["automountServiceAccountToken"] is False
    assert only(objects, "ServiceAccount")["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "the server refuses variables that it does not know"


def test_what_the_image_writes_to_and_who_it_runs_as_is_what_the_pod_gives(objects, pod, dockerfile) -> None:
    (user,) = [each.value for each in dockerfile if each.word == "USER"]
    assert user == f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    (server,) = pod["containers"]
    for container in pod.get("initContainers", ()):
        assert container["image"] == server["image"]
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    variables = dict(word.split("=", 1) for each in dockerfile if each.word == "ENV" for word in each.words)
    assert mounts.keys() == {variables["ATTENDANT_REPOSITORY"], variables["ATTENDANT_STATE_DIR"], "/tmp"}
    assert mounts["/models"]["readOnly"]
    by_name = {volume["name"]: volume for volume in pod["volumes"]}
    for name in ("state", "tmp"):
        assert re.fullmatch(r"\d+Mi", by_name[name]["emptyDir"]["sizeLimit"])
    (exposed,) = [each.words for each in dockerfile if each.word == "EXPOSE"]
    assert [str(port["containerPort"]) for port in server["ports"]] == exposed
    targets = {each.value.split()[-1] for each in dockerfile if each.word == "FROM"}
    assert server["image"].startswith("attendant:")
    assert server["image"].partition(":")[2] in targets


def test_every_setting_is_one_that_the_server_knows(objects, monkeypatch, tmp_path) -> None:
    (settings,) = [each for each in objects if re.fullmatch(r"attendant-[a-z0-9]{10}", each["metadata"]["name"])]
    for name, value in settings["data"].items():
        assert name.removeprefix("ATTENDANT_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    Settings(repository=tmp_path)


def test_the_grace_period_holds_the_whole_drain(objects, pod, monkeypatch, tmp_path) -> None:
    (settings,) = [each for each in objects if re.fullmatch(r"attendant-[a-z0-9]{10}", each["metadata"]["name"])]
    for name, value in settings["data"].items():
        monkeypatch.setenv(name, value)
    chosen = Settings(repository=tmp_path)
    asleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    longest = asleep + chosen.drain_delay_seconds + chosen.drain_seconds + process.WATCHDOG_SECONDS
    assert pod["terminationGracePeriodSeconds"] >= longest
    readiness = pod["containers"][0]["readinessProbe"]
    assert chosen.drain_delay_seconds >= readiness["periodSeconds"]


def test_the_probes_ask_the_health_service_by_names_that_it_has(pod) -> None:
    (server,) = pod["containers"]
    for probe in ("startup", "readiness", "liveness"):
        assert server[f"{probe}Probe"]["grpc"] == {"port": 8001, "service": probe}
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600


def test_an_update_never_takes_the_last_ready_pod(objects) -> None:
    spec = only(objects, "Deployment")["spec"]
    update = spec["strategy"]["rollingUpdate"]
    assert (update["maxSurge"], update["maxUnavailable"]) in ((1, 0), (0, 1))
    scaler = [each["spec"] for each in objects if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    least = [each.get("minReplicas", each.get("minReplicaCount")) for each in scaler] or [spec["replicas"]]
    assert "replicas" not in spec or not scaler, "the autoscaler's count would be undone by each apply"
    assert least == [2]
    assert spec["progressDeadlineSeconds"] > spec["minReadySeconds"] + 600
    assert only(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_a_pod_gets_whole_cores_and_as_much_as_it_asks_for(pod) -> None:
    resources = pod["containers"][0]["resources"]
    assert float(resources["limits"]["cpu"]).is_integer()
    for name, amount in resources["requests"].items():
        assert resources["limits"][name] == amount


def test_a_gpu_pod_runs_where_gpus_are_and_a_cpu_pod_asks_for_none(render) -> None:
    cpu, gpu = (only(render(overlay), "Deployment")["spec"]["template"]["spec"] for overlay in OVERLAYS)
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert gpu["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert gpu["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert "nvidia" not in yaml.safe_dump(cpu)


def test_two_services_reach_the_same_port_by_name_and_by_address(objects) -> None:
    headless, plain = only(objects, "Service", "attendant-headless"), only(objects, "Service")
    assert (headless["spec"]["clusterIP"], plain["spec"]["type"]) == ("None", "ClusterIP")
    for service in (headless, plain):
        assert service["spec"]["ports"] == [
            {"name": "grpc", "port": 8001, "targetPort": "grpc", "appProtocol": "kubernetes.io/h2c"}
        ]


def test_every_component_is_in_an_overlay(root) -> None:
    components = {path.name for path in Path(root, "deploy/kubernetes/components").iterdir()}
    for overlay in OVERLAYS:
        text = Path(root, "deploy/kubernetes/overlays", overlay, "kustomization.yaml").read_text()
        named = set(re.findall(r"- \.\./\.\./components/([\w-]+)", text))
        assert named == components - ({"gpu"} if overlay == "cpu" else set())


def test_the_pod_that_fills_the_volume_is_as_restricted_and_fills_the_servers_claim(root, render) -> None:
    loader = yaml.safe_load(Path(root, "deploy/kubernetes/components/models-pvc/loader.yaml").read_text())
    kubernetes_validate.validate(loader, OLDEST, strict=True)
    server = only(render("cpu"), "Deployment")["spec"]["template"]["spec"]
    assert loader["spec"]["securityContext"].items() <= server["securityContext"].items()
    assert loader["spec"]["containers"][0]["securityContext"] == server["containers"][0]["securityContext"]
    (volume,) = loader["spec"]["volumes"]
    claims = [
        each["persistentVolumeClaim"]["claimName"] for each in server["volumes"] if "persistentVolumeClaim" in each
    ]
    assert claims == [volume["persistentVolumeClaim"]["claimName"]]
