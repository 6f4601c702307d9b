"""Work counted from a program's text: loops, fusions, asynchronous pairs, groups of devices in every notation."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from hart_jax.planning.hlo import count_work, kernels_of

MESH = {"data": 2, "fsdp": 4}
COLLECTIVES = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %gathered = bf16[16,4]{1,0} all-gather(%x), channel_id=1, GROUPS, dimensions={0}
  ROOT %out = (s32[], f32[8,4]) tuple(%i, %x)
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %n = s32[] constant(24)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p0: f32[8,4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %loop = (s32[], f32[8,4]) while(%t), condition=%condition, body=%body
  %start = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%p0), channel_id=2, replica_groups={{0,4},{1,5}}
  %done = f32[16,4]{1,0} all-gather-done(%start)
  %both = (f32[8]{0}, f32[]) all-reduce(%a, %b), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
  %again = f32[8]{0} all-reduce(%a), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
  %part = f32[2]{0} reduce-scatter(%a), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add
  %moved = f32[6]{0} collective-permute(%a), channel_id=5, source_target_pairs={{0,0},{1,5}}
  ROOT %r = f32[8,4]{1,0} copy(%p0)
}
"""


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,1,2,3},{4,5,6,7}}",
        "replica_groups=[2,4]<=[8]",
        "replica_groups=mesh['a'=2,'b'=4] {'b'}",
        "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b','c'}",
    ],
)
def test_every_collective_sends_over_its_axes_as_often_as_it_runs(groups):
    work = count_work(COLLECTIVES.replace("GROUPS", groups), MESH, island=4)
    assert {str(kind): sent for kind, sent in work.collective_bytes.items()} == {
        "all-gather over fsdp": 24 * 16 * 4 * 2 * 3 / 4,
        "all-gather over data": 16 * 4 * 4 / 2,
        # Two parts of one channel are one collective.
        "all-reduce over data+fsdp": 2 * 9 * 4 * 7 / 8,
        "reduce-scatter over fsdp": 2 * 4 * 3,
        "collective-permute over data": 6 * 4,
    }
    leaving = {str(kind) for kind in work.collective_bytes if kind.slow}
    assert leaving == {"all-gather over data", "all-reduce over data+fsdp", "collective-permute over data"}


def test_a_transposed_iota_groups_over_the_outer_axis():
    text = COLLECTIVES.replace("GROUPS", "replica_groups=[4,2]<=[2,4]T(1,0)")
    sent = {str(kind): sent for kind, sent in count_work(text, MESH).collective_bytes.items()}
    assert sent["all-gather over data"] == 24 * 16 * 4 * 2 / 2 + 16 * 4 * 4 / 2


SLICES = """HloModule step, is_scheduled=true

%gathering (a: f32[8]) -> f32[16] {
  %a = f32[8]{0} parameter(0)
  %product = f32[8]{0} dot(%a, %a), lhs_contracting_dims={}, rhs_contracting_dims={}
  ROOT %fused = f32[16]{0} all-gather(%a), channel_id=7, replica_groups={{0,1},{2,3}}, dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %after = token[] after-all()
  %send = (f32[64]{0}, u32[], token[]) send(%p, %after), channel_id=2, is_host_transfer=true, TRANSFER
  %sent = token[] send-done(%send), channel_id=2
  %recv = (f32[64]{0}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, TRANSFER
  WORK
  %received = (f32[64]{0}, token[]) recv-done(%recv), channel_id=1
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), channel_id=3, replica_groups={{0,2},{1,3}}
  %done = f32[32]{0} all-gather-done(%start)
  %both = f32[16]{0} fusion(%p), kind=kOutput, calls=%gathering
  ROOT %r = f32[8]{0} copy(%p)
}
"""


@pytest.mark.parametrize("beside", [True, False])
def test_what_slices_send_each_other_and_what_goes_on_beside_it(beside):
    """Two slices of four devices, mesh (data 4, fsdp 2): the program's text is of one slice's devices."""
    work = "%work = f32[8]{0} fusion(%p), kind=kLoop, calls=%gone" if beside else ""
    transfer = '_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"'
    text = SLICES.replace("WORK", work).replace("TRANSFER", f"frontend_attributes={{{transfer}}}")
    sent = count_work(text, {"data": 4, "fsdp": 2}, island=4).collective_bytes
    found = {(str(kind), kind.slow, kind.overlaps): size for kind, size in sent.items()}
    assert found == {
        # Each half of the devices sends its sum once and the other's once.
        ("all-reduce over data", True, beside): 2 * 64 * 4 / 2,
        # Nothing stands between its start and its end.
        ("all-gather over data", False, False): 32 * 4 / 2,
        # In one kernel with a product.
        ("all-gather over fsdp", False, True): 16 * 4 / 2,
    }


