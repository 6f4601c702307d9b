"""What sampling one batch of images takes: multiply-accumulates (MACs) and bytes of every part in every step.

Counted from the sizes alone: matrix products and convolutions as SPEC.md defines them, attention of the pairs that see
each other. One MAC is two FLOPs. Bytes are of bfloat16, those of logits, AdaLN and the quantizer of float32.
"""

import dataclasses
import itertools

from hart_jax.config import DiffusionConfig, HartExperiment, TokenizerConfig, TransformerConfig
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.files import read_json
from hart_jax.sampling.rules import iteration_sizes
from hart_jax.text.minilm import MiniLMConfig
from hart_jax.text.qwen2 import Qwen2Config

BFLOAT16, FLOAT32 = 2, 4
SINUSOIDS = 256
# Words and marks of the release's system prompt; a byte-level vocabulary makes one token of most.
SYSTEM_PROMPT_TOKENS = 131

QKV, OUT, MLP, ADALN = "blocks: qkv", "blocks: output projection", "blocks: MLP", "blocks: AdaLN"
TEXT, EMBEDDINGS, ATTENTION, TOKEN_HEAD = "text encoder", "embeddings", "attention", "token head"
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
    largest array that one operation makes.
    """

    step: str
    part: str
    macs: int
    weights: int = 0
    cache: int = 0
    largest: int = 0


@dataclasses.dataclass(frozen=True)
class TextSize:
    """Sizes of a text encoder: Qwen2's decoder (`causal`, SwiGLU, behind a system prompt) or BERT's encoder.

    `kv_width` is that of all key heads together; `positions` are rows of tables beside the vocabulary's.
    """

    causal: bool
    vocab: int
    width: int
    layers: int
    kv_width: int
    mlp_width: int
    positions: int = 0

    @classmethod
    def of(cls, config: Qwen2Config | MiniLMConfig) -> "TextSize":
        width, layers = config.hidden_size, config.num_hidden_layers
        if isinstance(config, Qwen2Config):
            kv_width = config.num_key_value_heads * config.head_dim
            return cls(True, config.vocab_size, width, layers, kv_width, config.intermediate_size)
        positions = config.max_position_embeddings + config.type_vocab_size
        return cls(False, config.vocab_size, width, layers, width, config.intermediate_size, positions)

    @property
    def matrices(self) -> int:
        """MACs per token, and parameters without biases, of all layers."""
        attention = 2 * self.width * (self.width + self.kv_width)
        return self.layers * (attention + (3 if self.causal else 2) * self.width * self.mlp_width)

    @property
    def params(self) -> int:
        tables = (self.vocab + self.positions) * self.width
        biases = self.width + 2 * self.kv_width
        if self.causal:
            return tables + self.matrices + self.layers * (biases + 2 * self.width) + self.width
        return tables + self.matrices + self.layers * (biases + 6 * self.width + self.mlp_width) + 2 * self.width

    def macs(self, tokens: int, before: int = 0) -> int:
        """Of one prompt padded to so many tokens, behind so many whose keys and values are there already."""
        pairs = tokens * before + (tokens * (tokens + 1) // 2 if self.causal else tokens**2)
        return self.matrices * tokens + self.layers * 2 * pairs * self.width


def read_text_size(folder: str) -> TextSize | None:
    """The sizes in a text encoder's config.json, None where there is none.

    Raises:
      UserError: it is of another kind than qwen2, qwen2_vl and bert, or lacks a size.
    """
    if not folder:
        return None
    path = local_copy(folder) / "config.json"
    if not path.is_file():
        return None
    values = read_json(path)
    kind = values.get("model_type")
    if kind == "bert":
        return TextSize.of(MiniLMConfig.from_json(values, str(path)))
    if kind in ("qwen2", "qwen2_vl"):
        return TextSize.of(Qwen2Config.from_json(values, str(path)))
    raise UserError(f"{path}: model_type {kind!r} cannot be counted; known are qwen2, qwen2_vl and bert")


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of the blocks: so many tokens of each row, which see the first `keys` positions, theirs included."""

    step: str
    tokens: int
    keys: int
    last: bool = False

    @property
    def cached(self) -> int:
        """Positions whose keys and values are read from the cache or written to it; nothing comes after the last."""
        return self.keys - self.tokens * self.last


