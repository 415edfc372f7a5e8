"""The recipe `dates`: its data, a run of seconds, and the figures that the committed checkpoints reach."""

import re
from datetime import date
from pathlib import Path
from tomllib import loads

import pytest
import torch
from safetensors.torch import load_file

from models import checkpoint
from models.config import ConfigError, from_table
from models.recipes import dates, run
from models.training.dates import FORMATS, ISO_FIELDS, MONTHS, write, written_dates, years

RECIPES = Path(dates.__file__).parent
CHECKPOINTS = RECIPES.parent / "checkpoints"
CONFIG = """
training_dates = 300

[run]
seed = 1
steps = 20
batch_size = 16
evaluate_every = 20

[optimiser]
learning_rate = 1e-2
final_learning_rate = 0.0
warmup_steps = 2
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.98
clip_norm = 1.0

[model]
source_vocab_size = 40
vocab_size = 14
max_source_len = 40
max_model_len = 16
d_embedding = 8
d_encoder = 8
d_decoder = 16
decoder = "{decoder}"
attention = "general"
"""


def test_no_year_is_in_two_parts():
    parts = [years(part) for part in ("training", "validation", "test")]
    assert sorted(year for part in parts for year in part) == list(range(1900, 2050))
    assert [len(part) for part in parts] == [120, 15, 15]
    for part, chosen in zip(("training", "validation", "test"), parts, strict=True):
        assert {int(written.iso[:4]) for written in written_dates(part, 400)} <= set(chosen)


def test_every_format_says_the_date_and_where_its_fields_are():
    day = date(1979, 8, 3)
    texts = [write(day, template).text for template in FORMATS]
    assert len(set(texts)) == len(FORMATS)
    assert {"3 August 1979", "3rd of August 1979", "Friday, August 3, 1979", "03.08.1979", "8/3/1979"} <= set(texts)
    for written in written_dates("training", 300):
        told = {field: written.text[slice(*span)] for field, span in written.spans.items()}
        year, month, number = map(int, written.iso.split("-"))
        assert int(told["year"]) == year
        assert int(re.match(r"\d+", told["day"])[0]) == number
        assert told["month"].lstrip("0") in (str(month), MONTHS[month - 1], MONTHS[month - 1][:3])
    assert written_dates("training", 50) == written_dates("training", 50)
    fields = "".join(" " if field is None else field[0] for field in ISO_FIELDS)
    assert fields == "yyyy mm dd"
    assert [write(date(2000, 1, n), "{ordinal}").text for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 31)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "31st",
    ]  # fmt: skip


@pytest.mark.parametrize("decoder", ["bahdanau", "luong"])
def test_a_short_run_learns_repeats_and_leaves_a_checkpoint(decoder, tmp_path):
    config = tmp_path / "dates.toml"
    config.write_text(CONFIG.format(decoder=decoder))
    for name in ("one", "two"):
        result = run.train("dates", directory=tmp_path / name, config_file=config)
    assert result["validation_loss"] < 2.3  # ln 14 is 2.64
    assert set(result) == {"validation_loss", "exact_match", "field_alignment", "entropy"}
    one, two = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    trained = checkpoint.load(tmp_path / "one" / "checkpoint")
    assert dates.figures(trained, written_dates("validation", 500)) == {
        name: value for name, value in result.items() if name != "validation_loss"
    }
    assert len(dates.rewrite(trained, ["3rd of May 1979", "MAY 3 1979", "?"])) == 3


def test_vocabulary_sizes_must_be_those_of_the_dates(tmp_path):
    config = tmp_path / "dates.toml"
    config.write_text(CONFIG.format(decoder="luong").replace("vocab_size = 14", "vocab_size = 15"))
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 15; the dates need 14"):
        run.train("dates", directory=tmp_path / "run", config_file=config)


@pytest.mark.parametrize("file", ["dates", "dates_luong", "dates_mean"])
def test_committed_recipes_differ_in_attention_only(file):
    text, reference = ((RECIPES / f"{name}.toml").read_text() for name in (file, "dates"))
    config, base = (from_table(dates.CONFIG, loads(one)) for one in (text, reference))
    assert (config.run, config.optimiser, config.training_dates) == (base.run, base.optimiser, base.training_dates)
    assert (config.model.d_encoder, config.model.d_decoder) == (base.model.d_encoder, base.model.d_decoder)


@pytest.mark.parametrize(
    ("name", "decoder", "attention"), [("bahdanau", "bahdanau", "additive"), ("luong", "luong", "general")]
)
def test_committed_checkpoints_read_years_they_never_saw_where_they_stand(name, decoder, attention):
    trained = checkpoint.load(CHECKPOINTS / f"dates-{name}")
    assert (trained.module.config.decoder, trained.module.config.attention) == (decoder, attention)
    figures = dates.evaluate(trained)
    assert figures["exact_match"] >= 0.99
    assert figures["field_alignment"] >= 0.85
    assert dates.rewrite(trained, ["Friday, 21 July 1995", "4/1/2008"]) == ["1995-07-21", "2008-04-01"]
    assert {1995, 2008} <= set(years("test"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most"), [("dates", 0.97, 1.0), ("dates-luong", 0.97, 1.0), ("dates-mean", 0.0, 0.8)]
)
def test_the_recipes_reach_their_figures_and_the_mean_does_not(name, least, most, tmp_path):
    assert least <= run.train(name, directory=tmp_path / "run")["exact_match"] <= most
