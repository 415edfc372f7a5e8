"""The manifest schema refuses whatever it does not know or cannot believe."""

import copy
import hashlib
import json

import pytest

from attendant.bundle import BundleError, GraphKind, Manifest, Role, StateRule, read_manifest

SHA = "0" * 64
KV = ["rows", 2, "capacity", 8]


def manifest() -> dict:
    """A small decoder's manifest as JSON has it."""
    tensor = lambda name, role, dtype, axes: {"name": name, "role": role, "dtype": dtype, "axes": axes}  # noqa: E731
    return {
        "schema_version": 1,
        "name": "tiny",
        "version": 3,
        "family": "decoder",
        "tasks": ["generate"],
        "precision": "fp32",
        "target": "cpu",
        "limits": {"max_model_len": 64},
        "vocabulary": {"file": "tokenizer.json", "size": 320, "eos_token_ids": [2]},
        "graphs": [
            {
                "kind": "step",
                "file": "step.onnx",
                "data": "step.onnx.data",
                "inputs": [
                    tensor("token_ids", "token_ids", "int64", ["rows", "tokens"]),
                    tensor("lengths", "lengths", "int32", ["rows"]),
                    tensor("past.0.key", "state", "float32", KV),
                ],
                "outputs": [
                    tensor("logits", "logits", "float32", ["logit_rows", 320]),
                    tensor("present.0.key", "state", "float32", KV),
                ],
            }
        ],
        "states": [
            {
                "name": "0.key",
                "rule": "append",
                "dtype": "float32",
                "axes": KV,
                "input": "past.0.key",
                "output": "present.0.key",
            }
        ],
        "files": [
            {"name": name, "bytes": 1, "sha256": SHA}
            for name in ("step.onnx", "step.onnx.data", "tokenizer.json", "golden.npz")
        ],
        "golden": {
            "file": "golden.npz",
            "bound": 1e-4,
            "log_likelihood_bound": 0.01,
            "bitwise": False,
            "bitwise_on": ["x86_64"],
        },
        "certificate": {"checks": [{"name": "parity", "measured": 1e-6, "bound": 1e-4, "grid": "1-64"}]},
        "provenance": {"source": "random", "licence": "Apache-2.0"},
        "producer": {"versions": {"torch": "2"}, "created": "2026-11-21"},
    }