def passes(config: TransformerConfig, masked_iterations: int = 1) -> list[Pass]:
    """The context, which predicts the first scale, then the other scales; the last in so many iterations."""
    *middle, last = config.patch_nums[1:]
    sizes = [(CONTEXT, config.context_tokens), *((f"{side}x{side}", side * side) for side in middle)]
    sizes += [(f"{last}x{last}", size) for size in iteration_sizes(last * last, masked_iterations)]
    ends = list(itertools.accumulate(tokens for _, tokens in sizes))
    return [Pass(step, tokens, end, end == ends[-1]) for (step, tokens), end in zip(sizes, ends, strict=True)]


def diffusion_params(config: DiffusionConfig, latent_channels: int, width: int) -> int:
    """Of the residual diffusion head for a transformer of this width."""
    biases = 2 * config.width + 2 * config.width + config.depth * 7 * config.width
    biases += 2 * config.width + 2 * latent_channels
    return diffusion_macs(config, latent_channels, width) + biases


def diffusion_macs(config: DiffusionConfig, latent_channels: int, width: int) -> int:
    """Of one token in one step."""
    w = config.width
    embeddings = SINUSOIDS * w + w * w + width * w + latent_channels * w
    return embeddings + config.depth * 5 * w * w + 2 * w * w + 2 * latent_channels * w


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution of stride 1 on side x side positions; `normed` where a group norm precedes it, `upsampled` where
    its input was just doubled."""

    side: int
    kernel: int
    inputs: int
    outputs: int
    normed: bool = False
    upsampled: bool = False

    @property
    def macs(self) -> int:
        return self.side**2 * self.kernel**2 * self.inputs * self.outputs

    @property
    def params(self) -> int:
        return self.kernel**2 * self.inputs * self.outputs + self.outputs + 2 * self.inputs * self.normed


def decoder_convs(config: TokenizerConfig) -> list[Conv]:
    """All convolutions from the latent to the image, `post_quant_conv` first."""
    side, latent, levels = config.patch_nums[-1], config.latent_channels, len(config.channel_multipliers)
    widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
    width = widths[-1]

    def res_block(inputs: int, outputs: int) -> list[Conv]:
        shortcut = [Conv(side, 1, inputs, outputs)] if inputs != outputs else []
        return [Conv(side, 3, inputs, outputs, normed=True), Conv(side, 3, outputs, outputs, normed=True), *shortcut]

    def attention(width: int) -> list[Conv]:
        return [Conv(side, 1, width, 3 * width, normed=True), Conv(side, 1, width, width)]

    convs = [Conv(side, 3, latent, latent), Conv(side, 3, latent, width)]
    convs += [*res_block(width, width), *attention(width), *res_block(width, width)]
    for level in reversed(range(levels)):
        for _ in range(config.res_blocks + 1):
            convs += res_block(width, widths[level])
            width = widths[level]
            if level == levels - 1:
                convs += attention(width)
        if level:
            side *= 2
            convs.append(Conv(side, 3, width, width, upsampled=True))
    return [*convs, Conv(side, 3, width, 3, normed=True)]


def _decoder_attention_macs(config: TokenizerConfig) -> int:
    """Of one image: after the middle's first block and each block of the lowest resolution."""
    width = config.channels * config.channel_multipliers[-1]
    return (config.res_blocks + 2) * 2 * config.patch_nums[-1] ** 4 * width


def params(experiment: HartExperiment, text: TextSize | None = None) -> dict[str, int]:
    """Parameters of each part that sampling uses; the encoder of images is not among them."""
    config, tokenizer = experiment.transformer, experiment.tokenizer
    width, depth, latent = config.width, config.depth, config.latent_channels
    if config.num_classes:
        condition = (config.num_classes + 2) * width
    else:
        condition = (config.context_dim + 1) * width + config.context_dim * config.use_context_norm
    level = (SINUSOIDS + width + 2) * width if config.use_timestep_embed else len(config.patch_nums) * width
    modulation_and_norms = (2 * width + 2) * width + 2 * width
    adaln = {"none": 0, "shared": 6 * width, "own": 6 * (width + 1) * width}[config.adaln]
    return {
        TEXT: text.params if text else 0,
        EMBEDDINGS: condition + (latent + 1) * width + level + modulation_and_norms,
        QKV: depth * (3 * width * width + 2 * width + config.heads * config.attn_l2_norm),
        OUT: depth * (width + 1) * width,
        MLP: depth * (3 * width * config.mlp_width + width),
        ADALN: depth * adaln,
        TOKEN_HEAD: (width + 1) * config.vocab_size,
        DIFFUSION: diffusion_params(config.diffusion, latent, width),
        QUANTIZER: tokenizer.vocab_size * latent + tokenizer.num_phi * (9 * latent + 1) * latent,
        DECODER: sum(conv.params for conv in decoder_convs(tokenizer)),
    }


