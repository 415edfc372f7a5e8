"""Any model that generates becomes the parts of a bundle, by graphs that are traced from its own code.

It knows no mechanism: states and limits are what the model declares. Prompts are always cut alike, since nothing is
known of how a mechanism's sums round.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import TOKENS, Limits
from export.certificate import certify
from export.errors import ExportRefused
from export.golden import record_golden
from export.parts import Parts, Report
from export.runner import Runner
from export.samples import NUM_ROWS, about_sources, of_text
from export.source import ImageSource, TextSource, source_of, target_config
from export.traced import describe_states, encode_graph, step_graph, write_encode_graph, write_step_graph
from models.checkpoint import TrainedModel
from models.families import FAMILIES

_CACHE_TOKENS = 576  # of a row while checking


def export_generating(
    directory: Path, model: TrainedModel, precision: str, max_model_len: int, text: NDArray[np.int64], report: Report
) -> Parts:
    """Write graphs and golden run into `directory`, and return what the manifest says of them.

    Args:
        directory: where the bundle is being made.
        model: with a module that goes step by step.
        precision: "fp32", which is all there is of a traced graph.
        max_model_len: longest sequence to serve, in tokens.
        text: token ids of the quality text, on which a model that continues texts is checked.
        report: takes one line for every stage and check.

    Raises:
        ExportRefused: the model cannot be exported, or a check failed.
    """
    module, tokenizer = model.module, model.tokenizer
    if precision != "fp32":
        raise ExportRefused(f"precision is {precision!r}: a {type(module).__name__} is exported in fp32 only")
    assert tokenizer is not None, "the caller refuses a generating model without a tokenizer"
    source, chunk = source_of(module), min(module.step_tokens, max_model_len)
    states = describe_states(module, source)
    step = step_graph(states, target_config(module).vocab_size, TOKENS if chunk > 1 else 1)
    report("tracing the step graph")
    write_step_graph(module, step, directory, max_tokens=chunk)
    capacity, graphs = min(max_model_len, _CACHE_TOKENS), [step]
    if source is None:
        samples = of_text(text)
    else:
        report("tracing the encode graph")
        graphs.append(encode_graph(states, source))
        write_encode_graph(module, graphs[1], directory)
        samples = about_sources(module, source, capacity, tokenizer.bos_token_id or 0)
    runner = Runner(
        directory / step.file,
        num_rows=NUM_ROWS,
        capacity=capacity,
        prefill_chunk=chunk,
        encode=directory / graphs[1].file if source is not None else None,
        source_len=0 if source is None else source.padded_len,
    )
    report("checking the graphs against the model")
    certificate = certify(precision, directory / step.file, runner, module, samples, report)
    return Parts(
        family=next((name for name, known in FAMILIES.items() if type(module) is known), "custom"),
        tasks=("generate",),
        limits=Limits(
            max_model_len=max_model_len,
            max_source_len=source.max_len if isinstance(source, TextSource) else None,
            prefill_chunk=chunk,
        ),
        graphs=tuple(graphs),
        states=states,
        image=source.image if isinstance(source, ImageSource) else None,
        golden=record_golden(runner, samples, precision, directory),
        certificate=certificate,
    )
