"""A plan for people, and which setting to change where it does not fit."""

from hart_jax.config.scales import shape_of
from hart_jax.config.sizes import size_text
from hart_jax.parallel.chips import GiB
from hart_jax.planning.plans import Plan


def table(plan: Plan) -> str:
    """The plan for people."""
    sizes = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    unit = "step" if plan.what == "train" else "batch"
    kind = f"remat {plan.remat}" if plan.what == "train" else "sampling"
    pixels = f", {size_text(shape_of(plan.image_size))} px" if plan.image_size else ""
    lines = [f"{plan.topology}: {plan.chips} chips, mesh {sizes}, global batch {plan.batch_size}, {kind}{pixels}"]
    amount = f"{plan.peak / GiB:.2f}" if plan.peak else "more than there is:"
    lines.append(
        f"memory per chip   {amount} of {plan.memory / GiB:.2f} GiB "
        f"(arguments {plan.arguments / GiB:.2f}, temporaries {_gib(plan.temporaries)}"
        + (f", text encoder {(plan.text_encoder + plan.text_states) / GiB:.2f})" if plan.text_encoder else ")")
    )
    even = plan.flops / plan.chips
    counted = f"{plan.flops / 1e15:.2f} P in all, {(plan.device_flops or even) / 1e12:.2f} T per chip"
    if plan.device_flops is not None and plan.device_flops > 1.1 * even:
        counted += f", {plan.device_flops / even - 1:.0%} more than an even share: chips repeat each other's work"
    lines.append(f"FLOPs per {unit:<7} {counted}")
    if plan.collective_bytes is not None and plan.hbm_bytes is not None:
        sent = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in plan.collective_bytes.items()) or "none"
        lines += [f"memory traffic    {plan.hbm_bytes / 1e9:.1f} GB per chip", f"sent per chip     {sent}"]
        if plan.collective_bytes:
            lines.append(f"of these          {_links(plan)}")
        if plan.text_flops:
            lines.append(
                f"captions          {plan.text_flops / 1e15:.2f} P in all, {plan.text_flops / plan.chips / 1e12:.2f} T "
                f"per chip, temporaries {plan.text_temporaries / GiB:.2f} GiB, at least {plan.text_seconds:.3f} s"
            )
        slow = f", slow links {plan.slow_link_seconds:.3f}" if plan.slow_link_seconds else ""
        captions = f", captions {plan.text_seconds:.3f}" if plan.text_seconds else ""
        training = plan.what == "train"
        lines.append(
            f"{unit + ', at least':<17} {plan.step_seconds:.3f} s: compute {plan.compute_seconds:.3f}, memory "
            f"{plan.memory_seconds:.3f}, links {plan.link_seconds:.3f}{slow}{captions}; "
            + (f"mfu at most {plan.mfu:.0%}, " if training else "")
            + f"hfu at most {plan.hfu:.0%}"
        )
        if training and plan.image_size:
            lines.append(
                f"each host         of {plan.hosts} gives at most {plan.host_images:.0f} images/s, "
                f"{plan.host_bytes / 1e6:.0f} MB/s of pixels: {plan.host_cores:.1f} cores that decode JPEG of 1024 px"
            )
    if plan.programs:
        lines.append(f"a run compiles    {_programs(plan)}")
    lines.append(f"compiled in       {plan.compile_seconds:.0f} s")
    if not plan.fits:
        over = (
            f"by {(plan.peak - plan.memory) / GiB:.2f} GiB per chip" if plan.peak > plan.memory else "for the compiler"
        )
        lines.append(f"TOO BIG {over}: {advice(plan)}")
    return "\n".join(lines)


def _programs(plan: Plan) -> str:
    """How many programs of its step a training compiles."""
    counts = {"buckets": plan.buckets, "lists of scales": plan.lists}
    of = " and ".join(f"{count} {name}" for name, count in counts.items() if count > 1)
    return f"at most {plan.programs} steps{of and f', of {of}'}; this is the largest"


def _links(plan: Plan) -> str:
    """What is sent over the fast and the slow links, and how much of it beside other work."""
    fast = sum((plan.collective_bytes or {}).values()) - plan.slow_collective_bytes
    parts = [
        f"{size / 1e9:.2f} GB over {links} links, {beside / size:.0%} beside other work"
        for links, size, beside in (
            ("fast", fast, plan.overlapped),
            ("slow", plan.slow_collective_bytes, plan.overlapped_slowly),
        )
        if size
    ]
    return "; ".join(parts)


def _gib(size: int) -> str:
    return f"{size / GiB:.2f}" if size else "unknown"


def advice(plan: Plan) -> str:
    """Which setting to change, the cheapest first, for a plan that does not fit."""
    fsdp, tensor = plan.mesh["fsdp"], plan.mesh["tensor"]
    if plan.what == "sample" and plan.arguments + plan.text_encoder > plan.memory / 2:
        return f"most of it is weights; set --config.sample.weights=int8, or split them with mesh.tensor={2 * tensor}"
    if plan.arguments > plan.memory / 2:
        enough = fsdp
        while plan.arguments * fsdp / enough > plan.memory / 2:
            enough *= 2
        if fsdp * plan.mesh["data"] >= enough:
            return f"most of it is weights and their moments; split them further with mesh.fsdp={enough}"
        return f"most of it is weights and their moments; take more chips, with mesh.fsdp={enough}"
    if plan.what == "train" and plan.remat != "full":
        return f"most of it is activations; set train.remat=full (it is {plan.remat})"
    parts = fsdp * plan.mesh["data"]
    each = plan.batch_size // parts
    if each > 1:
        free = plan.memory - plan.arguments - plan.text_encoder - plan.text_states
        share = free / plan.temporaries if plan.temporaries else 0.5
        fewer = max(1, min(each - 1, int(each * share)))
        name = "train.batch_size" if plan.what == "train" else "--batch_size"
        return f"most of it is activations; lower {name} to {fewer * parts} or less, or take more chips"
    return f"a chip holds one image already; split it with mesh.tensor={2 * tensor}"
