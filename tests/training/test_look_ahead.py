"""The next batch is under way before anything waits for the current step."""

import grain
import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config import MeshConfig, TrainConfig
from hart_jax.data.batches import Batches
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.training import loop
from hart_jax.training.metrics_buffer import MetricsBuffer

STEPS = 3


class CountingTask:
    """Adds the batch's number to its state, and notes what is done in which order."""

    def __init__(self, layout: MeshLayout, events: list[str]):
        self.shardings, self._events = {"total": layout.replicated}, events
        self.buckets, self.programs, self.grids = None, 1, 1

    def batches(self) -> Batches:
        source = grain.MapDataset.source([{"index": np.int32(number)} for number in range(8)]).repeat()
        batches = Batches(source.batch(2), workers=0)
        batches.prepare = self._prepare
        return batches

    def _prepare(self, batch):
        self._events.append(f"prepare {batch['index'][0] // 2 + 1}")
        return batch

    def init(self):
        return {"total": jnp.zeros(())}

    def abstract_state(self):
        return jax.eval_shape(self.init)

    def load_pretrained(self) -> None: ...

    def init_state(self):
        return self.init()

    def step(self, state, batch, step):
        self._events.append(f"step {step}")
        metrics = {"loss": jnp.ones(()), "model_flops": jnp.ones(()), "hardware_flops": jnp.ones(())}
        metrics["skipped_steps"] = jnp.zeros(())
        return {"total": state["total"] + batch["index"].sum()}, metrics

    def sample_grids(self, state):
        return {}


def test_the_next_batch_is_prepared_before_anything_waits_for_the_step(tmp_path, monkeypatch):
    events: list[str] = []
    layout = MeshLayout.of(MeshConfig(), 2 * jax.device_count())
    stored = MetricsBuffer.stored
    monkeypatch.setattr(MetricsBuffer, "stored", lambda buffer: events.append("wait") or stored(buffer))
    train = TrainConfig(steps=STEPS, batch_size=2, log_every=1, save_every=STEPS, sample_every=0)
    (tmp_path / "shards").mkdir()
    config = {"train": {}, "data": {"sources": [], "train": str(tmp_path / "shards")}}
    loop.run(CountingTask(layout, events), layout, train, config, tmp_path / "run")
    # At the last step it waits for its metrics, and for the buffer that its checkpoint keeps; nothing comes after it.
    expected = ["prepare 1", "step 1", "prepare 2", "wait", "step 2", "prepare 3", "wait", "step 3", "wait", "wait"]
    assert events == expected
