"""What sampling one batch of images takes: multiply-accumulates (MACs) and bytes of every part in every step.

`hart_jax.planning.traced_parts` counts each part's products for one row or image; here are how many there are. What the
sampler spares itself counts here: `savings` says how much that is. One MAC is two FLOPs. Bytes are of bfloat16, those
of logits, AdaLN and the quantizer of float32.
"""

import dataclasses
import itertools
from pathlib import Path

from hart_jax.config import HartExperiment, TransformerConfig
from hart_jax.io.buckets import local_copy
from hart_jax.planning import traced_parts as traced
from hart_jax.planning.traced_parts import ADALN, ATTENTION, MLP, OUT, QKV, largest, macs, size
from hart_jax.sampling.rules import iteration_sizes
from hart_jax.text.program import EncoderConfig, read_encoder_config

BFLOAT16, FLOAT32 = 2, 4
TEXT, EMBEDDINGS, TOKEN_HEAD = "text encoder", "embeddings", "token head"
DIFFUSION, QUANTIZER, DECODER, DECODER_ATTENTION = "diffusion head", "quantizer", "decoder", "decoder's attention"
PARTS = (
    TEXT,
    EMBEDDINGS,
    QKV,
    OUT,
    MLP,
    ADALN,
    ATTENTION,
    TOKEN_HEAD,
    DIFFUSION,
    QUANTIZER,
    DECODER,
    DECODER_ATTENTION,
)
CONTEXT = "context, 1x1"


@dataclasses.dataclass(frozen=True)
class OpCost:
    """What one part takes in one step of sampling a batch.

    `weights` are bytes of parameters read, `cache` bytes of keys and values read and written, `largest` bytes of the
    largest result of a product; scores of attention are never all there.
    """

    step: str
    part: str
    macs: int
    weights: int = 0
    cache: int = 0
    largest: int = 0


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of the blocks: so many tokens of each row, which see the first `keys` positions, theirs included.

    `scale` is that of the tokens, 0 of the context's.
    """

    step: str
    scale: int
    tokens: int
    keys: int
    last: bool = False

    @property
    def cached(self) -> int:
        """Positions whose keys and values are read from the cache or written to it; nothing comes after the last."""
        return self.keys - self.tokens * self.last


def passes(config: TransformerConfig, masked_iterations: int = 1) -> list[Pass]:
    """The context, which predicts the first scale, then the other scales; the last in so many iterations."""
    last = len(config.shapes) - 1
    sizes = [(CONTEXT, 0, config.context_tokens)]
    for scale, (height, width) in enumerate(config.shapes[1:], 1):
        parts = iteration_sizes(height * width, masked_iterations if scale == last else 1)
        sizes += [(f"{height}x{width}", scale, tokens) for tokens in parts]
    ends = list(itertools.accumulate(tokens for *_, tokens in sizes))
    return [Pass(*size, end, end == ends[-1]) for size, end in zip(sizes, ends, strict=True)]


def read_text_config(folder: str) -> EncoderConfig | None:
    """The text encoder of a folder's config.json, None where there is none; `UserError` if it is not a known one."""
    path = local_copy(folder) / "config.json" if folder else Path()
    return read_encoder_config(path) if path.is_file() else None


def params(experiment: HartExperiment, text: EncoderConfig | None = None) -> dict[str, int]:
    """Parameters of each part that sampling uses; the encoder of images is not among them."""
    hart, tokenizer = traced.hart_weights(experiment.transformer), traced.tokenizer_weights(experiment.tokenizer)
    layers, others = hart["layers"], {"layers", "head", "diffusion_head"}
    return {
        TEXT: size(traced.text_weights(text)) if text else 0,
        EMBEDDINGS: size({name: tree for name, tree in hart.items() if name not in others}),
        QKV: size(layers["attn"]) - size(layers["attn"]["proj"]),
        OUT: size(layers["attn"]["proj"]),
        MLP: size((layers["mlp"], layers["norm_scale"])),
        ADALN: size((layers.get("ada_lin"), layers.get("scale_shift_table"))),
        TOKEN_HEAD: size(hart["head"]),
        DIFFUSION: size(hart["diffusion_head"]),
        QUANTIZER: size(tokenizer["quantizer"]),
        DECODER: size((tokenizer["decoder"], tokenizer["post_quant_conv"])),
    }


def sampling_costs(
    experiment: HartExperiment, batch: int, *, guided: bool = True, text: EncoderConfig | None = None
) -> list[OpCost]:
    """All costs of sampling so many images, in order; guidance doubles the rows of the transformer and its head."""
    config, sample = experiment.transformer, experiment.sample
    rows, count = batch * (2 if guided else 1), params(experiment, text)
    costs: list[OpCost] = []
    if text is not None and not config.num_classes:
        of_text = traced.text_products(text, config.context_tokens)
        # Of the vocabulary's table only the rows of the prompts' tokens are read.
        read = BFLOAT16 * (count[TEXT] - traced.vocabulary_size(text))
        costs.append(OpCost(TEXT, TEXT, batch * macs(of_text), read, largest=BFLOAT16 * batch * largest(of_text)))
    for one in passes(config, sample.masked_iterations):
        costs += _pass_costs(config, one, rows, count)
        if one.scale == len(config.shapes) - 1 and not sample.discrete_only:
            costs += _residual_costs(config, one.tokens, rows, count)
    between = traced.quantizer_products(experiment.tokenizer, sample.smooth)
    held = FLOAT32 * batch * largest(between)
    costs.append(OpCost("between scales", QUANTIZER, batch * macs(between), FLOAT32 * count[QUANTIZER], largest=held))
    convs, dots = traced.decoder_products(experiment.tokenizer)
    held = BFLOAT16 * batch * max(largest(convs), 4 * largest(traced.quarters(convs)))
    whole = batch * (macs(convs) + _saved_by_quarters(experiment))
    costs.append(OpCost(DECODER, DECODER, whole, BFLOAT16 * count[DECODER], largest=held))
    costs.append(OpCost(DECODER, DECODER_ATTENTION, batch * macs(dots), largest=FLOAT32 * batch * largest(dots)))
    return costs


