"""HART, the hybrid autoregressive text-to-image transformer, in JAX.

    import hart_jax
    images = hart_jax.load("assets/emoji")("a flat icon of a dog")      # uint8 (1, 64, 64, 3)

What is offered here is described in docs/api.md, and imported when it is first asked for.
"""

import importlib
from typing import Any

_PUBLIC = {
    "load": "hart_jax.sampling.pipeline",
    "load_model": "hart_jax.checkpoints.load",
    "Pipeline": "hart_jax.sampling.pipeline",
    "Model": "hart_jax.checkpoints.model_folder",
    "Hart": "hart_jax.transformer.model",
    "Tokenizer": "hart_jax.tokenizer.model",
    "SampleConfig": "hart_jax.config",
    "TokenizerConfig": "hart_jax.config",
    "TransformerConfig": "hart_jax.config",
    "read_experiment": "hart_jax.config",
    "use_compilation_cache": "hart_jax.sampling.pipeline",
    "UserError": "hart_jax.errors",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hart_jax' has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