@pytest.fixture
def write(tmp_path):
    def write(content: dict | str | bytes):
        text = json.dumps(content) if isinstance(content, dict) else content
        (tmp_path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return write


def edited(path: str, value: object) -> dict:
    """The manifest with one value put in at a dotted path; None removes it."""
    content = copy.deepcopy(manifest())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = content
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


def test_a_good_manifest_is_read_with_its_identity(write):
    directory = write(manifest())
    read, identity = read_manifest(directory)
    assert (read.key, read.limits.max_model_len) == ("tiny/3", 64)
    assert identity == hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    step = read.graph(GraphKind.STEP)
    assert step.input(Role.LENGTHS).name == "lengths" and step.output(Role.HIDDEN) is None
    assert read.graph(GraphKind.ENCODE) is None and read.states[0].rule is StateRule.APPEND


def test_what_is_written_is_read_back_the_same(write):
    read, _ = read_manifest(write(manifest()))
    again, _ = read_manifest(write(read.to_json()))
    assert again == read
    assert read.to_json() == again.to_json()


def test_it_cannot_be_changed():
    read = Manifest.model_validate_json(json.dumps(manifest()))
    with pytest.raises(ValueError, match="frozen"):
        read.version = 4


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("comment", "hello", "comment: Extra inputs"),
        ("graphs.0.inputs.0.shape", [1], "shape: Extra inputs"),
        ("schema_version", 2, "schema_version"),
        ("name", "Tiny Model", "name: "),
        ("name", "../tiny", "name: "),
        ("version", 0, "version: "),
        ("version", "3", "version: "),
        ("version", 3.0, "version: "),
        ("family", "Oracle!", "family: "),
        ("tasks", ["generate", "sing"], "tasks.1: "),
        ("precision", "int3", "precision: "),
        ("limits", None, "limits: Field required"),
        ("limits.max_model_len", 1, "max_model_len: "),
        ("graphs", [], "graphs: "),
        ("graphs.0.file", "../step.onnx", "file: "),
        ("graphs.0.file", "other.onnx", "differ"),
        ("graphs.0.inputs.0.axes", ["rows", "time"], "unknown axis 'time'"),
        ("graphs.0.inputs.0.axes", ["rows", 0], "axis 0 is not positive"),
        ("graphs.0.inputs.0.dtype", "int128", "dtype: "),
        ("graphs.0.inputs.0.role", "magic", "role: "),
        ("graphs.0.inputs.1.name", "token_ids", "names repeat"),
        ("graphs.0.outputs.1.axes", ["rows", 4, "capacity", 8], "differ in dtype or axes"),
        ("graphs.0.inputs.2.dtype", "float16", "differ in dtype or axes"),
        ("graphs.0.kind", "encode", "needs a step graph and a vocabulary"),
        ("vocabulary", None, "differ"),
        ("states", [], "state inputs differ"),
        ("states.0.output", None, "no output"),
        ("states.0.rule", "replace", "axis 'capacity'"),
        ("states.0.axes", ["capacity", 2, "rows", 8], "first axis"),
        ("states.0.input", "past.1.key", "inputs differ"),
        ("states.0.window", 0, "window: "),
        ("files.0.sha256", "abc", "sha256: "),
        ("files.0.bytes", -1, "bytes: "),
        ("files.3", {"name": "extra.bin", "bytes": 1, "sha256": SHA}, "differ"),
        ("certificate", None, "certificate: Field required"),
        ("certificate.checks", [], "checks: "),
        ("certificate.checks.0.measured", 2e-4, "check parity failed: 0.0002 > 0.0001"),
        ("certificate.checks.0.measured", "NaN", "measured: Input should be a valid number"),
        ("golden", None, "golden: Field required"),
        ("golden.bound", 0.0, "bound: "),
        ("provenance.licence", None, "licence: Field required"),
        ("sampling_defaults", {"temperature": 11.0}, "temperature: "),
    ],
)
def test_one_wrong_value_is_named_with_the_file(write, path, value, said):
    with pytest.raises(BundleError, match=r"manifest\.json: ") as refused:
        read_manifest(write(edited(path, value)))
    assert said in str(refused.value)


def test_a_quality_beyond_its_bound_is_no_certificate(write):
    quality = {
        "perplexity": 10.3,
        "reference_perplexity": 10.0,
        "relative_increase": 0.03,
        "standard_error": 0.001,
        "num_tokens": 16384,
        "text": "some text",
        "bound": 0.015,
    }
    assert read_manifest(write(edited("certificate.quality", quality | {"relative_increase": 0.01})))
    with pytest.raises(BundleError, match=r"perplexity rose by 3\.00%, allowed 1\.50%"):
        read_manifest(write(edited("certificate.quality", quality)))


