"""The bundle manifest: the one thing that export writes and the service reads.

A bundle is a directory `<repository>/<name>/<version>/` that holds `manifest.json` and the files it lists.
The manifest says everything: every graph with every input and output, its dtype, axes and role; every state a
sequence must remember and the rule that governs it; limits, vocabulary, provenance; and the certificate,
without which nothing is served. The reader guesses nothing, and an unknown field is an error.

It knows neither how a graph is made nor how it is run.
"""

import hashlib
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

# The dynamic axes a graph may have; every other axis is a number.
ROWS = "rows"  # sequences that run together
TOKENS = "tokens"  # new tokens of each row
CAPACITY = "capacity"  # positions a row of an `append` state can hold
LOGIT_ROWS = "logit_rows"  # positions whose logits are wanted
SOURCE = "source"  # positions of the source that a sequence is written about
ADJUSTMENTS = "adjustments"  # tokens of each row whose logits are changed before the choice
AXES = frozenset({ROWS, TOKENS, CAPACITY, LOGIT_ROWS, SOURCE, ADJUSTMENTS})

# What a sample graph answers where it chooses no token.
NOT_FINITE = -1  # the row holds NaN or positive infinity
NOT_RANKED = -2  # the draw falls behind the tokens that the graph ranks: the host has to choose

# The axes of an encoder's logits before the last one, by task.
_LOGIT_AXES: dict[str, tuple[str, ...]] = {
    "classify": (ROWS,),
    "score": (ROWS,),
    "tag": (ROWS, TOKENS),
    "fill_mask": (LOGIT_ROWS,),
}

Axis = int | str
ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
FamilyName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class BundleError(ValueError):
    """A bundle cannot be read; the message says which and why."""


class DType(StrEnum):
    """Element types, by their numpy names (bfloat16 has none in numpy and is named as ONNX does)."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    UINT8 = "uint8"
    INT32 = "int32"
    INT64 = "int64"
    BOOL = "bool"


class StateRule(StrEnum):
    """What happens to a state between two steps."""

    APPEND = "append"
    """Written in place at each row's own next positions; past and present share memory."""
    RING = "ring"
    """As `replace`; the graph itself writes position p at p mod its capacity."""
    REPLACE = "replace"
    """The graph's output is the next step's input, through a second buffer."""
    FIXED = "fixed"
    """Made once per request, with a length of its own, and only read afterwards."""


class Role(StrEnum):
    """What a graph's input or output means to whoever runs the graph."""

    TOKEN_IDS = "token_ids"
    """[rows, tokens] int64: new tokens."""
    POSITIONS = "positions"
    """[rows, tokens] int64: absolute positions of the new tokens."""
    LENGTHS = "lengths"
    """[rows] int32: tokens of each row after this step, the new ones included."""
    TOTAL_LENGTH = "total_length"
    """[] int32: the capacity of the `append` states; equal to `tokens` it means "no row has a past"."""
    LOGITS_INDEX = "logits_index"
    """[logit_rows] int64: flat positions row * tokens + token whose logits are wanted; never empty."""
    SEGMENT_IDS = "segment_ids"
    """[rows, tokens] int64: which text of a pair a token belongs to, 0 or 1."""
    SOURCE_IDS = "source_ids"
    """[rows, source] int64: tokens of the source, where `token_ids` are those of the target."""
    SOURCE_LENGTHS = "source_lengths"
    """[rows] int32: valid positions of each row's `fixed` states, or of its source_ids."""
    NOISE = "noise"
    """Uniform or Gumbel noise that makes sampling inside a graph repeatable."""
    IMAGE = "image"
    """[rows, channels, height, width] float32."""
    AUDIO = "audio"
    """[rows, frames, features] float32."""
    LOGITS = "logits"
    """[logit_rows, vocabulary], [rows, classes] or [rows, tokens, classes] float32."""
    HIDDEN = "hidden"
    """[rows, tokens, width]: the last layer's output."""
    WEIGHTS = "weights"
    """[1, heads, rows, columns] float32: attention weights, of explain graphs only; `explain` says of what."""
    INVERSE_TEMPERATURE = "inverse_temperature"
    """[rows] float32: what a row's logits are multiplied by; 0 takes the most likely token."""
    TOP_K = "top_k"
    """[rows] int64: how many of the most likely tokens are candidates; 0 is all."""
    TOP_P = "top_p"
    """[rows] float64: as many of the most likely tokens are candidates as have this share of the probability."""
    MIN_P = "min_p"
    """[rows] float32: candidates have at least this share of the most likely token's probability."""
    UNIFORM = "uniform"
    """[rows] float64 in [0, 1): which of the candidates is chosen."""
    ADJUSTED_IDS = "adjusted_ids"
    """[rows, adjustments] int64: tokens whose logits change; what repeats a token repeats its three numbers, too."""
    REPETITION = "repetition"
    """[rows, adjustments] float32: positive logits are divided by it, others multiplied; 1 changes nothing."""
    PENALTY = "penalty"
    """[rows, adjustments] float32: subtracted then."""
    BIAS = "bias"
    """[rows, adjustments] float32: added last; negative infinity forbids the token."""
    CHOICES = "choices"
    """[rows] int64: the chosen token of each row, or `NOT_FINITE`, or `NOT_RANKED`."""
    LOGPROBS = "logprobs"
    """[rows] float32: natural log-probability of each row's choice under its unchanged logits."""
    TOP_IDS = "top_ids"
    """[rows, N] int64: the most likely tokens, the best first, and of equals the lower id."""
    TOP_LOGPROBS = "top_logprobs"
    """[rows, N] float32: their natural log-probabilities."""
    STATE = "state"
    """A state of the manifest, named by its `input`, `output` or `made`."""


