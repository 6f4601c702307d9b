"""CLIP (Radford et al., arXiv 2103.00020), whose embeddings of images and of texts can be compared: the CLIP score.

It is read from a folder of transformers: config.json, the weights, the tokenizer's files and preprocessor_config.json.

Letters: B images, H by W pixels of 3 channels, N texts of T tokens (S those attended to), W width, K heads of D
numbers, F numbers of an embedding.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from hart_jax.errors import UserError
from hart_jax.evaluation.networks.base import FeatureNetwork, Features
from hart_jax.io.buckets import local_copy
from hart_jax.io.files import read_json
from hart_jax.io.fingerprint import weights_digest
from hart_jax.io.safetensors import check_tree
from hart_jax.io.state_dict import StateDict
from hart_jax.io.tensor_files import open_tensors, weight_file
from hart_jax.parallel.program import Program
from hart_jax.text.prompts import check_prompts

# Texts that are embedded at once; the last ones are filled up, so that one program serves all.
TEXTS = 16

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# What the sizes of image towers are called.
_LETTERS = {768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}

# The default would be lower on accelerators, and embeddings would depend on the chip.
_PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Sizes of a transformer, by their names in a published config.json; what that leaves out is the default here."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("hidden_act", "layer_norm_eps") and (type(value) is not int or value < 1):
                raise UserError(f"{name} is {value!r}; it must be a positive whole number")
        if not isinstance(self.layer_norm_eps, float) or self.layer_norm_eps <= 0:
            raise UserError(f"layer_norm_eps is {self.layer_norm_eps!r}; it must be a positive number")
        if self.hidden_act not in _ACTIVATIONS:
            raise UserError(f"hidden_act is {self.hidden_act!r}; choose one of {', '.join(_ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any], tower: str, where: str) -> Self:
        """The config of the tower "text" or "vision" in a published config.json."""
        # In old files the settings that count are under the second name.
        own = values.get(f"{tower}_config_dict") or values.get(f"{tower}_config") or {}
        given = {name: own[name] for name in cls.__dataclass_fields__ if name in own}
        try:
            return cls(**given | {"projection_dim": values.get("projection_dim", 512)})
        except UserError as error:
            raise UserError(f"{where}: {tower}_config: {error}") from None


@dataclasses.dataclass(frozen=True)
class VisionConfig(TowerConfig):
    hidden_size: int = 768
    intermediate_size: int = 3072
    image_size: int = 224
    patch_size: int = 32


@dataclasses.dataclass(frozen=True)
class TextConfig(TowerConfig):
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What is done with an image: its short side to `size`, its middle square of `crop`, (x / 255 - mean) / std."""

    size: int = 224
    crop: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "Preprocessing":
        """Of a published preprocessor_config.json, other settings of which must be those that are computed here."""
        fixed = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3}
        for name, value in fixed.items():
            if values.get(name, value) != value:
                raise UserError(f"{where}: {name} is {values[name]!r}; only {value!r} is supported")
        if abs(values.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise UserError(f"{where}: rescale_factor is {values['rescale_factor']!r}; only 1/255 is supported")
        size = _pixels(values, "size", cls.size, ("shortest_edge",), where)
        crop = _pixels(values, "crop_size", cls.crop, ("height", "width"), where)
        mean, std = (tuple(values.get(f"image_{name}", getattr(cls, name))) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or crop > size:
            raise UserError(f"{where}: image_mean and image_std must be of three channels, crop_size at most size")
        return cls(size, crop, mean, std)


def _pixels(values: Mapping[str, Any], name: str, default: int, sides: tuple[str, ...], where: str) -> int:
    """A setting that old files have as a number and new ones as these sides, all equal."""
    given = values.get(name, default)
    each: list[Any] = (
        [given.get(side) for side in sides] if isinstance(given, dict) and len(given) == len(sides) else [given]
    )
    if any(type(pixels) is not int or pixels < 1 or pixels != each[0] for pixels in each):
        raise UserError(f"{where}: {name} is {given!r}; only a number of pixels, or one for {sides}, is supported")
    return each[0]


@dataclasses.dataclass(frozen=True)
class Clip:
    """CLIP, loaded.

    Attributes:
      images: its image tower; features are projected embeddings, of any length.
      text_config, text_params: its text tower, arrays on the host.
      tokenizer: of transformers.
    """

    images: FeatureNetwork
    text_config: TextConfig
    text_params: Any
    tokenizer: Any

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        """Projected embeddings (N, F) float32, of any length; long prompts are cut, as usual for CLIP.

        Raises:
          UserError: there is no prompt or an empty one, or the tokenizer does not end texts as the config says.
        """
        check_prompts(prompts)
        config = self.text_config
        encoded = self.tokenizer(list(prompts), truncation=True, max_length=config.max_position_embeddings)
        ids_NT = np.zeros((len(prompts), config.max_position_embeddings), np.int32)
        ends_N = np.zeros(len(prompts), np.int32)
        for row, ids in enumerate(encoded["input_ids"]):
            ids_NT[row, : len(ids)] = ids
            ends_N[row] = _end(ids, config)
        params = jax.device_put(self.text_params)
        parts = []
        for start in range(0, len(prompts), TEXTS):
            rows = np.minimum(np.arange(start, start + TEXTS), len(prompts) - 1)
            parts.append(np.asarray(embed_texts(config, params, ids_NT[rows], ends_N[rows])))
        return np.concatenate(parts)[: len(prompts)]


def _end(ids: Sequence[int], config: TextConfig) -> int:
    """Where in a text its end token is, whose state the embedding is made of; what follows is not attended to."""
    # In configs of before transformers 4.32 the token is always 2, and means the highest there is.
    if config.eos_token_id == 2:
        return int(np.argmax(ids))
    if config.eos_token_id not in ids:
        raise UserError(
            f"CLIP: the tokenizer does not end texts with the token that config.json calls eos_token_id, "
            f"{config.eos_token_id}; check that both files are of one model"
        )
    return list(ids).index(config.eos_token_id)


def _embedded(config: TextConfig, params: Any, ids_NT: jax.Array, ends_N: jax.Array) -> jax.Array:
    return TextTower(config).apply({"params": params}, ids_NT, ends_N)


embed_texts = Program("CLIP texts", _embedded, static_argnums=0)


def clip_score(images_BF: np.ndarray, texts_BF: np.ndarray) -> np.ndarray:
    """(B,) scores of images and their texts, 0 to 100: 100 max(cosine, 0) (Hessel et al., arXiv 2104.08718)."""
    images_BF, texts_BF = (np.asarray(array, np.float64) for array in (images_BF, texts_BF))
    lengths_B = np.linalg.norm(images_BF, axis=1) * np.linalg.norm(texts_BF, axis=1)
    cosines_B = np.einsum("bf,bf->b", images_BF, texts_BF) / np.maximum(lengths_B, 1e-30)
    return (100 * np.maximum(cosines_B, 0)).astype(np.float32)


def load_clip(folder: str | os.PathLike[str]) -> Clip:
    """The CLIP in a folder of transformers, of any size, its weights in one file or several.

    The digest of `images` is of both towers' weights and of the settings that are not in them.

    Raises:
      UserError: a file is missing or damaged, or is of a model that computes something else.
    """
    folder = local_copy(folder)
    where = folder / "config.json"
    values = read_json(where)
    if values.get("model_type") != "clip":
        raise UserError(f"{where}: model_type is {values.get('model_type')!r}; only 'clip' is supported")
    vision = VisionConfig.from_json(values, "vision", str(where))
    text = TextConfig.from_json(values, "text", str(where))
    preprocessing = _read_preprocessing(folder / "preprocessor_config.json", vision)
    tokenizer = _read_tokenizer(folder, text)
    params = _read_params(weight_file(folder, "model"), vision, text)

    settings = [dataclasses.asdict(part) for part in (vision, text, preprocessing)]
    stored = {"settings": np.frombuffer(json.dumps(settings, sort_keys=True).encode(), np.uint8)}
    images = FeatureNetwork(
        name=_name(folder, vision),
        standard=False,
        digest=weights_digest(flatten_dict(params, sep="/") | stored),
        width=vision.projection_dim,
        params=params["vision"],
        apply=functools.partial(features, vision=vision, preprocessing=preprocessing),
    )
    return Clip(images, text, params["text"], tokenizer)


def _name(folder: Path, config: VisionConfig) -> str:
    size = _LETTERS.get(config.hidden_size, str(config.hidden_size))
    resolution = "" if config.image_size == 224 else f"@{config.image_size}px"
    return f"CLIP ViT-{size}/{config.patch_size}{resolution} ({folder.resolve().name})"


def features(params: Any, images_BHWC: jax.Array, vision: VisionConfig, preprocessing: Preprocessing) -> Features:
    """`FeatureNetwork.apply` of the image tower."""
    x_BHWC = preprocessed(images_BHWC, preprocessing)
    return Features(VisionTower(vision).apply({"params": params}, x_BHWC))


def preprocessed(images_BHWC: jax.Array, settings: Preprocessing) -> jax.Array:
    """The image tower's input, (B, crop, crop, 3) float32.

    Args:
      images_BHWC: uint8. They are resized as by Pillow's bicubic filter, which rounds to uint8 behind each of its two
        passes: of photographs 1 value in 10,000 is off by 1, of noise 1 in 1,400.
    """
    _, height, width, _ = images_BHWC.shape
    tall, wide = (int(settings.size * side / min(height, width)) for side in (height, width))
    x_BHWC = _resized(_resized(images_BHWC.astype(jnp.float32), 2, wide), 1, tall)
    top, left = ((side - settings.crop) // 2 for side in (tall, wide))
    x_BHWC = x_BHWC[:, top : top + settings.crop, left : left + settings.crop]
    return (x_BHWC / 255 - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)


def _resized(x_BHWC: jax.Array, axis: int, side: int) -> jax.Array:
    """`axis` at `side` points, in whole numbers from 0 to 255."""
    shape = (*x_BHWC.shape[:axis], side, *x_BHWC.shape[axis + 1 :])
    return jnp.clip(jnp.floor(jax.image.resize(x_BHWC, shape, "cubic", precision=_PRECISION) + 0.5), 0, 255)


class VisionTower(nn.Module):
    """Images to projected embeddings."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """(B, image_size, image_size, 3), as `preprocessed` gives them, to (B, F)."""
        config, init = self.config, nn.initializers.normal(0.02)
        window = (config.patch_size, config.patch_size)
        patches = nn.Conv(
            config.hidden_size, window, window, "VALID", use_bias=False, precision=_PRECISION, name="patch_embedding"
        )
        x_BTW = patches(x_BHWC).reshape(len(x_BHWC), -1, config.hidden_size)
        class_W = self.param("class_embedding", init, (config.hidden_size,))
        x_BTW = jnp.concatenate([jnp.broadcast_to(class_W, (len(x_BTW), 1, config.hidden_size)), x_BTW], axis=1)
        x_BTW = x_BTW + self.param("position_embedding", init, x_BTW.shape[1:])
        x_BTW = _norm(config, "pre_norm")(x_BTW)
        x_BTW = _through_layers(config, x_BTW, causal=False)
        return _projection(config)(_norm(config, "post_norm")(x_BTW[:, 0]))


class TextTower(nn.Module):
    """Texts to projected embeddings."""

    config: TextConfig

    @nn.compact
    def __call__(self, ids_NT: jax.Array, ends_N: jax.Array) -> jax.Array:
        """Tokens, and the places of the end tokens, whose states are embedded, to (N, F)."""
        config, init = self.config, nn.initializers.normal(0.02)
        token_VW = self.param("token_embedding", init, (config.vocab_size, config.hidden_size))
        position_TW = self.param("position_embedding", init, (config.max_position_embeddings, config.hidden_size))
        x_NTW = jnp.asarray(token_VW)[ids_NT] + position_TW[: ids_NT.shape[1]]
        x_NTW = _norm(config, "final_norm")(_through_layers(config, x_NTW, causal=True))
        return _projection(config)(x_NTW[jnp.arange(len(x_NTW)), ends_N])


class _Layer(nn.Module):
    config: TowerConfig
    causal: bool

    @nn.compact
    def __call__(self, x_BTW: jax.Array) -> tuple[jax.Array, None]:
        config = self.config
        heads = (*x_BTW.shape[:2], config.num_attention_heads, -1)
        y_BTW = _norm(config, "attention_norm")(x_BTW)
        q_BTKD, k_BSKD, v_BSKD = (
            _dense(config.hidden_size, name)(y_BTW).reshape(heads) for name in ("query", "key", "value")
        )
        q_BTKD = q_BTKD * q_BTKD.shape[-1] ** -0.5
        logits_BKTS = jnp.einsum("btkd,bskd->bkts", q_BTKD, k_BSKD, precision=_PRECISION)
        if self.causal:
            seen_TS = np.tri(x_BTW.shape[1], dtype=bool)
            logits_BKTS = jnp.where(seen_TS, logits_BKTS, jnp.finfo(logits_BKTS.dtype).min)
        mixed_BTKD = jnp.einsum("bkts,bskd->btkd", jax.nn.softmax(logits_BKTS), v_BSKD, precision=_PRECISION)
        x_BTW = x_BTW + _dense(config.hidden_size, "attention_out")(mixed_BTKD.reshape(x_BTW.shape))
        y_BTW = _dense(config.intermediate_size, "mlp_in")(_norm(config, "mlp_norm")(x_BTW))
        return x_BTW + _dense(config.hidden_size, "mlp_out")(_ACTIVATIONS[config.hidden_act](y_BTW)), None


def _through_layers(config: TowerConfig, x_BTW: jax.Array, *, causal: bool) -> jax.Array:
    layers = nn.scan(_Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.num_hidden_layers)
    return layers(config, causal, name="layers")(x_BTW)[0]


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, precision=_PRECISION, name=name)


def _projection(config: TowerConfig) -> nn.Dense:
    return nn.Dense(config.projection_dim, use_bias=False, precision=_PRECISION, name="projection")


def _norm(config: TowerConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name=name)


def _read_preprocessing(path: Path, config: VisionConfig) -> Preprocessing:
    try:
        settings = Preprocessing.from_json(read_json(path), str(path))
    except TypeError as error:
        raise UserError(f"{path}: a setting is of the wrong type ({error})") from error
    if settings.crop != config.image_size:
        raise UserError(f"{path}: crop_size is {settings.crop}, but the model's image_size {config.image_size}")
    return settings


def _read_tokenizer(folder: Path, config: TextConfig) -> Any:
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        raise UserError(f"{folder}: no tokenizer.json, nor vocab.json and merges.txt; copy the whole folder")
    # Otherwise it says on stderr that PyTorch is not installed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        from transformers import AutoTokenizer  # takes seconds to import
    except ImportError as error:
        raise UserError(
            f"{folder}: CLIP's tokenizer needs transformers; install it with: pip install 'hart_jax[transformers]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        rows = max(tokenizer.get_vocab().values()) + 1
    except Exception as error:  # a damaged file raises whatever the library's parsers do
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason})") from error
    if rows > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {rows} tokens but the embedding only {config.vocab_size} rows")
    return tokenizer


def _read_params(file: Path, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
    """Parameters of both towers, float32, every tensor accounted for."""
    state = StateDict(open_tensors(file), str(file))
    try:
        params = {"vision": _vision_params(state, vision), "text": _text_params(state, text)}
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file}: tensor {state.latest!r} does not fit config.json ({error})") from error
    # The scale is of the training's loss; positions are counted here.
    state.explain("logit_scale", *(f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")))
    state.finish()
    check_tree(params, _abstract_params(vision, text), str(file))
    return params


def _vision_params(state: StateDict, config: VisionConfig) -> dict[str, Any]:
    name = "vision_model"
    return {
        "class_embedding": state.take(f"{name}.embeddings.class_embedding"),
        "patch_embedding": state.conv(f"{name}.embeddings.patch_embedding"),
        "position_embedding": state.take(f"{name}.embeddings.position_embedding.weight"),
        # As it is spelt there.
        "pre_norm": state.affine(f"{name}.pre_layrnorm"),
        "layers": _layers_params(state, f"{name}.encoder.layers", config),
        "post_norm": state.affine(f"{name}.post_layernorm"),
        "projection": state.linear("visual_projection"),
    }


def _text_params(state: StateDict, config: TextConfig) -> dict[str, Any]:
    name = "text_model"
    return {
        "token_embedding": state.take(f"{name}.embeddings.token_embedding.weight"),
        "position_embedding": state.take(f"{name}.embeddings.position_embedding.weight"),
        "layers": _layers_params(state, f"{name}.encoder.layers", config),
        "final_norm": state.affine(f"{name}.final_layer_norm"),
        "projection": state.linear("text_projection"),
    }


def _layers_params(state: StateDict, prefix: str, config: TowerConfig) -> dict[str, Any]:
    layers = [
        {
            "attention_norm": state.affine(f"{prefix}.{index}.layer_norm1"),
            "query": state.linear(f"{prefix}.{index}.self_attn.q_proj"),
            "key": state.linear(f"{prefix}.{index}.self_attn.k_proj"),
            "value": state.linear(f"{prefix}.{index}.self_attn.v_proj"),
            "attention_out": state.linear(f"{prefix}.{index}.self_attn.out_proj"),
            "mlp_norm": state.affine(f"{prefix}.{index}.layer_norm2"),
            "mlp_in": state.linear(f"{prefix}.{index}.mlp.fc1"),
            "mlp_out": state.linear(f"{prefix}.{index}.mlp.fc2"),
        }
        for index in range(config.num_hidden_layers)
    ]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *layers)


def _abstract_params(vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
    key = jax.random.key(0)
    image = jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32)
    ids, ends = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return {
        "vision": jax.eval_shape(VisionTower(vision).init, key, image)["params"],
        "text": jax.eval_shape(TextTower(text).init, key, ids, ends)["params"],
    }
