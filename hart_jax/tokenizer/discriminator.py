"""PatchGAN discriminator of the tokenizer (pix2pix; SPEC.md section 1): 64 filters, 3 layers, BatchNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Discriminator(nn.Module):
    """(B, H, W, 3) in [-1, 1] -> patch logits (B, H/8 - 2, W/8 - 2, 1)."""

    filters: int = 64
    layers: int = 3
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, image_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        def conv(x, features, stride, name, use_bias):
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None, "conv_in", "conv_out"))
            bias = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
            pad = ((1, 1), (1, 1))
            module = nn.Conv(
                features, (4, 4), stride, pad, use_bias=use_bias, kernel_init=init, bias_init=bias, name=name,
                dtype=self.dtype,
            )  # fmt: skip
            return module(x)

        def batch_norm(x, name):
            scale = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
            bias = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            module = nn.BatchNorm(
                use_running_average=not train, momentum=0.9, epsilon=1e-5, scale_init=scale, bias_init=bias, name=name,
                dtype=self.dtype,
            )  # fmt: skip
            return module(x)

        x = nn.leaky_relu(conv(image_BHWC, self.filters, 2, "conv_0", True), 0.2)
        for layer in range(1, self.layers + 1):
            stride = 2 if layer < self.layers else 1
            x = conv(x, self.filters * min(2**layer, 8), stride, f"conv_{layer}", False)
            x = nn.leaky_relu(batch_norm(x, f"norm_{layer}"), 0.2)
        return conv(x, 1, 1, f"conv_{self.layers + 1}", True)