def _pass_costs(config: TransformerConfig, one: Pass, rows: int, count: dict[str, int]) -> list[OpCost]:
    """A pass of the blocks with the inputs before and the logits after it."""
    hart, width = traced.hart_weights(config), config.width
    read = count[EMBEDDINGS] if not one.scale else size((hart["word_embed"], hart.get("level_embed")))
    embedded = macs(traced.input_products(config, one.scale, one.tokens, rows))
    states = BFLOAT16 * rows * one.tokens * width
    costs = [OpCost(one.step, EMBEDDINGS, embedded, BFLOAT16 * read, largest=states)]
    for part, products in traced.block_products(config, one.tokens, one.keys).items():
        held = {ATTENTION: states, ADALN: FLOAT32 * rows * 6 * width}.get(part, BFLOAT16 * rows * largest(products))
        cache = cache_bytes(config, rows, one.cached) if part == ATTENTION else 0
        taken = config.depth * rows * macs(products)
        costs.append(OpCost(one.step, part, taken, BFLOAT16 * count.get(part, 0), cache, held))
    logits = traced.logit_products(config, one.tokens if one.scale else 1)
    held = FLOAT32 * rows * largest(logits)
    costs.append(OpCost(one.step, TOKEN_HEAD, rows * macs(logits), BFLOAT16 * count[TOKEN_HEAD], largest=held))
    return costs


def _residual_costs(config: TransformerConfig, tokens: int, rows: int, count: dict[str, int]) -> list[OpCost]:
    """All steps of the diffusion head for so many tokens of each row."""
    steps, read = config.diffusion.sampling_steps, BFLOAT16 * size(traced.hart_weights(config)["word_embed"])
    # The chosen code is embedded once more, for the condition.
    embedded = rows * macs(traced.residual_condition_products(config, tokens))
    step = traced.denoise_products(config, tokens, tokens)
    taken, held = steps * rows * macs(step), BFLOAT16 * rows * largest(step)
    return [
        OpCost("residual", EMBEDDINGS, embedded, read),
        OpCost("residual", DIFFUSION, taken, steps * BFLOAT16 * count[DIFFUSION], largest=held),
    ]


def cache_bytes(config: TransformerConfig, rows: int, positions: int) -> int:
    """Of the keys and values of so many positions, all layers."""
    return BFLOAT16 * 2 * config.depth * rows * positions * config.width


def full_cache_bytes(experiment: HartExperiment, batch: int, *, guided: bool = True) -> int:
    """Of the key-value cache when the last pass of the blocks reads it."""
    last = passes(experiment.transformer, experiment.sample.masked_iterations)[-1]
    return cache_bytes(experiment.transformer, batch * (2 if guided else 1), last.cached)


def savings(experiment: HartExperiment, batch: int) -> dict[str, int]:
    """MACs, with guidance, that sampling can do without; the last three change the rounding, and exclude each other."""
    config, count = experiment.transformer, params(experiment)
    rows, context, positions = 2 * batch, config.context_tokens, config.sizes[-1]

    def of_context(tokens: int) -> int:
        """The context's pass of one row, without the logits."""
        narrow = dataclasses.replace(config, context_tokens=tokens)
        return sum(cost.macs for cost in _pass_costs(narrow, passes(narrow)[0], 1, count) if cost.part != TOKEN_HEAD)

    # At the positions before the last: queries, a third of what makes queries, keys and values; and all after them.
    unused = traced.block_products(config, context - 1, context)
    last_block = macs(unused[QKV]) // 3 + sum(macs(unused[part]) for part in (ATTENTION, OUT, MLP))
    steps = 0 if experiment.sample.discrete_only else config.diffusion.sampling_steps
    two, one = (macs(traced.denoise_products(config, 2, times)) for times in (2, 1))
    more_times = steps * (rows * positions - experiment.sample.masked_iterations)
    embedded = rows * macs(traced.embed_residual_condition_products(config, positions))
    quarters = batch * _saved_by_quarters(experiment)
    convs, _ = traced.decoder_products(experiment.tokenizer)
    three_by_three = batch * macs(p for p in convs if p.window in ((3, 3), traced.QUARTER)) + quarters
    return {
        "the unconditional context, alike at all positions: one of them, once per batch": (
            batch * of_context(context) - of_context(1)
        ),
        "no unconditional logits at the first scale, where guidance is 0": (
            batch * macs(traced.logit_products(config, 1))
        ),
        "the last block's output at the last context position alone": rows * last_block,
        "cond_embed(z) of the diffusion head once, not in every step": embedded * max(0, steps - 1),
        "the diffusion head's time embedding once per step, not per token": more_times * (two - one),
        "upsampling convolutions as four of 2x2 before doubling": quarters,
        "Winograd F(2x2) for 3x3 convolutions": three_by_three * 5 // 9,
        "Winograd F(4x4) for 3x3 convolutions": three_by_three * 3 // 4,
    }


def _saved_by_quarters(experiment: HartExperiment) -> int:
    """Of one image: four 2x2 convolutions in place of a 3x3 of what they double take 4 products in place of 9."""
    convs, _ = traced.decoder_products(experiment.tokenizer)
    return macs(traced.quarters(convs)) * 5 // 4
