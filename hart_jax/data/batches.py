"""Batches of one process in the common order of all, with a position that any number of processes can go on from."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from hart_jax.data.bad_records import BadRecords
from hart_jax.io.paths import as_path


class Batches(grain.DatasetIterator):
    """Iterator over batches whose state is the number of batches given, so the same in every process.

    `get_state` and `set_state` (or Orbax) continue with exactly the next batch, also with another number of processes
    or workers.

    Args:
      batches: dicts of arrays, and of `bucket`, where there are several. `wanted` (B,), where there, is taken out;
        where it differs from `index` (B,), a record was replaced, which is reported on stderr, once.
      workers: processes that make them; 0 makes them in threads.
      name_of: number of a record -> what to call it.
      max_bad_records: how many different records may be replaced, since the start of this process and in its batches.

    Attributes:
      bad_records: those that were replaced.
      prepare: a function of a batch, done to each as it is read; None for none.

    Raises:
      UserError: from `next`, naming some records, when more are replaced.
    """

    def __init__(
        self, batches: grain.MapDataset, workers: int, name_of: Callable[[int], str] = str, max_bad_records: int = 0
    ):
        super().__init__()
        self._batches, self._workers = batches, workers
        self.bad_records = BadRecords(name_of, max_bad_records, "another takes its place")
        self.prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        self._given = 0
        self._iterator: grain.DatasetIterator | None = None
        self._ahead: dict[str, Any] | Exception | None = None

    def __next__(self) -> dict[str, Any]:
        self.look_ahead()
        batch, self._ahead = self._ahead, None
        if not isinstance(batch, dict):
            assert batch is not None
            raise batch
        self._given += 1
        if "wanted" in batch:
            wanted = batch.pop("wanted")
            for number in wanted[wanted != batch["index"]]:
                self.bad_records.add(int(number))
        return batch

    def look_ahead(self) -> None:
        """Reads and prepares the batch that is given next. The position stays; an error is raised when it is due."""
        if self._ahead is not None:
            return
        try:
            if self._iterator is None:
                self._iterator = self._iterate()
            batch = next(self._iterator)
            self._ahead = self.prepare(batch) if self.prepare else batch
        except Exception as error:
            self._ahead = error

    def _iterate(self) -> grain.DatasetIterator:
        # A few batches ahead suffice: with a cache there is nothing to wait for.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        rest = self._batches[self._given :].to_iter_dataset(options)
        if self._workers:
            # Grain reads an absl flag here, which fails in programs that never parse any (notebooks, tests).
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            rest = rest.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(rest)

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._given}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._stop()
        self._given = state["next_index"]

    async def load(self, directory: Any) -> Any:
        """Grain's reads the file of this process; here that of any serves, since there may have been fewer before."""

        async def read() -> None:
            files = sorted(as_path(directory).glob("process_*.json"))
            if not files:
                raise ValueError(f"{directory} has no position in the data")
            self.set_state(json.loads(files[0].read_text()))

        return read()

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        self._ahead = None
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


class ProcessRows(grain.MapDataset):
    """The rows of one process, batch by batch, of examples that all processes number alike."""

    def __init__(self, examples: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        super().__init__(examples)
        self._batch_size, self._rows = batch_size, tuple(rows)

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


class BucketBatches(grain.MapDataset):
    """Batches of several buckets, each its own data set of batches, in the order that says for each step which bucket
    it has and how many steps before had it. `bucket` is added to a batch."""

    def __init__(self, parents: Sequence[grain.MapDataset], order: Callable[[int], tuple[int, int]]):
        super().__init__(parents)
        self._order = order

    def __len__(self) -> int:
        return min(map(len, self._parents))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        bucket, place = self._order(index)
        return {**self._parents[bucket][place], "bucket": np.int32(bucket)}
