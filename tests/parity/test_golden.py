"""Released weights give the released implementation's numbers.

python -m pytest -q tests/parity [--golden DIR] [-s]: DIR is a folder of cases or one case, -s shows every figure.

Each check starts from the case's own arrays where it has them, so that a fault shows where it is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.config import SampleConfig
from hart_jax.diffusion.schedule import Schedule, diffusion_loss, sample_residual
from hart_jax.sampling.noise import GivenNoise
from hart_jax.sampling.sampler import generate
from hart_jax.tokenizer.discriminator import Discriminator
from hart_jax.tokenizer.losses import vq_loss
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.quantizer import Tokens
from hart_jax.transformer.model import Hart
from tests.parity.golden import Checks, each_sample, load_case, nchw, nhwc
from tests.parity.materialize import generator


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def test_golden(folder: Path, group: str) -> None:
    check = {"tok": tokenizer, "diff": diffusion, "ctx": context, "train": training, "gen": generation}.get(group)
    checks = Checks(load_case(folder), group)
    if check is not None:
        check(checks)
    checks.finish()


def tokenizer(checks: Checks) -> None:
    case, params = checks.case, checks.case.params["tokenizer"]
    f = _latent(checks)
    tokens = _tokens(checks, f)
    for scale, index in enumerate(tokens.indices):
        checks.equal(f"tok.idx.{scale}", index)
    checks.close("tok.f_rest", tokens.f_rest_BPC)
    checks.close("tok.ar_input", tokens.ar_input_BLC)

    quantized = _call_tokenizer(checks, lambda module, f: module.quantize(f))(params, f)
    checks.close("tok.f_hat_discrete", nchw(quantized.f_hat_BhwC))
    loss = vq_loss(quantized, f, case.tokenizer_config.beta)
    decode = _call_tokenizer(checks, lambda module, latent: module.decode(latent))
    latents = {
        "discrete": quantized.f_hat_BhwC,
        "continuous": quantized.f_hat_BhwC + quantized.residual_BhwC,
    }
    for name, latent in latents.items():
        checks.close(f"tok.{name}.f_hat", nchw(latent))
        checks.close(f"tok.{name}.vq_loss", loss)
        checks.close(f"tok.{name}.usage_percent", 100 * quantized.hits_V.mean())
        if checks.has(f"tok.{name}.reconstruction"):
            image = each_sample(lambda latent: decode(params, latent), np.asarray(latent))
            checks.close(f"tok.{name}.reconstruction", nchw(image))
    if checks.has("tok.disc_logits"):
        discriminate = jax.jit(Discriminator().apply)
        logits = each_sample(lambda image: discriminate(case.discriminator, image), nhwc(checks.given("tok.image")))
        checks.close("tok.disc_logits", nchw(logits))


def _call_tokenizer(checks: Checks, method: Any) -> Any:
    """The compiled function (params, array) of a tokenizer method."""
    module = Tokenizer(checks.case.tokenizer_config)
    return jax.jit(lambda params, array: module.apply({"params": params}, array, method=method))


def _latent(checks: Checks) -> np.ndarray:
    """The case's latent, against which ours is checked if there is an image."""
    if checks.has("tok.image"):
        encode = _call_tokenizer(checks, lambda module, image: module.encode(image))
        params = checks.case.params["tokenizer"]
        ours = nchw(each_sample(lambda image: encode(params, image), nhwc(checks.given("tok.image"))))
        checks.close("tok.f", ours)
        return nhwc(checks.given("tok.f", lambda: ours))
    return nhwc(checks.given("tok.f"))


def _tokens(checks: Checks, f: np.ndarray) -> Tokens:
    tokens = _call_tokenizer(checks, lambda module, f: module.quantizer.tokens(f))
    return tokens(checks.case.params["tokenizer"], f)


def diffusion(checks: Checks) -> None:
    config, network = checks.case.transformer_config.diffusion, _network(checks)
    checks.equal("diff.timesteps", Schedule.respaced(config.sampling_steps).timesteps)
    if checks.has("diff.out"):
        checks.close("diff.out", network(*(checks.given(f"diff.{name}") for name in ("x_t", "t", "z"))))
    if checks.has("diff.loss.loss", "diff.loss.mse", "diff.loss.vb"):
        names = ("diff.loss.target", "diff.z", "diff.t", "diff.loss.noise")
        loss = diffusion_loss(network, *(checks.given(name) for name in names))
        for name in ("loss", "mse", "vb"):
            checks.close(f"diff.loss.{name}", getattr(loss, name))
    if checks.has("diff.sample.out"):
        noise = checks.given("diff.sample.step_noise") if checks.has("diff.sample.step_noise") else None
        out = sample_residual(
            network,
            checks.given("diff.sample.z"),
            checks.given("diff.sample.init_noise"),
            noise,
            checks.given("diff.sample.cfg"),
            config.sampling_steps,
        )
        checks.close("diff.sample.out", out, sampled=True)


