"""Every whole program that a user can start is lowered for TPUs and GPUs, over meshes that are not here.

Nothing is compiled and no plug-in is needed: a mesh of abstract devices says what is traced for. What a compiler of
kernels refuses, as a kernel that is not split over the devices, it refuses here as on a pod.
"""

import ast
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src import sharding_impls

import hart_jax
from hart_jax.config import SampleConfig
from hart_jax.parallel.program import Program
from hart_jax.sampling.sampler import make_sampler
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.transformer.model import Hart
from tests.programs import (
    DEVICES,
    MESHES,
    PLAIN,
    PROGRAMS,
    SAMPLE,
    TOKENIZER,
    TRANSFORMER,
    Call,
    layout_on,
    sample_grid,
)

# Lowered by none of tests/programs.py, each for a reason.
ELSEWHERE = {"sampler, layer by layer": "is for CPUs alone, where tests/sampling/test_sampler.py runs it"}
# Files that may compile without a `Program`.
MAY_JIT = {
    "hart_jax/parallel/program.py": "is where programs are compiled",
    "hart_jax/planning/plan.py": "compiles what it reports on",
    "hart_jax/checkpoints/digests.py": "adds up bits of an array, part by part",
    "pallas_kernels/attention/conformance.py": "holds kernels against their reference",
    "pallas_kernels/attention/counted.py": "names parts of programs",
    "pallas_kernels/attention/tune.py": "measures kernels",
}


def cases() -> Iterator[Any]:
    """Each way on every mesh of each platform in bfloat16; in float32, which differs in precision, on one mesh."""
    for platform in DEVICES:
        for name, ways in (PROGRAMS | PLAIN).items():
            for number, way in enumerate(ways):
                layouts = [("8 devices", "float32")]
                if name in PROGRAMS:
                    # The many ways of one program take turns on the meshes.
                    turns = [*MESHES] if len(ways) == 1 else ["8 devices", [*MESHES][2 * (number % 2)]]
                    layouts = [(mesh, "bfloat16") for mesh in turns] + layouts[: number == 0]
                for mesh, dtype in layouts:
                    # Quickly, each on one mesh.
                    # float32 takes no kernel: what is lowered for one platform is what is for the other.
                    often = mesh == "8 devices" and (platform, dtype) != ("cuda", "float32")
                    marks = [] if often else [pytest.mark.slow]
                    yield pytest.param(
                        name, way, platform, mesh, dtype, id=f"{name} {number}-{platform}-{mesh}-{dtype}", marks=marks
                    )


@pytest.fixture(autouse=True)
def cudnn_is_there(monkeypatch):
    """cuDNN's version and the GPU's kind are asked for while tracing; elsewhere is neither."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_compute_capability", lambda *_: True)
    # It wants devices to be split over, but a model splits it by itself.
    monkeypatch.setattr("jax._src.dispatch.prim_requires_devices_during_lowering", set())


# What "auto" takes in bfloat16 for the programs that sample or train, by the name of its call.
KERNELS = {"tpu": "tpu_custom_call", "cuda": "__cudnn$fmha"}


@pytest.mark.parametrize(("name", "way", "platform", "mesh", "dtype"), list(cases()))
def test_a_program_is_lowered(name, way, platform, mesh, dtype, monkeypatch):
    if mesh == "1 device":
        # cuDNN's call asks which devices it is split over, of an abstract one too.
        here = types.SimpleNamespace(SPMDAxisContext=sharding_impls.SPMDAxisContext, ShardingContext=())
        monkeypatch.setattr("jax._src.custom_partitioning.sharding_impls", here)
    call = way(layout_on(platform, MESHES[mesh]), dtype)
    assert call.program.name == name
    text = call.lowered(platform)
    with_kernel = dtype == "bfloat16" and name in ("transformer step", "sample grid", "sampler")
    assert (KERNELS[platform] in text) == with_kernel
    if dtype == "float32":
        # The first parameters are drawn or given, not multiplied.
        without = name in ("transformer init", "transformer from params", "tokenizer from params")
        assert set(products_of(text)) == (set() if without else {"HIGHEST"})
    if name == "sample grid":
        # The cache of keys and values lies over batch and heads.
        place = r'<@mesh, \[\{\}, \{"data", "fsdp"\}, \{\}, \{"tensor"\}\]>'
        rows = 2 * layout_on(platform, MESHES[mesh]).batch_shards
        assert re.search(rf"sharding_constraint %\S+ {place} : tensor<2x{rows}x", text)


def products_of(text: str) -> Iterator[str]:
    """The precisions of a lowered program's products and convolutions."""
    for line in text.splitlines():
        if re.search(r"stablehlo\.(dot_general|convolution)", line):
            found = re.search(r"precision(?:_config)? = \[(.*?)\]", line)
            yield from re.findall(r"DEFAULT|HIGHEST|HIGH", found[1]) if found else ("DEFAULT",)


def test_a_bfloat16_program_is_as_it_is_written():
    x = jnp.ones((8, 8))

    def products(x):
        return x @ x, x.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16)

    written = jax.jit(products).lower(x).as_text()
    assert Program("products", products, dtype=jnp.bfloat16).lower(x).as_text() == written
    assert set(products_of(written)) == {"DEFAULT"}
    assert set(products_of(Program("products", products).lower(x).as_text())) == {"HIGHEST"}


def sources() -> dict[str, ast.Module]:
    """The package's and the kernels' files, by their paths."""
    root = Path(hart_jax.__file__).parent.parent
    files = [*(root / "hart_jax").rglob("*.py"), *(root / "pallas_kernels").rglob("*.py"), *root.glob("*.py")]
    return {str(path.relative_to(root)): ast.parse(path.read_text()) for path in files}


def test_every_program_is_in_the_table():
    named, makers = set(), ("Program", "DataParallel")
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in makers:
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    named.add(first.value)
                else:
                    # Where one of these makes another, it passes the name on.
                    assert ast.unparse(first) in ("name", "self.name"), f"{path}:{node.lineno}: give the program's name"
    assert named == set(PROGRAMS) | set(PLAIN) | set(ELSEWHERE)


def test_nothing_is_compiled_but_by_a_program():
    compilers, found = {"jit", "pjit", "pmap"}, set()
    for path, tree in sources().items():
        for node in ast.walk(tree):
            by_attribute = isinstance(node, ast.Attribute) and node.attr in compilers
            by_name = isinstance(node, ast.ImportFrom) and compilers & {alias.name for alias in node.names}
            if by_attribute or by_name:
                found.add(path)
    assert found <= set(MAY_JIT)


def test_outside_the_mesh_a_kernel_is_refused():
    """So that the lowerings above would see it."""
    params, text, _, indices, _ = sample_grid(layout_on("tpu", MESHES["8 devices"]), "bfloat16").arguments
    networks = Hart(TRANSFORMER, jnp.bfloat16), Tokenizer(TOKENIZER, jnp.bfloat16)
    alone = make_sampler(*networks, SampleConfig.from_dict({**SAMPLE, "attention": "splash"}))
    with pytest.raises(NotImplementedError, match="Mosaic kernels cannot be automatically partitioned"):
        Call(alone, (params, text, 0, indices)).lowered("tpu")
