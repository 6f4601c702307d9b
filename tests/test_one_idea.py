"""One idea, one object: each changes HART in at most 30 lines without an edit of the package, trains and samples."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.config import HartExperiment, MeshConfig, SampleConfig
from hart_jax.diffusion.schedule import RESIDUAL_SCALE, TRAIN_STEPS, Diffusion, DiffusionLoss
from hart_jax.errors import UserError
from hart_jax.nn.guidance import guide
from hart_jax.parallel.mesh import MeshLayout, make_mesh
from hart_jax.parallel.rules import RULES
from hart_jax.sampling.layerwise import make_layered_sampler, split_layers
from hart_jax.sampling.noise import GivenNoise
from hart_jax.sampling.pipeline import Pipeline
from hart_jax.sampling.rules import HART_RULES, Rules, growing_guidance, iteration_sizes
from hart_jax.sampling.sampler import generate, make_sampler
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.resize import area
from hart_jax.training.hart_functions import hart_functions
from hart_jax.training.hart_step import token_losses
from hart_jax.transformer.attention import attention
from hart_jax.transformer.attention_weights import attention_weights
from hart_jax.transformer.mask import DenseMask, Mask, ScaleCausal
from hart_jax.transformer.model import Hart
from tests.tiny import PATCH_NUMS, TOKENIZER, experiment_values, tiny_model

MODEL = tiny_model()
NETWORK = Tokenizer(TOKENIZER)
PARAMS = {"transformer": MODEL.transformer, "tokenizer": MODEL.tokenizer}
TEXT = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
CONDITION = TEXT, np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.int32)
SETTINGS = SampleConfig(cfg=0.0, top_k=0, top_k_late=0)


# The ideas.


@dataclasses.dataclass(frozen=True)
class Markov(Mask):
    """A scale sees the context and itself (HMAR, arXiv 2506.04421)."""

    def seen(self, context_tokens, scale_sizes):
        scale_Q = np.repeat(np.arange(1 + len(scale_sizes)), (context_tokens, *scale_sizes))
        return (scale_Q == 0) | (scale_Q == scale_Q[:, None])


def constant_guidance(settings, scale, scales):
    """The same guidance at all scales."""
    return settings.cfg


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """The head learns the velocity from noise (time 1) to the residual (time 0), and follows it (arXiv 2210.02747)."""

    def loss(self, network, target_NC, z_NW, t_N, noise_NC):
        x0, time_N1 = target_NC / RESIDUAL_SCALE, (t_N[:, None] + 0.5) / TRAIN_STEPS
        velocity, _ = jnp.split(network((1 - time_N1) * x0 + time_N1 * noise_NC, t_N, z_NW), 2, axis=-1)
        mse_N = jnp.mean((velocity - (noise_NC - x0)) ** 2, axis=-1)
        return DiffusionLoss(mse_N, mse_N, jnp.zeros_like(mse_N))

    def sample(self, network, z_MW, init_noise_NC, step_noise_SMC, cfg, steps):
        def step(x_NC, time):
            t = jnp.round(time * TRAIN_STEPS - 0.5).astype(jnp.int32)[None]
            velocity, _ = jnp.split(network(jnp.tile(x_NC, (2, 1)), t, z_MW), 2, axis=-1)
            cond, uncond = jnp.split(velocity, 2)
            return x_NC - guide(cond, uncond, cfg) / steps, None

        times = 1 - (jnp.arange(steps) + 0.5) / steps
        x_NC, _ = jax.lax.scan(step, init_noise_NC, times)
        return jnp.tile(x_NC, (2, 1)) * RESIDUAL_SCALE


def iterations_everywhere(settings, scale, scales):
    """Every scale but the first is filled in up to three steps (HMAR)."""
    return 3 if scale else 1


def later_scales_count_more(logits_BLV, targets):
    """A token of scale s weighs s + 1."""
    _, metrics = token_losses(logits_BLV, targets)
    weights = [(scale + 1) * target_Bl.shape[1] for scale, target_Bl in enumerate(targets)]
    losses = [metrics[f"loss_scale_{scale}"] for scale in range(len(targets))]
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights), metrics


IDEAS = {
    "mask": {"mask": Markov()},
    "guidance": {"rules": Rules(guidance=constant_guidance, negative=(TEXT[:1], np.ones((1, 4), np.int32)))},
    "objective": {"objective": FlowMatching()},
    "iterations": {"rules": Rules(iterations=iterations_everywhere)},
    "loss": {"token_loss": later_scales_count_more},
}


@pytest.mark.parametrize(
    "idea", [Markov, constant_guidance, FlowMatching, iterations_everywhere, later_scales_count_more]
)
def test_an_idea_is_short(idea):
    assert len(inspect.getsource(idea).splitlines()) <= 30


# They train and sample.


def experiment() -> HartExperiment:
    values = experiment_values()
    values["optimizer"] = {"learning_rate": 3e-3, "warmup_steps": 1, "schedule": "constant"}
    return HartExperiment.from_dict(values)


QUICK = ("mask", "objective")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in IDEAS]
)
def test_it_trains_and_samples(name):
    where = MeshLayout(make_mesh(MeshConfig(), 0, jax.devices()[:1]), RULES)
    program = hart_functions(experiment(), where, **IDEAS[name])
    images = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3)).astype(np.uint8)
    batch = images, (np.tile(TEXT, (4, 1, 1)), np.tile(CONDITION[1], (4, 1)))
    tokenizer = jax.device_put(MODEL.tokenizer, where.replicated)
    state, losses = program.from_params(jax.device_put(MODEL.transformer, where.replicated)), []
    for _ in range(12):
        state, metrics = program.step(state, tokenizer, *batch, jax.random.key(0), 8)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0], losses
    # The loop's own sampler: what is drawn on the way.
    params = {"transformer": state.params, "tokenizer": tokenizer}
    image = program.grid(params, CONDITION, 0, jnp.arange(2), 2)
    assert image.shape == (2, 8, 8, 3) and np.isfinite(np.asarray(image)).all()


# And they compute what they say.


@functools.cache
def generated(mask=ScaleCausal(), rules=HART_RULES, cfg=0.0):  # noqa: B008
    hart, settings = Hart(MODEL.transformer_config, mask=mask), dataclasses.replace(SETTINGS, cfg=cfg)
    run = jax.jit(lambda params, condition, noise: generate(hart, NETWORK, params, condition, noise, settings, rules))
    return jax.device_get(run(PARAMS, CONDITION, given_noise()))


def given_noise() -> GivenNoise:
    random = np.random.default_rng(1)
    tokens = tuple(random.gumbel(size=(2, side * side, 16)).astype(np.float32) for side in PATCH_NUMS)
    return GivenNoise(tokens, random.normal(size=(2, 16, 4)).astype(np.float32))


def taught(out, mask) -> np.ndarray:
    """Logits (B, 1 + 4 + 16, V) of the tokens of a generation as training computes them, all at once."""
    tokenize = functools.partial(NETWORK.apply, {"params": MODEL.tokenizer})
    f_hat, inputs = jnp.zeros((2, 4, 4, 4)), []
    for scale, side in enumerate(PATCH_NUMS[1:]):
        code = tokenize(out.indices[scale], method="lookup")
        f_hat += tokenize(code, scale, method="contribution")
        inputs.append(area(f_hat, (side, side)).reshape(2, side * side, 4))
    hart = Hart(MODEL.transformer_config, mask=mask)
    kept = np.tile(np.arange(16), (2, 1))
    variables = {"params": MODEL.transformer}
    return hart.apply(variables, CONDITION, jnp.concatenate(inputs, axis=1), kept).logits


def differences(a, b) -> list[float]:
    """Largest difference of the logits of each scale."""
    return [float(np.abs(x - y).max()) for x, y in zip(a.logits, b.logits, strict=True)]


@pytest.mark.parametrize("mask", [ScaleCausal(), Markov()])
def test_a_mask_is_the_same_in_training_and_sampling(mask):
    out = generated(mask)
    np.testing.assert_allclose(np.concatenate(out.logits, axis=1), taught(out, mask), atol=2e-4)


def test_markov_scales_do_not_see_those_before():
    # From the second scale on, the one before is out of sight; the first sees the context alone with either mask.
    first, second, third = differences(generated(), generated(Markov()))
    assert first < 1e-5 and second < 1e-5 and third > 1e-3
    hart = Hart(MODEL.transformer_config, mask=Markov())
    latent = np.random.default_rng(2).normal(size=(2, 20, 4)).astype(np.float32)
    weights = attention_weights(hart, MODEL.transformer, CONDITION, latent)
    seen = np.asarray(weights).max(axis=(0, 1, 2)) > 0
    np.testing.assert_array_equal(seen, Markov().seen(4, (4, 16)))


def test_a_dense_mask_is_the_pattern_that_ends_describe():
    class Dense(ScaleCausal):
        of_all, of_last = Mask.of_all, Mask.of_last

    out, dense = generated(), Dense()
    np.testing.assert_allclose(taught(out, dense), taught(out, ScaleCausal()), atol=1e-5)
    assert dense.of_last(4, (4, 9), 9) is None
    pattern = dense.of_all(4, (4, 9))
    np.testing.assert_array_equal(pattern.seen_QM, ScaleCausal().seen(4, (4, 9)))
    assert pattern == DenseMask.of(pattern.seen_QM) and hash(pattern) == hash(DenseMask.of(pattern.seen_QM))


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (np.ones((3, 3), bool), r"must give booleans \(9, 9\)"),
        (np.ones((9, 9)), "must give booleans"),
        (np.ones((9, 9), bool), "sees a later scale"),
        (np.zeros((9, 9), bool), "sees nothing"),
    ],
)
def test_a_mask_that_cannot_be_is_an_error(seen, message):
    class Wrong(Mask):
        def seen(self, context_tokens, scale_sizes):
            return seen

    with pytest.raises(ValueError, match=message):
        Wrong().of_all(4, (1, 4))


def test_kernels_take_no_dense_mask():
    q = jnp.zeros((1, 5, 2, 8))
    with pytest.raises(UserError, match="attention=splash: takes no dense mask; set attention=xla"):
        attention(q, q, q, kv_end=Markov().of_all(1, (4,)), scale=1.0, implementation="splash")


def test_guidance_is_as_given():
    # The first scale's logits depend on nothing drawn: they are (1 + t) cond - t uncond.
    def first(rules, cfg):
        return generated(rules=rules, cfg=cfg).logits[0]

    constant = Rules(guidance=constant_guidance)
    unguided, guided = first(HART_RULES, 0.0), first(constant, 1.0)
    np.testing.assert_array_equal(first(HART_RULES, 3.0), unguided)  # HART's guidance begins with none.
    uncond = 2 * unguided - guided
    np.testing.assert_allclose(first(constant, 3.0), 4 * unguided - 3 * uncond, atol=1e-4)
    assert np.abs(guided - unguided).max() > 1e-3
    assert [growing_guidance(SampleConfig(cfg=4.0), scale, 5) for scale in range(5)] == [0, 1, 2, 3, 3]


def test_a_negative_condition_stands_for_nothing():
    nothing = np.zeros((1, 4, 8), np.float32), np.array([[1, 0, 0, 0]], np.int32)
    empty = generated(rules=NegativeOf(nothing), cfg=2.0)
    assert max(differences(generated(cfg=2.0), empty)) < 2e-4
    # Guided away from itself, the first sample is as it is without guidance.
    itself = generated(rules=NegativeOf((TEXT[:1], CONDITION[1][:1])), cfg=2.0)
    plain = generated()
    assert max(np.abs(a[0] - b[0]).max() for a, b in zip(itself.logits, plain.logits, strict=True)) < 2e-4
    assert max(differences(itself, generated(cfg=2.0))) > 1e-3


class NegativeOf(Rules):
    """Compared by identity, so that results can be kept."""

    def __init__(self, negative):
        super().__init__(negative=negative)

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_flow_matching_finds_what_the_velocity_leads_to():
    random = np.random.default_rng(3)
    target, noise = random.normal(size=(2, 6, 4)).astype(np.float32)

    def network(x_MC, t, z_MW):
        # The true velocity of a path that ends in the target: (x - x0) / time.
        x0 = jnp.tile(target / RESIDUAL_SCALE, (len(x_MC) // 6, 1))
        velocity = (x_MC - x0) / ((t[:, None] + 0.5) / TRAIN_STEPS)
        return jnp.concatenate([velocity, velocity], axis=-1)

    loss = FlowMatching().loss(network, target, None, np.array([10, 200, 400, 600, 800, 999]), noise)
    np.testing.assert_allclose(loss.loss, 0, atol=1e-6)
    far = FlowMatching().sample(network, None, noise, None, 0.0, 1)[:6]
    near = FlowMatching().sample(network, None, noise, None, 0.0, 100)[:6]
    # The path is straight, so that a step over half of it goes on too far; many steps end where it does.
    np.testing.assert_allclose(near, target, atol=0.02)
    assert np.abs(far - target).max() > 0.1


def test_iterations_at_every_scale_are_those_that_a_mask_describes():
    class Iterated(Mask):
        """Given noise orders positions as they lie, and the end of the order is filled first."""

        def seen(self, context_tokens, scale_sizes):
            step_Q = [np.zeros(context_tokens, int)]
            for size in scale_sizes:
                steps = np.repeat(np.arange(3), iteration_sizes(size, 3))[::-1]
                step_Q.append(steps + step_Q[-1].max() + 1)
            step_Q = np.concatenate(step_Q)
            return step_Q <= step_Q[:, None]

    out = generated(rules=Rules(iterations=iterations_everywhere))
    np.testing.assert_allclose(np.concatenate(out.logits, axis=1), taught(out, Iterated()), atol=2e-4)
    first, second, third = differences(out, generated())
    assert first == 0 and second > 1e-3 and third > 1e-3
    with pytest.raises(ValueError, match=r"rules.iterations gives 2 for a scale of 1 x 1 positions"):
        make_sampler(Hart(MODEL.transformer_config), NETWORK, SETTINGS, rules=Rules(iterations=lambda *_: 2))


LABELS = tiny_model(num_classes=3, context_tokens=1)


@pytest.mark.parametrize(
    ("rules", "model", "message"),
    [
        (Rules(guidance=lambda *_: float("nan")), MODEL, "rules.guidance gives nan for scale 0: give a finite number"),
        (Rules(guidance=lambda *_: "3"), MODEL, "rules.guidance gives '3' for scale 0"),
        (Rules(guidance=lambda *_: np.ones(2)), MODEL, "rules.guidance gives array"),
        (Rules(guidance=lambda *_: None), MODEL, "rules.guidance gives None"),
        (Rules(iterations=lambda *_: 1.0), MODEL, "rules.iterations gives 1.0 for scale 0: give a whole number"),
        (Rules(iterations=lambda *_: None), MODEL, "rules.iterations gives None for scale 0"),
        (Rules(negative="blurry"), MODEL, r"rules.negative has the shapes \[\(\)\]: .* text states \(1, 4, 8\)"),
        (Rules(negative=(TEXT, CONDITION[1])), MODEL, r"rules.negative has the shapes \[\(2, 4, 8\), \(2, 4\)\]"),
        (Rules(negative=2), LABELS, r"rules.negative=2: of this model it is a label, an array \(1,\) of 0 to 2"),
        (Rules(negative=np.array([99])), LABELS, "rules.negative=array"),
        (Rules(negative=(TEXT[:1], CONDITION[1][:1])), LABELS, "rules.negative="),
    ],
)
def test_rules_that_cannot_be_are_an_error(rules, model, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(Hart(model.transformer_config), NETWORK, SETTINGS, rules=rules)


@pytest.mark.slow
def test_layer_by_layer_all_ideas_draw_the_same():
    rules = Rules(constant_guidance, iterations_everywhere, IDEAS["guidance"]["rules"].negative)
    parts = Hart(MODEL.transformer_config, mask=Markov(), objective=FlowMatching()), NETWORK, SETTINGS
    wanted = CONDITION, 0, jnp.array([0, 3])
    image, tokens = make_sampler(*parts, rules=rules)(PARAMS, *wanted)
    again, tokens_again = make_layered_sampler(*parts, rules=rules)(split_layers(PARAMS), *wanted)
    for a, b in zip(tokens, tokens_again, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(again, image, atol=1e-4)


def test_a_pipeline_takes_them():
    model = tiny_model(num_classes=3, context_tokens=1)
    settings = SampleConfig(top_k=8, top_k_late=8)
    plain = Pipeline(model, settings, rules=Rules(), mask=ScaleCausal(), objective=Diffusion())([0, 1])
    rules = Rules(guidance=constant_guidance, negative=np.array([2]))
    other = Pipeline(model, settings, rules=rules, mask=Markov(), objective=FlowMatching())([0, 1])
    assert other.shape == plain.shape and np.abs(plain.astype(int) - other).max() > 0


def test_the_loss_weighs_scales():
    random = np.random.default_rng(4)
    logits = random.normal(size=(2, 5, 16)).astype(np.float32)
    targets = [np.zeros((2, 1), np.int32), np.ones((2, 4), np.int32)]
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss, _ = later_scales_count_more(logits, targets)
    expected = -(log_softmax[:, 0, 0].sum() + 2 * log_softmax[:, 1:, 1].sum()) / (2 * (1 + 2 * 4))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
