"""Which tokens' logits a request changes, and how: the host sampler's penalties, bias and minimum length, as entries.

They are kept up from one token to the next: to read a long prompt again at every step would take longer than the step.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from attendant.bundle import DType, Role
from service.engine.device import Array
from service.scheduling.plan import Sample
from service.scheduling.request import Request

ENTRY = {
    Role.ADJUSTED_IDS: (DType.INT64, 0),
    Role.REPETITION: (DType.FLOAT32, 1),
    Role.PENALTY: (DType.FLOAT32, 0),
    Role.BIAS: (DType.FLOAT32, 0),
}
"""The inputs of a sample graph that an entry is made of, and an entry that changes nothing."""


def adjusts(sample: Sample) -> bool:
    """Return whether logits change before the choice."""
    return sample.request.sampling.adjusts_logits or sample.num_output < sample.request.min_tokens


class Adjustments:
    """The entries of one sequence. `changes` are the places of all that was ever set, in that order.

    Args:
        request: whose sequence it is.
    """

    def __init__(self, request: Request) -> None:
        self.changes: list[int] = []
        self._request = request
        self._params = request.sampling
        self._biases = dict(self._params.logit_bias)
        self._output: Sequence[int] = ()
        self._num_output = 0  # tokens of it that are taken in
        self._counts: dict[int, int] = {}
        self._suppresses = False
        self._places: dict[int, int] = {}
        self.arrays = {role: np.full(1, neutral, dtype.value) for role, (dtype, neutral) in ENTRY.items()}
        if self._params.repetition_penalty != 1.0:
            for token_id in request.prompt:
                self._set(token_id, Role.REPETITION, self._params.repetition_penalty)
        for token_id, bias in self._params.logit_bias:
            self._set(token_id, Role.BIAS, bias)

    @property
    def size(self) -> int:
        """How many entries it takes, at least one."""
        return max(1, len(self._places))

    def continues_with(self, sample: Sample) -> bool:
        """Return whether a sample is of this sequence, by now perhaps longer."""
        if sample.request is not self._request or sample.num_output < self._num_output:
            return False
        known = slice(self._num_output)
        return sample.output is self._output or sample.output[known] == self._output[known]

    def advance(self, sample: Sample) -> None:
        """Take in what was generated since."""
        for token_id in sample.output[self._num_output : sample.num_output]:
            count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
            self._set(token_id, Role.REPETITION, self._params.repetition_penalty)
            penalty = self._params.presence_penalty + self._params.frequency_penalty * count
            self._set(token_id, Role.PENALTY, penalty)
        self._output, self._num_output = sample.output, sample.num_output
        suppresses = sample.num_output < self._request.min_tokens
        if suppresses != self._suppresses:
            self._suppresses = suppresses
            for token_id in self._request.end_token_ids:
                self._set(token_id, Role.BIAS, -np.inf if suppresses else self._biases.get(token_id, 0.0))

    def write(self, row: Mapping[Role, Array]) -> None:
        """Write the entries into a row of arrays of at least `size`; the first is repeated in what is left."""
        for role, array in self.arrays.items():
            row[role][: self.size] = array[: self.size]
            row[role][self.size :] = array[0]

    def _set(self, token_id: int, role: Role, value: float) -> None:
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = len(self._places)
            if place == len(self.arrays[role]):
                self.arrays = {key: np.concatenate((array, array)) for key, array in self.arrays.items()}
            for key, (_, neutral) in ENTRY.items():
                self.arrays[key][place] = neutral
            self.arrays[Role.ADJUSTED_IDS][place] = token_id
        self.arrays[role][place] = value
        self.changes.append(place)
