"""The rule table: what is split over which axis of the mesh, and what stays whole."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from hart_jax.config import OptimizerConfig
from hart_jax.errors import UserError
from hart_jax.parallel.rules import AXES, RULES, parameter_axes, shardings, with_changes
from hart_jax.training.state import make_optimizer, new_state
from hart_jax.transformer.model import Hart
from tests.tiny import transformer_config

MESH = AbstractMesh((2, 2, 2), AXES)


def initial(optimizer: OptimizerConfig):
    """Abstract boxed parameters and state of a tiny transformer."""
    config = transformer_config(context_tokens=1, num_classes=5, disable_aln=False)
    latent, kept = jnp.zeros((1, config.num_tokens - 1, 4)), jnp.arange(16)[None]

    def params():
        return Hart(config).init(jax.random.key(0), jnp.zeros(1, jnp.int32), latent, kept)["params"]

    boxed = jax.eval_shape(params)
    chain = make_optimizer(optimizer, 10)
    return boxed, jax.eval_shape(lambda: new_state(jax.tree.map(jnp.asarray, nn.unbox(params())), chain))


@pytest.mark.parametrize(
    "optimizer", [OptimizerConfig(), OptimizerConfig(muon_learning_rate=1e-2)], ids=["adamw", "muon"]
)
def test_parameters_averages_and_moments_lie_alike(optimizer):
    boxed, state = initial(optimizer)
    places = shardings(state, parameter_axes(boxed), MESH, RULES)
    expected = {
        ("layers", "attn", "qkv"): P(None, ("fsdp",), None, ("tensor",), None),
        ("layers", "attn", "proj", "kernel"): P(None, ("tensor",), ("fsdp",)),
        ("layers", "mlp", "up", "kernel"): P(None, ("fsdp",), ("tensor",)),
        ("layers", "mlp", "down", "kernel"): P(None, ("tensor",), ("fsdp",)),
        ("head", "kernel"): P(("fsdp",), ("tensor",)),
    }
    found = {path: [] for path in expected}
    for path, place in jax.tree_util.tree_leaves_with_path(places):
        names = tuple(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
        for wanted in expected:
            if names[-len(wanted) :] == wanted:
                found[wanted].append(place.spec)
    for wanted, specs in found.items():
        # The parameter, its average, and one moment (Muon) or two (AdamW).
        moments = 1 if optimizer.muon_learning_rate and wanted[0] == "layers" else 2
        assert specs == [expected[wanted]] * (2 + moments), wanted


def test_what_does_not_divide_and_what_has_no_rule_stay_whole():
    axes = {("a",): ("embed", "mlp"), ("b",): ("embed",), ("c",): ("batch", "embed"), ("d",): ("unheard of",)}
    shapes = {"a": (6, 7), "b": (5,), "c": (4, 4), "d": (8,), "other": (8, 8)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = {name: place.spec for name, place in shardings(tree, axes, MESH, RULES).items()}
    assert specs["a"] == P(("fsdp",), None)
    assert specs["b"] == P(None)
    # `fsdp` splits the batch already.
    assert specs["c"] == P(("data", "fsdp"), None)
    assert specs["d"] == P(None)
    assert specs["other"] == P(None, None)


def test_rules_can_be_changed():
    rules = with_changes(("mlp=fsdp", "batch=data", "vocab="))
    assert (rules["mlp"], rules["batch"], rules["vocab"]) == (("fsdp",), ("data",), ())
    assert rules["embed"] == RULES["embed"]
    assert with_changes(()) == RULES


@pytest.mark.parametrize("change", ["colour=data", "mlp", "mlp=pipeline", "=data"])
def test_unknown_rules(change):
    with pytest.raises(UserError, match=r"mesh\.rules: .*" + change):
        with_changes((change,))