FUSED = """HloModule step

%sliced (a: f32[10,64], i: s32[]) -> f32[64] {
  %a = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,64]{1,0} dynamic-slice(%a, %i), dynamic_slice_sizes={1,64}
  ROOT %out = f32[64]{0} bitcast(%row)
}

%updated (a: f32[10,64], b: f32[64], i: s32[]) -> f32[10,64] {
  %a = f32[10,64]{1,0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %i = s32[] parameter(2)
  %row = f32[1,64]{1,0} bitcast(%b)
  ROOT %out = f32[10,64]{1,0} dynamic-update-slice(%a, %row, %i)
}

ENTRY %main (a: f32[10,64], i: s32[]) -> f32[10,64] {
  %a = f32[10,64]{1,0} parameter(0)
  %i = s32[]{:S(2)} parameter(1)
  %row = f32[64]{0} fusion(%a, %i), kind=kLoop, calls=%sliced
  %near = f32[64]{0:T(128)S(1)} negate(%row)
  ROOT %out = f32[10,64]{1,0} fusion(%a, %near, %i), kind=kLoop, calls=%updated
}
"""


def test_slices_and_updates_in_place_move_only_their_part_and_on_chip_memory_is_free():
    # The row is read and written, read by `negate`, written into the result.
    assert count_work(FUSED, MESH).bytes == 4 * 64 * 4


def test_a_program_without_any_work():
    work = count_work("ENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %p = f32[2]{0} parameter(0)\n}\n", MESH)
    assert (work.flops, work.bytes, work.collective_bytes) == (0, 0, {})


def compiled(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_work(jax.jit(function).lower(*arrays).compile().as_text(), {"data": 1})


def test_products_in_loops_of_loops():
    def inner(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

    work = compiled(lambda x, weights: lax.scan(inner, x, weights)[0], (2, 64), (5, 64, 64))
    assert work.flops == 5 * 3 * 2 * 2 * 64 * 64
    # Each product reads its weights; they are sliced out of all five, at most once for every outer round.
    assert 5 * 3 <= work.bytes / (64 * 64 * 4) < 5 * (3 + 3)


@pytest.mark.parametrize("strides", [1, 2])
def test_convolutions_count_no_padding(strides):
    def convolve(image, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(image, kernel, (strides, strides), "SAME", dimension_numbers=layout)

    out = 8 // strides
    inside = sum(0 <= o * strides + k - (strides == 1) < 8 for o in range(out) for k in range(3))
    assert compiled(convolve, (2, 8, 8, 16), (3, 3, 16, 32)).flops == 2 * 2 * 16 * 32 * inside**2


def test_kernels_are_what_moves_memory():
    def layer(x, w):
        return jnp.tanh(x @ w), None

    arrays = jnp.zeros((2, 64)), jnp.zeros((5, 64, 64))
    text = jax.jit(lambda x, weights: lax.scan(layer, x, weights)[0]).lower(*arrays).compile().as_text()
    kernels = kernels_of(text)
    assert sum(kernel.runs * kernel.bytes for kernel in kernels) == count_work(text, {"data": 1}).bytes
    [product] = [kernel for kernel in kernels if kernel.products]
    assert product.runs == 5 and any("dot_general" in name for name in product.traced)
    assert any("tanh" in " ".join(kernel.traced) for kernel in kernels)


def test_flops_of_batched_products():
    assert compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 4, 5), (3, 5, 6)).flops == 2 * 3 * 4 * 5 * 6


def test_elementwise_work_reads_and_writes_once():
    assert compiled(lambda a: jnp.sin(a) + 1, (100,)).bytes == 800


def test_a_kernel_counts_what_it_says():
    kernel = (
        '%kernel = f32[8,4]{1,0} custom-call(%p0), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"512","bytes_accessed":"9"}}}'
    )
    text = f"ENTRY %main (p0: f32[8,4]) -> f32[8,4] {{\n  %p0 = f32[8,4]{{1,0}} parameter(0)\n  ROOT {kernel}\n}}\n"
    work = count_work(text, MESH)
    assert (work.flops, work.bytes) == (512, 2 * 8 * 4 * 4)
