"""HART, the hybrid autoregressive text-to-image transformer, in JAX.

    import hart_jax
    images = hart_jax.load("assets/emoji")("a flat icon of a dog")      # uint8 (1, 64, 64, 3)

What is offered here is described in docs/api.md, and imported when it is first asked for.
"""

import importlib
from typing import Any

# Public names, by the module that has them.
_PUBLIC = {
    name: module
    for module, names in {
        "hart_jax.sampling.pipeline": "load Pipeline use_compilation_cache",
        "hart_jax.sampling.sampler": "make_sampler",
        "hart_jax.sampling.rules": "Rules",
        "hart_jax.checkpoints.load": "load_model",
        "hart_jax.checkpoints.model_folder": (
            "Model abstract_tokenizer abstract_transformer read_model read_tokenizer write_model"
        ),
        "hart_jax.checkpoints.convert.released": "read_released",
        "hart_jax.config": "SampleConfig TokenizerConfig TransformerConfig read_experiment",
        "hart_jax.tokenizer.model": "Tokenizer",
        "hart_jax.tokenizer.resize": "area",
        "hart_jax.transformer.model": "Hart",
        "hart_jax.transformer.mask": "Mask scale_causal_segments",
        "hart_jax.transformer.attention_weights": "attention_weights",
        "hart_jax.text.conditioning": "conditioner_of",
        "hart_jax.data.mjhq": "read_folder",
        "hart_jax.data.pipeline": "cropped_image",
        "hart_jax.data.shards": "write_shards",
        "hart_jax.training.hart_task": "HartTask",
        "hart_jax.training.loop": "run",
        "hart_jax.training.metrics": "read_metrics",
        "hart_jax.parallel.mesh": "MeshLayout",
        "hart_jax.evaluation.reconstruction": "psnr",
        "hart_jax.io.images": "from_uint8 grid to_uint8",
        "hart_jax.errors": "UserError",
        "pallas_kernels.attention.mask": "segment_ends",
    }.items()
    for name in names.split()
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hart_jax' has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
