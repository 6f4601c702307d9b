"""bfloat16 computes; parameters, gradients, averages, moments, losses, logits, norms and sums are float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import use_abstract_mesh

from hart_jax.config import HartLossConfig, OptimizerConfig, TokenizerLossConfig
from hart_jax.nn.layers import dense
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.training.hart_step import make_hart_step, make_loss
from hart_jax.training.state import make_optimizer, new_state
from hart_jax.training.tokenizer_step import init_tokenizer_state, make_tokenizer_step
from hart_jax.transformer.model import Hart
from tests.tiny import TOKENIZER, mesh_of, tiny_model

LOSS = HartLossConfig(condition_top_k=16, min_kept=6, keep_counts=1)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0), 30)
KEY = jax.random.key(0)
BFLOAT16 = jnp.dtype(jnp.bfloat16)
ADALN = {"none": {}, "own": {"disable_aln": False}, "shared": {"shared_aln": True}}


def batch(size: int = 4):
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (size, 8, 8, 3)).astype(np.uint8)
    text = random.normal(size=(size, 4, 8)).astype(np.float32)
    return images, (text, np.tile(np.array([1, 1, 0, 0], np.int32), (size, 1)))


def types(tree) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def equations(jaxpr):
    """Every equation, those of inner functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def loss_and_gradients(adaln: str, platform: str):
    """Their jaxpr in bfloat16, and their shapes."""
    model = tiny_model(**ADALN[adaln])
    params, tokenizer_params = jax.tree.map(jnp.asarray, (model.transformer, model.tokenizer))
    tokenizer = Tokenizer(TOKENIZER)
    images, condition = batch()
    image = jnp.asarray(images, jnp.float32)
    tokens = jax.eval_shape(lambda x: tokenizer.apply({"params": tokenizer_params}, x, method="tokens"), image)
    compute = make_loss(Hart(model.transformer_config, BFLOAT16), LOSS)
    kept, keys = jnp.zeros((4, 8), jnp.int32), jax.random.split(KEY, 4)
    arguments = (params, tokens, condition, tokenizer_params["quantizer"]["codebook"], kept, keys)
    with use_abstract_mesh(mesh_of(platform)):
        return jax.make_jaxpr(jax.value_and_grad(compute, has_aux=True), return_shape=True)(*arguments)


@pytest.mark.parametrize(("adaln", "platform"), [*((adaln, "tpu") for adaln in ADALN), ("none", "cpu")])
def test_what_is_computed_in_which_precision(adaln, platform):
    jaxpr, ((loss, metrics), gradients) = loss_and_gradients(adaln, platform)
    assert types((loss, metrics, gradients)) == {"float32"}
    narrow, products = set(), set()
    for equation in equations(jaxpr.jaxpr):
        inputs = [variable.aval for variable in equation.invars if hasattr(variable.aval, "dtype")]
        if equation.primitive.name == "dot_general":
            products.add((*(aval.dtype.name for aval in inputs), equation.outvars[0].aval.dtype.name))
        # A sum over axes of size 1 adds nothing.
        elif any(aval.dtype == BFLOAT16 for aval in inputs) and inputs[0].size != equation.outvars[0].aval.size:
            narrow.add(equation.primitive.name)
        if equation.primitive.name in ("exp", "log", "rsqrt", "sqrt"):
            assert all(aval.dtype != BFLOAT16 for aval in inputs), equation
    assert not narrow & {"reduce_sum", "reduce_max", "cumsum", "argmax"}
    # On a CPU all products are summed into float32 arrays, as its matrix unit does it.
    assert (("bfloat16", "bfloat16", "bfloat16") in products) == (platform == "tpu")
    assert ("bfloat16", "bfloat16", "float32") in products


def test_gradients_of_weights_are_summed_in_float32():
    layer = dense(2, (None, None), name="layer", dtype=BFLOAT16)
    # bfloat16 cannot count beyond 256 ones by ones, nor hold 4097.
    rows = jnp.ones((4097, 1))
    params = jax.tree.map(jnp.ones_like, layer.init(KEY, rows))
    assert layer.apply(params, rows).dtype == BFLOAT16
    gradients = jax.grad(lambda params: layer.apply(params, rows).astype(jnp.float32).sum())(params)["params"]
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(jax.tree.leaves(gradients[name])[0], np.full_like(gradients[name].value, 4097))


def test_both_trainings_keep_float32():
    model = tiny_model()
    images, condition = batch()
    step = make_hart_step(
        Hart(model.transformer_config, BFLOAT16), Tokenizer(TOKENIZER, BFLOAT16), OPTIMIZER, LOSS, 0.9
    )
    fresh = jax.eval_shape(lambda: new_state(jax.tree.map(jnp.asarray, model.transformer), OPTIMIZER))
    after = jax.eval_shape(lambda state: step(state, model.tokenizer, images, condition, KEY, 8), fresh)
    tokenizer = Tokenizer(TOKENIZER, BFLOAT16)
    fresh = jax.eval_shape(lambda: init_tokenizer_state(KEY, tokenizer, OPTIMIZER, jnp.zeros((4, 8, 8, 3))))
    step = make_tokenizer_step(tokenizer, OPTIMIZER, TokenizerLossConfig(restart_below=0.1), 0.9)
    tokenizer_after = jax.eval_shape(lambda state: step(state, images, KEY, None, adversarial=False), fresh)
    for state, metrics in (after, tokenizer_after):
        assert types(metrics) == {"float32"}
        assert types(state) == {"float32", "int32"}


@pytest.mark.slow
def test_first_losses_are_near_those_in_float32():
    model = tiny_model()
    images, condition = batch()
    history = {}
    for dtype in (jnp.dtype(jnp.float32), BFLOAT16):
        # The same tokens in both.
        step = make_hart_step(Hart(model.transformer_config, dtype), Tokenizer(TOKENIZER), OPTIMIZER, LOSS, 0.9)
        state = new_state(jax.tree.map(jnp.asarray, model.transformer), OPTIMIZER)
        losses = []
        for _ in range(5):
            state, metrics = step(state, model.tokenizer, images, condition, KEY, 8)
            losses.append([float(metrics[name]) for name in ("loss_token", "loss_diffusion", "param_norm")])
        history[dtype.name] = losses
    assert history["float32"] != history["bfloat16"]
    np.testing.assert_allclose(history["bfloat16"], history["float32"], rtol=0.05)
