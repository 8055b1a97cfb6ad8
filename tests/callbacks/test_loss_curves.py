"""The curves of training say what each step did."""

import pytest
from conftest import CONFIGS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_semgen.training.optimizer import factor


def test_the_learning_rate_of_a_step_is_the_one_it_was_taken_with(workspace, lightning):
    options = ("--trainer.max_steps=5", "--model.compressor_steps=2", "--model.warmup_steps=3", "--model.lr=0.01")
    lightning("fit", "-c", f"{CONFIGS}/dim8.yaml", *options, "--data.encoded=null", "--trainer.log_every_n_steps=1")
    events = EventAccumulator("runs/dim8").Reload()
    for tag, end in (("train/learning_rate", 5), ("train/compressor_learning_rate", 2)):
        rates = [event.value for event in events.Scalars(tag)]
        assert rates == pytest.approx([0.01 * factor(step, warmup=3, end=end) for step in range(5)])