class GraphKind(StrEnum):
    """What a graph is run for."""

    STEP = "step"
    """Prefill and decode: any number of rows and new tokens."""
    ENCODE = "encode"
    """The whole work of an encoder; or, where something is generated about a source, what is made of that, once."""
    EXPLAIN = "explain"
    """Attention weights on request; never on the hot path."""
    SAMPLE = "sample"
    """Chooses a token from each row of the step graph's logits where they are, on the device, if no row has filters."""
    SAMPLE_FILTERED = "sample_filtered"
    """The same with filters: top_k, top_p and min_p."""
    LOGPROBS = "logprobs"
    """Log-probabilities of what was chosen, and of the most likely tokens, for whoever asks."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="strings")


class FileRef(_Frozen):
    """A file of the bundle: `name` beside the manifest, its size in bytes and its hash."""

    name: FileName
    bytes: int = Field(ge=0)
    sha256: Sha256


class TensorSpec(_Frozen):
    """One input or output of a graph. Axes are numbers or names from `AXES`."""

    name: str = Field(min_length=1)
    role: Role
    dtype: DType
    axes: tuple[Axis, ...]

    @model_validator(mode="after")
    def _axes_are_known(self) -> "TensorSpec":
        for axis in self.axes:
            if isinstance(axis, str) and axis not in AXES:
                raise ValueError(f"{self.name}: unknown axis {axis!r}; known: {sorted(AXES)}")
            if isinstance(axis, int) and axis < 1:
                raise ValueError(f"{self.name}: axis {axis} is not positive")
        return self


class GraphSpec(_Frozen):
    """One ONNX graph. Its weights lie in `data`, beside `file`, unless they fit inside it."""

    kind: GraphKind
    file: FileName
    data: FileName | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @model_validator(mode="after")
    def _names_are_unique(self) -> "GraphSpec":
        for tensors in (self.inputs, self.outputs):
            names = [tensor.name for tensor in tensors]
            if len(set(names)) != len(names):
                raise ValueError(f"{self.file}: tensor names repeat: {sorted(names)}")
        return self

    def input(self, role: Role) -> TensorSpec | None:
        """Return the only input of this role, or None."""
        return next((tensor for tensor in self.inputs if tensor.role is role), None)

    def output(self, role: Role) -> TensorSpec | None:
        """Return the only output of this role, or None."""
        return next((tensor for tensor in self.outputs if tensor.role is role), None)


class StateSpec(_Frozen):
    """One tensor that a sequence remembers between steps, and the rule that governs it.

    `axes` begins with "rows". `input` and `output` name the step graph's tensors, `made` the encode graph's output
    that a sequence begins with: a `fixed` state always has one, a `replace` or `ring` state that has none begins as
    zeros. A `fixed` state with an axis "source" is as long as its row's source. With a `window`, positions further
    behind than that are never read again.
    """

    name: str = Field(min_length=1)
    rule: StateRule
    dtype: DType
    axes: tuple[Axis, ...]
    input: str
    output: str | None = None
    made: str | None = None
    window: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _rule_fits(self) -> "StateSpec":
        if not self.axes or self.axes[0] != ROWS:
            raise ValueError(f"state {self.name}: the first axis must be {ROWS!r}, not {self.axes[:1]}")
        if (CAPACITY in self.axes) != (self.rule is StateRule.APPEND):
            raise ValueError(f"state {self.name}: exactly the `append` states have an axis {CAPACITY!r}")
        if (self.output is None) != (self.rule is StateRule.FIXED):
            raise ValueError(f"state {self.name}: exactly the `fixed` states have no output of the step graph")
        if (self.rule is StateRule.FIXED and self.made is None) or (self.rule is StateRule.APPEND and self.made):
            raise ValueError(f"state {self.name}: `fixed` states are made by the encode graph, `append` states never")
        if SOURCE in self.axes and self.rule is not StateRule.FIXED:
            raise ValueError(f"state {self.name}: only `fixed` states have an axis {SOURCE!r}")
        if self.window is not None and self.rule is not StateRule.APPEND:
            raise ValueError(f"state {self.name}: only `append` states have a window")
        return self


class Check(_Frozen):
    """One measured claim of the certificate: `measured` is at most `bound`, over `grid`."""

    name: str
    measured: float
    bound: float
    grid: str

    @property
    def passed(self) -> bool:
        """Whether the measured value keeps the bound (NaN never does)."""
        return self.measured <= self.bound


class Quality(_Frozen):
    """What quantisation cost on real text: perplexities of this bundle and of its fp32 original.

    `relative_increase` is perplexity / reference - 1, `standard_error` that of its paired per-token estimate.
    """

    perplexity: float = Field(gt=0)
    reference_perplexity: float = Field(gt=0)
    relative_increase: float
    standard_error: float = Field(ge=0)
    num_tokens: int = Field(ge=1)
    text: str
    bound: float


class Certificate(_Frozen):
    """Why the bundle may be trusted: every check passed, or the exporter would not have written it."""

    checks: tuple[Check, ...] = Field(min_length=1)
    quality: Quality | None = None

    @model_validator(mode="after")
    def _all_passed(self) -> "Certificate":
        for check in self.checks:
            if not check.passed:
                raise ValueError(f"check {check.name} failed: {check.measured:g} > {check.bound:g}")
        if self.quality is not None and not self.quality.relative_increase <= self.quality.bound:
            raise ValueError(
                f"perplexity rose by {self.quality.relative_increase:.2%}, allowed {self.quality.bound:.2%}"
            )
        return self


class Golden(_Frozen):
    """The recorded run that the service replays before it serves; see docs/bundle.md for the arrays in `file`.

    `bitwise_on` lists the processor features (attendant.processor) of the machine that recorded it: integer
    graphs are compared bit for bit there, and elsewhere by the mean log-likelihood of a text, if they generate, or by 1
    - the mean cosine of vectors, if they embed; within `bound` either way for fp32.
    """

    file: FileName
    bound: float = Field(gt=0)
    log_likelihood_bound: float | None = Field(default=None, gt=0)
    cosine_bound: float | None = Field(default=None, gt=0)
    bitwise: bool
    bitwise_on: tuple[str, ...]


class Vocabulary(_Frozen):
    """The tokenizer file (Hugging Face `tokenizers` format) and the ids with a meaning of their own."""

    file: FileName
    size: int = Field(ge=2)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    """Stands where a token is to be filled in."""
    add_bos: bool = False
    """Whether a plain prompt starts with `bos_token_id`."""
    chat_template: str | None = None
    """A Jinja template over `messages`, `bos_token`, `eos_token` and `add_generation_prompt`."""


class Embedding(_Frozen):
    """How one vector of `width` components is made of a text's tokens, where a request is silent."""

    pooling: Literal["mean", "cls", "max", "last"]
    normalize: bool
    width: int = Field(ge=1)