def test_two_graphs_of_one_kind_are_one_too_many(write):
    content = manifest()
    content["graphs"] *= 2
    with pytest.raises(BundleError, match="one graph of each kind"):
        read_manifest(write(content))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", b"\xff", '{"name": "tiny", "name": "tiny"}', "{" * 5000])
def test_what_is_no_manifest_is_refused(write, content):
    with pytest.raises(BundleError, match=r"manifest\.json: "):
        read_manifest(write(content))


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(BundleError, match="No such file"):
        read_manifest(tmp_path)


def encoder_manifest(task: str, axes: list, **changes: object) -> dict:
    """The manifest of an encoder with one head."""
    content = manifest()
    tensor = {"name": "logits", "role": "logits", "dtype": "float32", "axes": axes}
    content["graphs"][0] |= {"kind": "encode", "outputs": [tensor]}
    content["graphs"][0]["inputs"].pop()
    content["vocabulary"]["mask_token_id"] = 3
    content |= {"tasks": [task], "states": [], "classes": {"labels": ["a", "b"]}}
    return content | changes


@pytest.mark.parametrize(
    ("task", "axes"),
    [
        ("classify", ["rows", 2]),
        ("tag", ["rows", "tokens", 2]),
        ("fill_mask", ["logit_rows", 320]),
        ("score", ["rows", 1]),
    ],
)
def test_each_task_of_an_encoder_has_logits_of_its_own_shape(write, task, axes):
    assert read_manifest(write(encoder_manifest(task, axes)))[0].tasks == (task,)
    with pytest.raises(BundleError, match=f"task {task} needs an encode graph with logits"):
        read_manifest(write(encoder_manifest(task, ["rows", "tokens", "logit_rows", 2])))


@pytest.mark.parametrize(
    ("task", "axes", "changes", "said"),
    [
        ("classify", ["rows", 2], {"classes": None}, "needs `classes`"),
        ("classify", ["rows", 3], {}, "one for each of its logits"),
        ("tag", ["rows", "tokens", 3], {}, "one for each of its logits"),
        ("score", ["rows", 2], {}, "exactly one logit"),
        ("fill_mask", ["logit_rows", 9], {"vocabulary": {"file": "tokenizer.json", "size": 9}}, "mask_token_id"),
    ],
)
def test_what_a_task_of_an_encoder_needs_is_demanded(write, task, axes, changes, said):
    with pytest.raises(BundleError, match=said):
        read_manifest(write(encoder_manifest(task, axes, **changes)))


def explained() -> dict:
    """The same decoder with an explain graph of one layer."""
    document = manifest()
    document["tasks"].append("explain")
    document["graphs"].append(
        {
            "kind": "explain",
            "file": "explain.onnx",
            "data": "step.onnx.data",
            "inputs": [{"name": "token_ids", "role": "token_ids", "dtype": "int64", "axes": [1, "tokens"]}],
            "outputs": [{"name": "self.0", "role": "weights", "dtype": "float32", "axes": [1, 2, "tokens", "tokens"]}],
        }
    )
    document["files"].append({"name": "explain.onnx", "bytes": 1, "sha256": SHA})
    shown = {"output": "self.0", "kind": "self", "layer": 0, "title": "self", "rows": "tokens", "columns": "tokens"}
    document["explain"] = {"weights": [shown | {"right": 0}]}
    return document


def test_an_explain_graph_may_read_the_tensors_of_another_graph(write):
    read, _ = read_manifest(write(explained()))
    assert read.graph(GraphKind.EXPLAIN).data == read.graph(GraphKind.STEP).data
    assert (read.explain.weights[0].left, read.explain.weights[0].right) == (None, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document.pop("explain"), "weights that `explain` describes differ"),
        (lambda document: document["explain"]["weights"][0].update(output="self.1"), "describes differ"),
        (lambda document: document["tasks"].remove("explain"), "have the task explain"),
        (lambda document: document["graphs"][1]["outputs"][0].update(role="hidden"), "role weights"),
        (lambda document: document["graphs"][1]["outputs"][0].update(axes=[2, "tokens", "tokens"]), "four axes"),
        (lambda document: document["explain"]["weights"][0].update(columns="patches"), "need `grid`"),
        (lambda document: document["explain"]["weights"][0].update(rows="pixels"), "rows: "),
        (lambda document: document["explain"]["weights"][0].update(left=-1), "left: "),
    ],
)
def test_weights_are_described_one_by_one(write, change, said):
    document = explained()
    change(document)
    with pytest.raises(BundleError, match=said):
        read_manifest(write(document))
