"""Any model that generates becomes the parts of a bundle: the fast graph where it has one, or else its own code traced.

Of a traced mechanism nothing is known but the states and limits that the model declares. So prompts are always cut
alike, because nobody knows how its sums would round otherwise.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import TOKENS, Limits
from export import manifest as describe
from export.certificate import certify
from export.cuda import export_for_cuda
from export.decoder import appended, obstacle, write_fast_step
from export.errors import ExportRefused
from export.golden import record_golden
from export.half import HALF_TYPES
from export.parts import Parts, Report
from export.runner import Runner
from export.samples import NUM_ROWS, about_sources, of_text
from export.source import ImageSource, Source, TextSource, source_of, target_config
from export.traced import write_traced_encoder, write_traced_step
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
        precision: "fp32"; or, for decoders that continue texts, "int8", or "fp16" or "bf16" for CUDA.
        max_model_len: longest sequence to serve, in tokens.
        text: token ids of the quality text, on which a model that continues texts is checked.
        report: takes one line for every stage and check.

    Raises:
        ExportRefused: the model cannot be exported, or a check failed.
    """
    module, tokenizer = model.module, model.tokenizer
    source, why_traced = source_of(module), obstacle(module)
    _refuse_unfit(model, precision, source, why_traced)
    if precision in HALF_TYPES:
        return export_for_cuda(directory, model, precision, max_model_len, _CACHE_TOKENS, text, report)
    states = describe.states(module, source)
    vocab_size, chunk = target_config(module).vocab_size, None
    if why_traced is None:
        states = tuple(appended(state) for state in states)
        step = describe.step_graph(states, vocab_size, tokens=TOKENS, total_length=True)
        write_fast_step(directory, model, precision, step, max_model_len, report)
    else:
        chunk = min(module.step_tokens, max_model_len)
        step = describe.step_graph(states, vocab_size, tokens=TOKENS if chunk > 1 else 1)
        report(f"tracing the step graph from the model's own code: {why_traced}")
        write_traced_step(module, step, directory, max_tokens=chunk)
    capacity, graphs = min(max_model_len, _CACHE_TOKENS), [step]
    if source is None:
        samples = of_text(text)
    else:
        report("tracing the encode graph")
        graphs.append(describe.encode_graph(states, source))
        write_traced_encoder(module, graphs[1], directory)
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
    certificate = certify(precision, directory / step.file, runner, module, samples, report, text)
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


def _refuse_unfit(model: TrainedModel, precision: str, source: Source | None, why_traced: str | None) -> None:
    if model.tokenizer is None:
        raise ExportRefused("the checkpoint has no tokenizer: what is generated could not be read")
    if precision != "fp32" and why_traced is not None:
        raise ExportRefused(f"precision is {precision!r}: {why_traced}, and such a model is exported in fp32 only")
    if precision != "fp32" and source is not None:
        raise ExportRefused(f"precision is {precision!r}: a model that writes about a source is exported in fp32 only")