def _network(checks: Checks) -> Any:
    module = Hart(checks.case.transformer_config)
    call = jax.jit(lambda params, x, t, z: module.apply({"params": params}, x, t, z, method="denoise"))
    return lambda x, t, z: call(checks.case.params["transformer"], x, t, z)


def context(checks: Checks) -> None:
    case = checks.case
    mask = checks.given("ctx.mask")
    text = checks.given(
        "ctx.embeddings", lambda: np.zeros((*mask.shape, case.transformer_config.context_dim), np.float32)
    )
    embedded = Hart(case.transformer_config).apply(
        {"params": case.params["transformer"]}, text, mask, method="embed_text"
    )
    checks.equal("ctx.position_ids", embedded.positions)


def training(checks: Checks) -> None:
    case = checks.case
    module, params = Hart(case.transformer_config), case.params["transformer"]
    text, mask = checks.given("ctx.embeddings"), checks.given("ctx.mask")
    dropped_B = checks.given("train.dropped_context", lambda: np.zeros(len(text), bool))
    side = case.transformer_config.patch_nums[-1]
    kept_BP = checks.given("train.last_stage_kept", lambda: np.ones((len(text), side * side), bool))
    kept_BN = np.stack([np.flatnonzero(row) for row in kept_BP])
    ar_input = checks.given("tok.ar_input", lambda: _tokens(checks, _latent(checks)).ar_input_BLC)
    forward = jax.jit(lambda params, text, mask, *rest: module.apply({"params": params}, (text, mask), *rest))
    out = each_sample(
        lambda *arrays: forward(params, *arrays), np.where(dropped_B[:, None, None], 0, text), mask, ar_input, kept_BN
    )
    checks.close("train.logits", out.logits)

    if checks.has("train.diffusion_loss"):
        logits = checks.given("train.logits", lambda: out.logits)[:, -kept_BN.shape[1] :]
        code = np.asarray(case.params["tokenizer"]["quantizer"]["codebook"])[logits.argmax(-1)]
        rest = checks.given("tok.f_rest", lambda: _tokens(checks, _latent(checks)).f_rest_BPC)
        target = np.take_along_axis(rest, kept_BN[..., None], axis=1) - code
        z = module.apply({"params": params}, out.last_hidden, code, method="residual_condition")
        repeats = (case.transformer_config.diffusion.batch_mul, 1)
        loss = diffusion_loss(
            _network(checks),
            np.tile(target.reshape(-1, target.shape[-1]), repeats),
            jnp.tile(z.reshape(-1, z.shape[-1]), repeats),
            checks.given("train.t"),
            checks.given("train.noise"),
        )
        checks.close("train.diffusion_loss", loss.loss.mean())


def generation(checks: Checks) -> None:
    case = checks.case
    config = case.transformer_config
    text, mask = checks.given("ctx.embeddings"), checks.given("ctx.mask")
    settings = SampleConfig(cfg=float(checks.given("gen.cfg", lambda: SampleConfig().cfg)), top_k=0, top_k_late=0)
    modules = Hart(config), Tokenizer(case.tokenizer_config)
    sample = jax.jit(lambda params, text, mask, noise: generate(*modules, params, (text, mask), noise, settings))
    token_noise, start = _token_noise(checks, len(text)), _start_noise(checks, len(text))
    out = each_sample(
        lambda text, mask, start, *tokens: sample(case.params, text, mask, GivenNoise(tokens, start)),
        text,
        mask,
        start,
        *token_noise,
    )
    for scale in range(len(config.patch_nums)):
        checks.equal(f"gen.idx.{scale}", out.indices[scale])
        checks.close(f"gen.logits.{scale}", out.logits[scale])
    checks.close("gen.f_hat", nchw(out.f_hat), sampled=True)
    checks.close("gen.image", nchw((out.image + 1) / 2), sampled=True)


def _token_noise(checks: Checks, batch: int) -> list[np.ndarray]:
    config, seed = checks.case.transformer_config, checks.case.seed

    def formula(name: str, side: int) -> np.ndarray:
        return (generator(seed, name).gumbel(size=(batch, side * side, config.vocab_size)) * 8.0).astype(np.float16)

    names = {f"gen.token_noise.{scale}": side for scale, side in enumerate(config.patch_nums)}
    return [checks.given(name, lambda name=name, side=side: formula(name, side)) for name, side in names.items()]


def _start_noise(checks: Checks, batch: int) -> np.ndarray:
    name, config = "gen.init_noise", checks.case.transformer_config
    positions = config.patch_nums[-1] ** 2

    def formula() -> np.ndarray:
        noise = generator(checks.case.seed, name).standard_normal(
            (batch * positions, config.latent_channels), np.float32
        )
        return noise.reshape(batch, positions, config.latent_channels)

    return checks.given(name, formula)