def sampling_costs(
    experiment: HartExperiment, batch: int, *, guided: bool = True, text: TextSize | None = None
) -> list[OpCost]:
    """All costs of sampling so many images, in order; guidance doubles the rows of the transformer and its head."""
    config, sample, tokenizer = experiment.transformer, experiment.sample, experiment.tokenizer
    rows, sides, count = batch * (2 if guided else 1), config.patch_nums, params(experiment, text)
    costs: list[OpCost] = []
    if text is not None and not config.num_classes:
        before = SYSTEM_PROMPT_TOKENS * text.causal
        # Of the vocabulary's table only the rows of the prompts' tokens are read.
        read = BFLOAT16 * (count[TEXT] - text.vocab * text.width)
        largest = BFLOAT16 * batch * config.context_tokens * text.mlp_width
        costs.append(OpCost(TEXT, TEXT, batch * text.macs(config.context_tokens, before), read, largest=largest))
    for one in passes(config, sample.masked_iterations):
        costs += _pass_costs(config, one, rows, count)
        if one.step == f"{sides[-1]}x{sides[-1]}" and not sample.discrete_only:
            costs += _residual_costs(config, one.tokens, rows, count)
    costs += _quantizer_costs(experiment, batch, count)
    convs = decoder_convs(tokenizer)
    largest = BFLOAT16 * batch * max(conv.side**2 * max(conv.inputs, conv.outputs) for conv in convs)
    macs = batch * sum(conv.macs for conv in convs)
    costs.append(OpCost(DECODER, DECODER, macs, BFLOAT16 * count[DECODER], largest=largest))
    macs = batch * _decoder_attention_macs(tokenizer)
    costs.append(OpCost(DECODER, DECODER_ATTENTION, macs, largest=FLOAT32 * batch * sides[-1] ** 4))
    return costs


def _pass_costs(config: TransformerConfig, one: Pass, rows: int, count: dict[str, int]) -> list[OpCost]:
    """A pass of the blocks with the inputs before and the logits after it."""
    width, depth, tokens = config.width, config.depth, rows * one.tokens
    is_context = one.step == CONTEXT
    level = (SINUSOIDS + width) * width if config.use_timestep_embed else 0
    if is_context:
        embedded = 0 if config.num_classes else config.context_tokens * config.context_dim
        embeddings = level + rows * (embedded * width + 2 * width * width)
        read = count[EMBEDDINGS]
    else:
        embeddings = level + tokens * config.latent_channels * width
        read = level + config.latent_channels * width
    blocks = {QKV: 3 * width * width, OUT: width * width, MLP: 3 * width * config.mlp_width}
    widest = {QKV: 3 * width, OUT: width, MLP: config.mlp_width}
    costs = [OpCost(one.step, EMBEDDINGS, embeddings, BFLOAT16 * read, largest=BFLOAT16 * tokens * width)]
    for part, macs in blocks.items():
        largest = BFLOAT16 * tokens * widest[part]
        costs.append(OpCost(one.step, part, depth * tokens * macs, BFLOAT16 * count[part], largest=largest))
    if config.adaln != "none":
        macs = depth * rows * 6 * width * width if config.adaln == "own" else 0
        costs.append(OpCost(one.step, ADALN, macs, BFLOAT16 * count[ADALN], largest=FLOAT32 * rows * 6 * width))
    cache = cache_bytes(config, rows, one.cached)
    attention = depth * tokens * one.keys * 2 * width
    costs.append(OpCost(one.step, ATTENTION, attention, cache=cache, largest=BFLOAT16 * tokens * width))
    predicting = rows if is_context else tokens
    logits = predicting * width * config.vocab_size
    largest = FLOAT32 * predicting * config.vocab_size
    costs.append(OpCost(one.step, TOKEN_HEAD, logits, BFLOAT16 * count[TOKEN_HEAD], largest=largest))
    return costs


