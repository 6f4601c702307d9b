"""Text states of all captions, computed once and kept on disk as float16."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hart_jax.data.kept_table import fitting, new_table, opened, read_column
from hart_jax.text.encoder import TextEncoder

BATCH = 256


@dataclass(frozen=True)
class CaptionTokens:
    """caption -> {"input_ids": (N,), "mask": (N,)} int32, what text states are computed from; picklable."""

    encoder: TextEncoder
    length: int

    def __call__(self, caption: str) -> dict[str, np.ndarray]:
        input_ids, mask, _ = self.encoder.tokenize([caption], self.length)
        return {"input_ids": input_ids[0], "mask": mask[0]}


def text_states(encoder: TextEncoder, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """States (n, T, D) float16 and mask (n, T) int32 of n <= BATCH captions, and how many were cut to T = `length`."""
    # A full batch each time, so that one compilation serves all.
    encoded = encoder([*captions, *[captions[0]] * (BATCH - len(captions))], length)
    count = len(captions)
    states = fitting(np.asarray(encoded.states_BTD)[:count], np.float16, "text states")
    return states, encoded.mask_BT[:count], sum(encoded.truncated[:count])


class TextTable:
    """caption -> {"text": (T, D) float16, "mask": (T,) int32}, from the files that `precompute` wrote.

    Raises:
      FileNotFoundError: the folder has none.
      ValueError, EOFError, TypeError: it is damaged.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._rows = {caption: row for row, caption in enumerate(json.loads((folder / "captions.json").read_text()))}
        self._states = read_column(folder / "states.npy", len(self._rows))
        self._masks = read_column(folder / "masks.npy", len(self._rows), in_memory=True)

    def __call__(self, caption: str) -> dict[str, np.ndarray]:
        row = self._rows[caption]
        return {"text": np.asarray(self._states[row]), "mask": self._masks[row]}

    def __reduce__(self) -> tuple:
        # A worker opens the files; pickling a mapped one would read it all.
        return TextTable, (self._folder,)


def precompute(encoder: TextEncoder, captions: Sequence[str], length: int, folder: Path) -> TextTable:
    """The table of these captions at `length` positions in `folder`, computed there unless it is complete already.

    Interrupted work is done again, and a damaged table, with a warning. A table of other captions or of another encoder
    has another name.

    Raises:
      UserError: the disk is full; nothing is left then. Or a state does not fit float16.
    """
    probe = np.asarray(encoder([captions[0]], length).states_BTD[0])
    digest = hashlib.sha256(probe.round(2).tobytes())
    digest.update(json.dumps([length, *captions]).encode())
    folder = folder / digest.hexdigest()[:16]
    table = opened(folder, TextTable, "text states")
    if table is not None:
        return table
    cut = 0
    with new_table(folder, len(captions)) as (new, write):
        for start in tqdm(range(0, len(captions), BATCH), desc="text states", unit_scale=BATCH, mininterval=5):
            states, masks, cut_here = text_states(encoder, captions[start : start + BATCH], length)
            write(states=states, masks=masks)
            cut += cut_here
        (new / "captions.json").write_text(json.dumps(list(captions)))
    print(f"text states: {len(captions)} captions, {cut} cut to {length} positions", flush=True)
    return TextTable(folder)
