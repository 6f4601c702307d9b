"""The data of a training: bad records, workers, tokens and text embeddings in the records."""

import numpy as np
import pytest

from hart_jax.checkpoints.model_folder import write_part
from hart_jax.checkpoints.workdir import find_tokenizer
from hart_jax.config import read_experiment
from hart_jax.data.precompute import AddTexts, AddTokens, precompute
from hart_jax.training.metrics import RECORDS_FILE, TIMINGS_FILE, read_metrics
from tests.tiny import TOKENIZER, random_like
from tests.train_runs import make_shards, run_to_end, write_hart_config, write_tokenizer_config

BAD = (50, 151)
SHORT = ("--config.train.steps=6", "--config.train.sample_every=0")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Settings of a tokenizer's training on 200 images, 1% of which do not decode."""
    folder = tmp_path_factory.mktemp("damaged")
    config = write_tokenizer_config(folder / "inputs")
    shards = make_shards(folder / "damaged", 200, seed=2, bad=BAD)
    epoch = ("--config.train.steps=25", "--config.train.batch_size=8", "--config.train.sample_every=0")
    return (f"--config={config}", f"--config.data.train={shards}", *epoch, "--config.train.log_records=True")


@pytest.mark.slow
def test_one_percent_of_bad_records_is_counted_and_named(damaged, tmp_path):
    code, _, err = run_to_end(*damaged, f"--workdir={tmp_path}")
    assert code == 0, err
    for number in BAD:
        assert f"warning: record 'thing{number:03d}' does not decode, another takes its place" in err
    assert read_metrics(tmp_path, TIMINGS_FILE)[-1]["bad_records"] == len(BAD)
    taken = [index for line in read_metrics(tmp_path, RECORDS_FILE) for index in line["index"]]
    expected = [number + 1 if number in BAD else number for number in range(200)]
    assert sorted(taken) == sorted(expected)


@pytest.mark.slow
def test_too_many_bad_records_end_training(damaged, tmp_path):
    code, _, err = run_to_end(*damaged, "--config.data.max_bad_records=1", f"--workdir={tmp_path}")
    assert code == 2
    assert "2 records do not decode, more than max_bad_records=1" in err and "Traceback" not in err
    assert all(f"'thing{number:03d}'" in err for number in BAD)


@pytest.mark.slow
def test_tokens_and_text_states_in_the_records(tmp_path):
    config = write_hart_config(tmp_path / "inputs", ahead=True)
    tokenizer, encoder = tmp_path / "inputs" / "tokenizer", tmp_path / "inputs" / "text_encoder"
    positions = read_experiment(config).transformer.context_tokens
    fields = [AddTokens(*find_tokenizer(tokenizer)), AddTexts(encoder, positions)]
    precompute(tmp_path / "inputs" / "train" / "shards", tmp_path / "stored", fields)
    settings = (f"--config={config}", "--config.data.cache=False", *SHORT)
    given = f"--config.data.train={tmp_path / 'stored'}"
    outcomes = [
        run_to_end(*settings, *more, f"--workdir={tmp_path / name}")
        for name, more in (
            ("plain", ("--config.data.workers=2",)),
            ("ahead", ("--config.data.workers=1", given)),
        )
    ]
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert (tmp_path / "plain" / "tokens").is_dir() and (tmp_path / "plain" / "text_states").is_dir()
    assert not (tmp_path / "ahead" / "tokens").exists() and not (tmp_path / "ahead" / "text_states").exists()
    for ours, theirs in zip(read_metrics(tmp_path / "ahead"), read_metrics(tmp_path / "plain"), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)

    write_part(tmp_path / "other", TOKENIZER, random_like(find_tokenizer(tokenizer)[1], seed=9))
    other = f"--config.tokenizer_from={tmp_path / 'other'}"
    code, _, err = run_to_end(*settings, given, other, f"--workdir={tmp_path / 'wrong'}")
    assert code == 2
    assert "the tokens in its records were computed with another tokenizer" in err