def _residual_costs(config: TransformerConfig, tokens: int, rows: int, count: dict[str, int]) -> list[OpCost]:
    """All steps of the diffusion head for so many tokens of each row."""
    head, steps = config.diffusion, config.diffusion.sampling_steps
    macs = rows * tokens * steps * diffusion_macs(head, config.latent_channels, config.width)
    largest = BFLOAT16 * rows * tokens * 3 * head.width
    # The chosen code is embedded once more, for the condition.
    embedded = rows * tokens * config.latent_channels * config.width
    return [
        OpCost("residual", EMBEDDINGS, embedded, BFLOAT16 * config.latent_channels * config.width),
        OpCost("residual", DIFFUSION, macs, steps * BFLOAT16 * count[DIFFUSION], largest=largest),
    ]


def _quantizer_costs(experiment: HartExperiment, batch: int, count: dict[str, int]) -> list[OpCost]:
    """Between scales, in float32: phi(bicubic(code)), then area pooling, as products with whole matrices."""
    config = experiment.tokenizer
    last, channels = config.patch_nums[-1], config.latent_channels
    macs = 0
    for side, following in itertools.pairwise(config.patch_nums):
        macs += last * side * (side + last) * channels + 9 * last**2 * channels**2
        macs += following * last * (last + following) * channels if following != last else 0
    if experiment.sample.smooth:
        macs += experiment.transformer.num_tokens * config.vocab_size * channels
    largest = FLOAT32 * batch * last**2 * channels
    return [OpCost("between scales", QUANTIZER, batch * macs, FLOAT32 * count[QUANTIZER], largest=largest)]


def cache_bytes(config: TransformerConfig, rows: int, positions: int) -> int:
    """Of the keys and values of so many positions, all layers."""
    return BFLOAT16 * 2 * config.depth * rows * positions * config.width


def full_cache_bytes(experiment: HartExperiment, batch: int, *, guided: bool = True) -> int:
    """Of the key-value cache when the last pass of the blocks reads it."""
    last = passes(experiment.transformer, experiment.sample.masked_iterations)[-1]
    return cache_bytes(experiment.transformer, batch * (2 if guided else 1), last.cached)


def savings(experiment: HartExperiment, batch: int) -> dict[str, int]:
    """MACs, with guidance, that sampling can do without; the last three change the rounding, and exclude each other."""
    config, head = experiment.transformer, experiment.transformer.diffusion
    width, positions = config.width, config.patch_nums[-1] ** 2
    one_position = dataclasses.replace(experiment, transformer=dataclasses.replace(config, context_tokens=1))
    context, alike = (
        sum(
            cost.macs
            for cost in sampling_costs(each, 1, guided=False)
            if cost.step == CONTEXT and cost.part != TOKEN_HEAD
        )
        for each in (experiment, one_position)
    )
    unused = (config.context_tokens - 1) * (2 * width * (width + config.context_tokens) + 3 * width * config.mlp_width)
    convs = [conv for conv in decoder_convs(experiment.tokenizer) if conv.kernel == 3]
    three_by_three = batch * sum(conv.macs for conv in convs)
    upsampled = batch * sum(conv.macs for conv in convs if conv.upsampled)
    steps = 0 if experiment.sample.discrete_only else head.sampling_steps
    time = (SINUSOIDS + head.width) * head.width
    return {
        "the unconditional context, alike at all positions: one of them, once per batch": batch * context - alike,
        "no unconditional logits at the first scale, where guidance is 0": batch * width * config.vocab_size,
        "the last block's output at the last context position alone": 2 * batch * unused,
        "cond_embed(z) of the diffusion head once, not in every step": (
            2 * batch * positions * width * head.width * max(0, steps - 1)
        ),
        "the diffusion head's time embedding once per step, not per token": steps * (2 * batch * positions - 1) * time,
        "upsampling convolutions as four of 2x2 before doubling": upsampled * 5 // 9,
        "Winograd F(2x2) for 3x3 convolutions": three_by_three * 5 // 9,
        "Winograd F(4x4) for 3x3 convolutions": three_by_three * 3 // 4,
    }