class Classes(_Frozen):
    """What the logits of a classifying or tagging bundle stand for, in order.

    With `multi_label` each is a question of its own (a sigmoid), otherwise exactly one holds (a softmax).
    """

    labels: tuple[str, ...] = Field(min_length=1)
    multi_label: bool = False


class ImageInput(_Frozen):
    """Images that a bundle takes: their size in pixels, and how a channel's value in [0, 1] becomes a number.

    That is (value - mean) / std, channel by channel; one channel is grey, three are red, green and blue.
    """

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _one_of_each_channel(self) -> "ImageInput":
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} stds for {self.channels} channels")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std {self.std} must be positive")
        return self


class Places(StrEnum):
    """What the rows or the columns of attention weights stand for."""

    TOKENS = "tokens"
    """The tokens of `token_ids`."""
    WRITTEN = "written"
    """What is written after each of `token_ids`, so the first row is that of the first token written."""
    SOURCE = "source"
    """The tokens of `source_ids`."""
    PATCHES = "patches"
    """Patches of the image in reading order, after a class token if the model has one."""
    GLANCE = "glance"
    """The whole image, looked at once."""


class WeightsSpec(_Frozen):
    """What one output of the explain graph, [1, heads, rows, columns], shows.

    `kind` is a name to ask for, `title` what people call it. A row sees so many columns to the `left` and to the
    `right` of its own place, all where None; elsewhere its weights are exactly 0.
    """

    output: str
    kind: FamilyName
    layer: int = Field(ge=0)
    title: str
    rows: Places
    columns: Places
    left: int | None = Field(default=None, ge=0)
    right: int | None = Field(default=None, ge=0)


