"""Settings come from flags and environment; whatever is unknown or out of range is an error that helps."""

from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("ATTENDANT_"):
            monkeypatch.delenv(name)


def reason(*arguments: str) -> str:
    with pytest.raises(SettingsError) as refused:
        load_settings(arguments)
    return str(refused.value)


def test_every_field_is_described_and_is_a_flag_and_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = {
        "repository": ("there", Path("there")),
        "models": ("a,b/2", ("a", "b/2")),
        "host": ("::1", "::1"),
        "provider": ("cpu", "cpu"),
        "kv_memory": ("2GiB", 2 << 30),
        "max_prompt_bytes": ("1KiB", 1024),
        "max_message_bytes": ("8MiB", 8 << 20),
        "seq_buckets": ("16, 32", (16, 32)),
        "state_dir": ("kept", Path("kept")),
        "canary_rate": ("0.5", 0.5),
        "reflection": ("false", False),
        "cuda_graphs": ("false", False),
        "log_level": ("debug", "debug"),
    }
    for name, field in Settings.model_fields.items():
        assert field.description, name
        text, value = examples.get(name, ("7", 7))
        with monkeypatch.context() as environment:
            environment.setenv("ATTENDANT_REPOSITORY", "somewhere")
            environment.setenv(f"ATTENDANT_{name.upper()}", text)
            assert getattr(load_settings([]), name) == value
            if field.annotation is not bool:
                environment.setenv(f"ATTENDANT_{name.upper()}", "cpu" if name == "provider" else "6")
                flags = ["--" + name.replace("_", "-"), text]
                if name == "log_level":
                    environment.delenv("ATTENDANT_LOG_LEVEL")
                assert getattr(load_settings(flags), name) == value, "a flag wins over the environment"
    assert not load_settings(["--repository", "x", "--no-reflection"]).reflection


def test_defaults_fit_the_machine() -> None:
    settings = load_settings(["--repository", "x"])
    assert settings.threads >= 1
    assert settings.kv_memory > 1 << 20
    assert (settings.port, settings.metrics_port) == (8001, 8002)


def test_a_gpu_decides_itself_what_states_take_unless_it_is_told() -> None:
    assert load_settings(["--repository", "x", "--provider", "cuda"]).states_memory is None
    assert load_settings(["--repository", "x", "--provider", "cuda", "--kv-memory", "3GiB"]).states_memory == 3 << 30
    on_cpu = load_settings(["--repository", "x"])
    assert on_cpu.states_memory == on_cpu.kv_memory


def test_an_unknown_flag_lists_what_it_may_have_meant() -> None:
    text = reason("--repository", "x", "--max-num-seq", "3")
    assert "--max-num-seq" in text
    assert "did you mean --max-num-seqs" in text


def test_flags_are_not_abbreviated() -> None:
    assert "--repo" in reason("--repo", "x")


def test_an_unknown_variable_lists_what_it_may_have_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENDANT_THREAD", "3")
    text = reason("--repository", "x")
    assert "ATTENDANT_THREAD" in text
    assert "did you mean ATTENDANT_THREADS" in text


def test_the_clients_variables_are_not_the_servers_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENDANT_SERVER", "localhost:1")
    monkeypatch.setenv("ATTENDANT_MODEL", "m")
    load_settings(["--repository", "x"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ATTENDANT_SERVICE_HOST", "10.0.0.7"),
        ("ATTENDANT_SERVICE_PORT_GRPC", "8001"),
        ("ATTENDANT_PORT_8001_TCP_ADDR", "10.0.0.7"),
        ("ATTENDANT_HEADLESS_PORT", "tcp://10.0.0.7:8001"),
        ("ATTENDANT_PORT", "tcp://10.0.0.7:8001"),
        ("ATTENDANT_METRICS_PORT", "tcp://10.0.0.7:8002"),
    ],
)
def test_service_links_of_kubernetes_are_explained(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    text = reason("--repository", "x")
    assert name in text
    assert "enableServiceLinks: false" in text


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--max-num-seqs", "0", "greater than or equal to 1"),
        ("--port", "70000", "65535"),
        ("--port", "http", "integer"),
        ("--kv-memory", "much", "byte"),
        ("--seq-buckets", "64,32", "rise"),
        ("--provider", "abacus", "cuda"),
        ("--max-prompt-bytes", "8MiB", "max_message_bytes"),
        ("--drain-seconds", "nan", "86400"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(flag: str, value: str, words: str) -> None:
    text = reason("--repository", "x", flag, value)
    assert flag in text or flag[2:].replace("-", "_") in text
    assert words in text


def test_a_missing_repository_is_named() -> None:
    assert "--repository (ATTENDANT_REPOSITORY) is needed" in reason()


def test_all_problems_are_reported_at_once() -> None:
    text = reason("--port", "x", "--theads", "3")
    assert all(words in text for words in ("--port", "--threads", "--repository"))
