"""A recurrent encoder-decoder: the models that attention was invented for, by Bahdanau et al. and by Luong et al.

Shapes: B rows, S source tokens, T target tokens, M memory width (twice that of the encoder), H decoder width, V target
vocabulary. Tokens of a row are right-padded.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.attention.memory import MemoryAttention
from models.attention.normalizers import NORMALIZERS, normalizer_named
from models.attention.scores import SCORES, score_named
from models.checks import check_choices, check_integers, check_positive
from models.encoder_decoder import SequenceWeights
from models.model import Model
from models.recurrent_layers import CELLS, BidirectionalGRU
from models.states import Chunk, State, StateRule, StateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentConfig:
    """Sizes and choices of a recurrent encoder-decoder.

    `max_source_len` and `max_model_len` count tokens of the source and of the target. `d_encoder` is the width of
    either direction. `attention` is a score, or "mean" for the mean of the memory in its place; `d_key` is the inner
    width of additive scores. `decoder` says whose cell is used, `normalizer` and `temperature` how scores become
    weights.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and the limit.
    """

    source_vocab_size: int
    vocab_size: int
    max_source_len: int
    max_model_len: int
    d_embedding: int
    d_encoder: int
    d_decoder: int
    decoder: Literal["bahdanau", "luong"]
    attention: Literal["additive", "concat", "dot", "scaled", "general", "mean"]
    d_key: int = 64
    normalizer: Literal["softmax", "sparsemax", "entmax15", "hardmax"] = "softmax"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        limits = ("max_source_len", "max_model_len")
        widths = ("d_embedding", "d_encoder", "d_decoder", "d_key")
        check_integers(self, 1, "source_vocab_size", "vocab_size", *limits, *widths)
        check_positive(self, "temperature")
        check_choices(self, decoder=CELLS, attention=SCORES, normalizer=NORMALIZERS)
        if self.attention in ("dot", "scaled") and self.d_decoder != 2 * self.d_encoder:
            raise ValueError(
                f"attention is {self.attention!r}, which needs d_decoder {self.d_decoder} to be twice d_encoder "
                f"{self.d_encoder}; 'general' takes any, having a matrix between them"
            )


class Recurrent(Model):
    """Source ids and target ids in, logits of the next target token out.

    `dropout` acts in training only, on embeddings, on the memory and before the output layer.
    """

    config_class = RecurrentConfig
    step_tokens = 1  # steps that are taken one after the other would be laid out in a graph, each anew

    def __init__(self, config: RecurrentConfig, *, dropout: float = 0.0):
        super().__init__(config)
        d_memory = 2 * config.d_encoder
        self.source_embedding = nn.Embedding(config.source_vocab_size, config.d_embedding)
        self.encoder = BidirectionalGRU(config.d_embedding, config.d_encoder)
        self.initial = nn.Linear(config.d_encoder, config.d_decoder)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_embedding)
        score = score_named(config.attention, config.d_decoder, d_memory, config.d_key)
        normalizer = normalizer_named(config.normalizer, temperature=config.temperature)
        attention = MemoryAttention(score, normalizer)
        self.decoder = CELLS[config.decoder](config.d_embedding, config.d_decoder, attention)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(config.d_decoder, config.vocab_size)

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare the memory and its keys, fixed, and the vectors that each step replaces."""
        dtype, width = self.lm_head.weight.dtype, self.config.d_decoder
        return (
            *self.decoder.attention.state_specs(dtype),
            *(
                StateSpec(name=name, rule=StateRule.REPLACE, dtype=dtype, shape=(width,), made=name == "hidden")
                for name in self.decoder.state_names
            ),
        )

    def encode(self, source_ids: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Return the memory (B, S, M) of source_ids (B, S), of which the first `source_lengths` (B,) are real.

        Raises:
            ValueError: there are more tokens than max_source_len, or lengths do not fit.
        """
        if source_ids.shape[1] > self.config.max_source_len:
            raise ValueError(
                f"source_ids has {source_ids.shape[1]} tokens; max_source_len is {self.config.max_source_len}"
            )
        chunk = Chunk.of(source_ids, source_lengths)
        return self.dropout(self.encoder(self.dropout(self.source_embedding(source_ids)), chunk.lengths))

    def begin(self, memory: Tensor, source_lengths: Tensor | None = None, capacity: int | None = None) -> State:
        """Return the state of empty targets of at most `capacity` tokens, one for each row of a memory (B, S, M).

        Keys are made here, once. The decoder sets out from what the backward reading ended with, as in Bahdanau et al.

        Raises:
            ValueError: the capacity is below 1 or above max_model_len.
        """
        rows, source_len, _ = memory.shape
        limit = self.config.max_model_len
        capacity = limit if capacity is None else capacity
        if not 1 <= capacity <= limit:
            raise ValueError(f"capacity is {capacity}; it must lie in 1..{limit}, the model's max_model_len")
        if source_lengths is None:
            source_lengths = torch.full((rows,), source_len, dtype=torch.int64, device=memory.device)
        memory_valid = torch.arange(source_len, device=memory.device) < source_lengths[:, None]
        projected = self.decoder.attention.project(memory, memory_valid)
        first = projected["memory"][:, :1, self.config.d_encoder :].sum(1)  # zero where there is no source at all
        return State.empty(
            self.state_specs(),
            rows,
            capacity,
            memory.device,
            fixed=projected | {"hidden": torch.tanh(self.initial(first))},
            source_lengths=source_lengths,
        )

    def decode(self, token_ids: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Return logits (B, T, V) after each of the new target tokens (B, T), and the next state.

        The first `lengths` (B,) tokens of each row are real, all when None; the others leave the row's state as it is.

        Raises:
            ValueError: a row would outgrow the state, or lengths do not fit token_ids.
        """
        logits, state, _ = self._run(token_ids, state, lengths)
        return logits, state

    def forward(self, source_ids: Tensor, token_ids: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) of the whole target token_ids (B, T), each position seeing what precedes it."""
        state = self.begin(self.encode(source_ids, source_lengths), source_lengths)
        return self.decode(token_ids, state)[0]

    def attention_weights(
        self, source_ids: Tensor, token_ids: Tensor, source_lengths: Tensor | None = None
    ) -> SequenceWeights:
        """Return the weights of the decoder's only attention, to the source: (B, 1, T, S); arguments of `forward`."""
        state = self.begin(self.encode(source_ids, source_lengths), source_lengths)
        *_, weights = self._run(token_ids, state, need_weights=True)
        return SequenceWeights([], [], [weights[:, None]])

    def _run(
        self, token_ids: Tensor, state: State, lengths: Tensor | None = None, *, need_weights: bool = False
    ) -> tuple[Tensor, State, Tensor | None]:
        """Step through the tokens; return logits (B, T, V), the next state, and weights (B, T, S) if asked for."""
        chunk = Chunk.of(token_ids, lengths, state.lengths)
        if not torch.compiler.is_exporting():  # a traced graph knows no values
            longest = int((chunk.start + chunk.lengths).amax()) if len(token_ids) else 0
            if longest > state.capacity:
                raise ValueError(f"a row would hold {longest} tokens; the state's capacity is {state.capacity}")
        embedded, memory_valid = self.dropout(self.token_embedding(token_ids)), state.source_valid
        past = {name: state.tensors[name] for name in self.decoder.state_names}
        outputs = [embedded.new_empty(token_ids.shape[0], 0, self.config.d_decoder)]
        weights = [state.tensors["memory"].new_empty(token_ids.shape[0], 0, state.tensors["memory"].shape[1])]
        for position in range(chunk.num_tokens):
            step = self.decoder(embedded[:, position], past, state.tensors, memory_valid, need_weights=need_weights)
            goes_on = chunk.valid[:, position, None]
            past = {name: torch.where(goes_on, new, past[name]) for name, new in step.present.items()}
            outputs.append(step.output[:, None])
            if step.weights is not None:
                weights.append(step.weights)
        logits = self.lm_head(self.dropout(torch.cat(outputs, 1)))
        return logits, state.advance(chunk, past), torch.cat(weights, 1) if need_weights else None