class Explain(_Frozen):
    """What an explain graph shows; `grid` is that of an image's patches, in rows and columns."""

    weights: tuple[WeightsSpec, ...] = Field(min_length=1)
    grid: tuple[int, int] | None = None
    class_token: bool = False


class SamplingDefaults(_Frozen):
    """What the bundle's authors advise where a request is silent."""

    temperature: float | None = Field(default=None, ge=0, le=10)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)


class Limits(_Frozen):
    """How long things may be, in tokens.

    With a `prefill_chunk` a prompt is always fed in pieces of exactly that many tokens, the last one shorter, because
    the sums of the step graph would round differently with other cuts; at 1, the graph takes one token a step.
    """

    max_model_len: int = Field(ge=2)
    max_source_len: int | None = Field(default=None, ge=1)
    prefill_chunk: int | None = Field(default=None, ge=1)


class Provenance(_Frozen):
    """Where the weights come from and under which licence they may be used."""

    source: str
    licence: str
    recipe: str | None = None
    data: str | None = None
    synthetic: bool = False
    """Random weights, for sizing only."""


class Producer(_Frozen):
    """Versions of what made the bundle, by package name, and the day it was made (ISO 8601)."""

    versions: dict[str, str]
    created: str


class Manifest(_Frozen):
    """All there is to know about a bundle."""

    schema_version: Literal[1] = 1
    name: ModelName
    version: int = Field(ge=1)
    family: FamilyName
    tasks: tuple[Literal["generate", "embed", "classify", "tag", "fill_mask", "score", "explain"], ...]
    precision: Literal["fp32", "int8", "fp16", "bf16"]
    target: Literal["cpu", "cuda"]
    limits: Limits
    vocabulary: Vocabulary | None = None
    source_vocabulary: Vocabulary | None = None
    """Of the source, where it is a text with a vocabulary of its own."""
    image: ImageInput | None = None
    classes: Classes | None = None
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    embedding: Embedding | None = None
    explain: Explain | None = None
    graphs: tuple[GraphSpec, ...] = Field(min_length=1)
    states: tuple[StateSpec, ...] = ()
    files: tuple[FileRef, ...]
    golden: Golden
    certificate: Certificate
    provenance: Provenance
    producer: Producer

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Manifest":
        listed = {file.name for file in self.files}
        named = {self.golden.file}
        for graph in self.graphs:
            named |= {graph.file} | ({graph.data} if graph.data else set())
        named |= {each.file for each in (self.vocabulary, self.source_vocabulary) if each is not None}
        if named != listed:
            raise ValueError(f"files named {sorted(named)} and files listed {sorted(listed)} differ")
        kinds = [graph.kind for graph in self.graphs]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"one graph of each kind at most, not {kinds}")
        if "generate" in self.tasks and (GraphKind.STEP not in kinds or self.vocabulary is None):
            raise ValueError("a generating bundle needs a step graph and a vocabulary")
        if "generate" in self.tasks and self.golden.log_likelihood_bound is None:
            raise ValueError("the golden run of a generating bundle needs a log_likelihood_bound")
        if "embed" in self.tasks and (
            GraphKind.ENCODE not in kinds or self.vocabulary is None or self.embedding is None
        ):
            raise ValueError("an embedding bundle needs an encode graph, a vocabulary and `embedding`")
        self._encodes_its_tasks()
        takes_image = any(graph.input(Role.IMAGE) for graph in self.graphs)
        if takes_image != (self.image is not None):
            raise ValueError("exactly the bundles with a graph that takes an image say in `image` which they take")
        self._states_are_wired()
        self._weights_are_explained()
        self._sampler_fits()
        return self

    def _encodes_its_tasks(self) -> None:
        encode = self.graph(GraphKind.ENCODE)
        logits = encode.output(Role.LOGITS) if encode else None
        for task, axes in _LOGIT_AXES.items():
            if task in self.tasks and (logits is None or logits.axes[:-1] != axes):
                raise ValueError(f"a bundle with the task {task} needs an encode graph with logits of {axes}")
        num_classes = len(self.classes.labels) if self.classes else None
        if {"classify", "tag"} & set(self.tasks) and logits is not None and logits.axes[-1] != num_classes:
            raise ValueError("a bundle that classifies or tags needs `classes`, one for each of its logits")
        if {"tag", "fill_mask", "score"} & set(self.tasks) and self.vocabulary is None:
            raise ValueError("a bundle that tags, fills masks or scores needs a vocabulary")
        if "classify" in self.tasks and self.vocabulary is None and self.image is None:
            raise ValueError("a classifying bundle needs a vocabulary or `image`")
        if "fill_mask" in self.tasks and (self.vocabulary is None or self.vocabulary.mask_token_id is None):
            raise ValueError("a bundle that fills masks needs a mask_token_id")
        if "score" in self.tasks and (logits is None or logits.axes[-1] != 1):
            raise ValueError("a scoring bundle needs exactly one logit")

    def _weights_are_explained(self) -> None:
        graph, told = self.graph(GraphKind.EXPLAIN), () if self.explain is None else self.explain.weights
        outputs = {tensor.name: tensor for tensor in graph.outputs} if graph else {}
        if sorted(outputs) != sorted(spec.output for spec in told):
            raise ValueError("the outputs of the explain graph and the weights that `explain` describes differ")
        if ("explain" in self.tasks) != (graph is not None):
            raise ValueError("exactly the bundles with an explain graph have the task explain")
        for spec in told:
            if outputs[spec.output].role is not Role.WEIGHTS or len(outputs[spec.output].axes) != 4:
                raise ValueError(f"{spec.output}: an output of the explain graph has role weights and four axes")
        shows_patches = any(Places.PATCHES in (spec.rows, spec.columns) for spec in told)
        if shows_patches and self.explain is not None and self.explain.grid is None:
            raise ValueError("weights of patches need `grid`, how many there are")

    def _sampler_fits(self) -> None:
        size = self.vocabulary.size if self.vocabulary else None
        for kind in (GraphKind.SAMPLE, GraphKind.SAMPLE_FILTERED, GraphKind.LOGPROBS):
            graph = self.graph(kind)
            logits = graph.input(Role.LOGITS) if graph else None
            if graph is not None and (logits is None or logits.axes != (ROWS, size)):
                raise ValueError(f"the {kind} graph reads logits of {(ROWS, size)}, not of {logits and logits.axes}")

    def _states_are_wired(self) -> None:
        step = self.graph(GraphKind.STEP)
        state_inputs = {t.name: t for t in step.inputs if t.role is Role.STATE} if step else {}
        state_outputs = {t.name: t for t in step.outputs if t.role is Role.STATE} if step else {}
        if {state.input for state in self.states} != set(state_inputs):
            raise ValueError("the states' inputs and the step graph's state inputs differ")
        if {state.output for state in self.states if state.output} != set(state_outputs):
            raise ValueError("the states' outputs and the step graph's state outputs differ")
        encode = self.graph(GraphKind.ENCODE)
        made = {t.name: t for t in encode.outputs if t.role is Role.STATE} if encode else {}
        if {state.made for state in self.states if state.made} != set(made):
            raise ValueError("the states that are made and the encode graph's state outputs differ")
        for state in self.states:
            tensors = (state_inputs[state.input], state_outputs.get(state.output or ""), made.get(state.made or ""))
            for tensor in tensors:
                if tensor is not None and (tensor.dtype, tensor.axes) != (state.dtype, state.axes):
                    raise ValueError(f"state {state.name} and tensor {tensor.name} differ in dtype or axes")

    @property
    def source(self) -> Literal["text", "image"] | None:
        """What the bundle writes about, if it generates about anything."""
        encode = self.graph(GraphKind.ENCODE)
        if encode is None or self.graph(GraphKind.STEP) is None:
            return None
        return "image" if encode.input(Role.IMAGE) else "text"

    def graph(self, kind: GraphKind) -> GraphSpec | None:
        """Return the graph of this kind, or None."""
        return next((graph for graph in self.graphs if graph.kind is kind), None)

    @property
    def key(self) -> str:
        """The bundle's name on the wire, "name/version"."""
        return f"{self.name}/{self.version}"

    def to_json(self) -> str:
        """Return the text of `manifest.json`: stable, indented, ending in a newline."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """Read `manifest.json` and return it with the SHA-256 of its bytes, the identity of the bundle.

    Raises:
        BundleError: the file is missing, is not JSON, or does not follow the schema.
    """
    path = directory / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}") from error
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(f"{path}: {where}: {first['msg']} ({error.error_count()} error(s))") from error
    return manifest, hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
