"""What an operator can choose: flags of `python -m service`, or the same names as ATTENDANT_* in the environment.

A flag wins over the environment, the environment over the default. An unknown name of either kind is an error that
lists what it may have meant: a misspelt limit that is silently ignored is found out under load.
"""

import argparse
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_PREFIX = "ATTENDANT_"
# What Kubernetes puts into every container for a Service named "attendant" or "attendant-...".
_SERVICE_LINK = re.compile(r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
# Names of the command-line client, which may be set in the same shell.
_CLIENT_NAMES = frozenset({"ATTENDANT_SERVER", "ATTENDANT_MODEL"})
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")
_LINK_HINT = (
    "Kubernetes sets such variables for a Service of that name; put `enableServiceLinks: false` into the pod's spec"
)


class SettingsError(ValueError):
    """The settings cannot be taken; one line for each reason."""


def _available_cores() -> int:
    """Return the cores this process may use: its affinity, or less under a cgroup quota."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.strip().isdecimal():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _half_of_available_memory() -> ByteSize:
    """Return half of what the machine, or the cgroup, can still give: the other half is for weights and scratch."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    available = int(found[1]) * 1024 if found else 2 << 30
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdecimal() and used.isdecimal():
        available = min(available, max(0, int(limit) - int(used)))
    return ByteSize(available // 2)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


class Settings(BaseSettings):
    """Everything that can be chosen; names end in their unit, sizes in bytes take suffixes (512MiB, 2GiB)."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid", validate_default=True)

    repository: Path = Field(description="directory of bundles, <repository>/<name>/<version>/")
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description='bundles to load, by commas: "name" (its newest version) or "name/version"; all if empty'
    )
    host: str = Field("0.0.0.0", description="address to listen on")
    port: int = Field(8001, ge=0, le=65535, description="TCP port of gRPC; 0 takes a free one")
    metrics_port: int = Field(
        8002, ge=0, le=65535, description="TCP port of /metrics, /healthz, /readyz; 0 takes a free one"
    )
    provider: Literal["cpu", "cuda"] = Field(
        "cpu",
        description="what runs the graphs; cuda is the first GPU that the process sees, needs the package "
        "onnxruntime-gpu, and serves what was exported for it",
    )
    cuda_graphs: bool = Field(
        True,
        description="capture a GPU's decode runs before serving, and replay them; without, each kernel is launched",
    )
    threads: int = Field(
        default_factory=_available_cores,
        ge=1,
        le=1024,
        description="ONNX Runtime threads, shared by all bundles; the available cores if unset",
    )
    text_threads: int = Field(2, ge=1, le=64, description="threads that render and tokenise")
    max_num_seqs: int = Field(32, ge=1, le=1024, description="sequences of one bundle that run at once (slots)")
    max_waiting_requests: int = Field(
        256, ge=0, le=1_000_000, description="requests of one bundle that wait for a slot before more are refused"
    )
    kv_memory: ByteSize = Field(
        default_factory=_half_of_available_memory,
        ge=1,
        description="bytes for the KV states of all bundles together; half of the available memory if unset, or most "
        "of a GPU's: there it decides how many of max_num_seqs run at once",
    )
    idle_release_seconds: float = Field(
        300.0, ge=0.1, le=86400, description="seconds without work before the states of old prompts leave memory"
    )
    prefill_chunk_tokens: int = Field(
        256, ge=4, le=1 << 20, description="longest prefill step, in tokens, while other sequences decode"
    )
    idle_chunk_tokens: int = Field(
        512, ge=4, le=1 << 20, description="longest prefill step, in tokens, while nothing decodes"
    )
    inter_token_target_seconds: float = Field(
        0.1,
        ge=0,
        le=60,
        description="seconds between two tokens of a stream: prompts are read beside it in steps that take no longer, "
        "once it is learned what they take; in steps of prefill_chunk_tokens if 0",
    )
    ageing_seconds: float = Field(
        10.0, gt=0, le=3600, description="seconds in the queue after which a request counts as one priority more urgent"
    )
    max_batch_tokens: int = Field(
        1024, ge=1, le=1 << 20, description="most tokens, padding included, that an encoder reads at once"
    )
    max_batch_delay_seconds: float = Field(
        0.005, ge=0, le=60, description="most seconds that an encoder waits for company where that pays; never if 0"
    )
    max_prompt_bytes: ByteSize = Field(
        ByteSize(256 << 10), ge=1, description="bytes of text in one prompt or conversation, before tokenising"
    )
    max_message_bytes: ByteSize = Field(
        ByteSize(4 << 20), ge=1024, le=1 << 30, description="bytes of one gRPC message, either way"
    )
    canary_rate: float = Field(
        0.01, ge=0, le=1, description="share of finished greedy requests that are computed again, alone, and compared"
    )
    restart_tries: int = Field(
        6, ge=0, le=1000, description="times in a row that a bundle is loaded again after its engine has failed"
    )
    restart_delay_seconds: float = Field(
        1.0,
        ge=0,
        le=3600,
        description="seconds before the first of them; each further one waits twice as long, up to 60",
    )
    drain_delay_seconds: float = Field(
        0.0, ge=0, le=3600, description="seconds between not ready and refusing requests, after SIGTERM"
    )
    drain_seconds: float = Field(
        30.0, ge=0, le=86400, description="seconds that running requests get to finish, after that"
    )
    keepalive_seconds: float = Field(
        30.0, ge=1, le=86400, description="seconds of silence after which a connection is pinged"
    )
    keepalive_timeout_seconds: float = Field(
        10.0, ge=0.1, le=3600, description="seconds without an answer to a ping before a connection is closed"
    )
    max_connection_age_seconds: float = Field(
        0.0,
        ge=0,
        le=86400,
        description="seconds after which a client is asked to connect anew, and finds new servers, while its running "
        "requests go on; never if 0",
    )
    seq_buckets: Annotated[tuple[int, ...], NoDecode] = Field(
        (64, 128, 256, 512, 1024, 2048, 4096),
        description="upper bounds, in tokens, of the metrics' label seq_bucket, by commas",
    )
    slo_first_token_seconds: float = Field(
        0.5, gt=0, le=3600, description="objective: seconds to the first token; requests are counted by it"
    )
    slo_inter_token_seconds: float = Field(
        0.05, gt=0, le=60, description="objective: seconds between a request's tokens, on average; requests count by it"
    )
    state_dir: Path | None = Field(
        None,
        description="directory that keeps, across restarts, what was learned of latency and what was measured at a "
        "bundle's first load on this device; nothing is kept if unset",
    )
    reflection: bool = Field(True, description="serve gRPC reflection")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    @field_validator("models", "seq_buckets", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("seq_buckets")
    @classmethod
    def _rises(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(bound < 1 for bound in value) or sorted(set(value)) != list(value) or not 1 <= len(value) <= 16:
            raise ValueError("must be 1 to 16 positive numbers that rise")
        return value

    @property
    def states_memory(self) -> int | None:
        """Bytes for the states of all bundles; None where a GPU's free memory decides."""
        decided = self.provider == "cpu" or "kv_memory" in self.model_fields_set
        return int(self.kv_memory) if decided else None

    @model_validator(mode="after")
    def _prompt_fits_message(self) -> Self:
        if self.max_prompt_bytes > self.max_message_bytes:
            raise ValueError(
                f"max_prompt_bytes {int(self.max_prompt_bytes)} is more than max_message_bytes "
                f"{int(self.max_message_bytes)}"
            )
        return self


def load_settings(arguments: Sequence[str]) -> Settings:
    """Read the settings from flags and the process's environment.

    Args:
        arguments: the command line, without the program's name.

    Raises:
        SettingsError: a name is unknown, a value is missing or cannot be taken.
        SystemExit: `--help` was printed.
    """
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    flags = [f"--{_kebab(name)}" for name in Settings.model_fields]
    problems = [f"unknown argument {argument!r}{_meant(argument, flags)}" for argument in rest]
    problems += _unknown_names(os.environ)
    values = {name: value for name, value in vars(given).items() if value is not None}
    try:
        settings = Settings(**values)
    except ValidationError as error:
        problems += [_explain(detail) for detail in error.errors(include_url=False)]
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m service",
        description="Serve a repository of bundles over gRPC.",
        epilog="Every flag is also an environment variable: --max-num-seqs is ATTENDANT_MAX_NUM_SEQS.",
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        text = (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(
                f"--{_kebab(name)}", dest=name, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            parser.add_argument(f"--{_kebab(name)}", dest=name, metavar="…", help=text + _shown_default(field))
    return parser


def _shown_default(field: FieldInfo) -> str:
    default: Any = field.default
    if field.is_required() or field.default_factory is not None or default in ((), None):
        return ""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f" (default {shown.human_readable() if isinstance(shown, ByteSize) else shown})"


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _meant(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.partition("=")[0], known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _unknown_names(environment: Mapping[str, str]) -> list[str]:
    known = [_PREFIX + name.upper() for name in Settings.model_fields]
    problems = []
    for name in sorted(environment):
        if not name.startswith(_PREFIX) or name in known or name in _CLIENT_NAMES:
            continue
        hint = _meant(name, known)
        if _SERVICE_LINK.fullmatch(name.removeprefix(_PREFIX)):
            hint = f". {_LINK_HINT}"
        problems.append(f"unknown environment variable {name}{hint}")
    return problems


def _explain(detail: Any) -> str:
    """Turn one finding of pydantic into a line that names flag, variable, value and limit."""
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    name = str(detail["loc"][0])
    names = f"--{_kebab(name)} ({_PREFIX}{name.upper()})"
    if detail["type"] == "missing":
        return f"{names} is needed"
    hint = f". {_LINK_HINT}" if _LINK_VALUE.match(str(detail["input"])) else ""
    return f"{names} is {str(detail['input'])!r}: {message}{hint}"
