"""What an image is asked for with, prompts or class labels, as the transformer's condition."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from hart_jax.config import TransformerConfig
from hart_jax.errors import UserError
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.text.encoder import load_text_encoder, text_options
from hart_jax.text.prompts import check_prompts, report_truncation


class Conditioner(Protocol):
    """Prompts or labels to conditions."""

    def check(self, prompts: Sequence[Any]) -> None:
        """Raises `UserError` where there is none, or one that cannot be."""
        ...

    def __call__(self, prompts: Sequence[Any]) -> Any:
        """What `embed_condition` of the transformer takes."""
        ...


class TextConditioner:
    """Prompts, by a frozen text encoder. One longer than the context is cut, which is reported on stderr, once.

    `system_prompt` and `dtype` are those of `text_options`; `layout` lays out the encoder.
    """

    def __init__(
        self,
        text_encoder: str | Path | None,
        config: TransformerConfig,
        system_prompt: str | Path | None = None,
        layout: MeshLayout | None = None,
        dtype: str = "auto",
    ):
        if not text_encoder:
            raise UserError("the model has no text encoder; give its folder (--text_encoder, or in the config)")
        options = text_options(text_encoder, system_prompt, dtype)
        self.encoder = load_text_encoder(text_encoder, **options, layout=layout)
        if self.encoder.context_dim != config.context_dim:
            wide = f"its states are {self.encoder.context_dim} wide, the model's {config.context_dim}"
            raise UserError(f"{text_encoder}: {wide}")
        self._length = config.context_tokens
        self._reported: set[str] = set()

    def check(self, prompts: Sequence[Any]) -> None:
        check_prompts(prompts)

    def __call__(self, prompts: Sequence[Any]) -> Any:
        states = self.encoder(list(prompts), self._length)
        cut = dict(zip(prompts, states.truncated, strict=True))
        new = [prompt for prompt in cut if prompt not in self._reported]
        report_truncation(new, [cut[prompt] for prompt in new], self._length)
        self._reported.update(new)
        return states.states_BTD, jnp.asarray(states.mask_BT)


class ClassConditioner:
    """Labels 0 .. num_classes - 1 of a class-conditional model."""

    def __init__(self, config: TransformerConfig):
        self._count = config.num_classes

    def check(self, prompts: Sequence[Any]) -> None:
        if not prompts:
            raise UserError("there is no label; give at least one")
        for label in prompts:
            if not isinstance(label, int | np.integer) or not 0 <= label < self._count:
                raise UserError(f"label {label!r}: the model has labels 0 to {self._count - 1}")

    def __call__(self, prompts: Sequence[Any]) -> Any:
        return jnp.asarray(np.array(prompts, np.int32))


def conditioner_of(
    config: TransformerConfig,
    text_encoder: str | Path | None,
    system_prompt: str | Path | None = None,
    layout: MeshLayout | None = None,
    dtype: str = "auto",
) -> Conditioner:
    """Labels for a class-conditional model, prompts for any other; `UserError` if these lack a fitting encoder."""
    if config.num_classes:
        return ClassConditioner(config)
    return TextConditioner(text_encoder, config, system_prompt, layout, dtype)
