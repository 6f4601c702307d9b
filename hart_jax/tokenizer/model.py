"""The hybrid tokenizer: image <-> multi-scale tokens and a continuous residual (SPEC.md section 1)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from hart_jax.config import TokenizerConfig
from hart_jax.tokenizer.autoencoder import Decoder, Encoder, conv
from hart_jax.tokenizer.quantizer import Quantized, Quantizer, TokenCorruption, Tokens


class Tokenizer(nn.Module):
    """Images are (B, H, W, 3) in [-1, 1], latents (B, h, w, C) with h = H / 2**(levels - 1).

    `dtype` is the compute type of encoder and decoder; the quantizer always works in float32.
    """

    config: TokenizerConfig
    dtype: jnp.dtype | None = None

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant_conv = conv(self.config.latent_channels, name="quant_conv", dtype=self.dtype)
        self.post_quant_conv = conv(self.config.latent_channels, name="post_quant_conv", dtype=self.dtype)
        self.quantizer = Quantizer(self.config)

    def encode(self, image_BHWC: jax.Array) -> jax.Array:
        """The latent f."""
        return self.quant_conv(self.encoder(image_BHWC)).astype(jnp.float32)

    def decode(self, latent_BhwC: jax.Array) -> jax.Array:
        """The image of a latent, not clipped."""
        return self.decoder(self.post_quant_conv(latent_BhwC)).astype(jnp.float32)

    def quantize(self, latent_BhwC: jax.Array) -> Quantized:
        return self.quantizer.quantize(latent_BhwC)

    def tokens(self, image_BHWC: jax.Array) -> Tokens:
        """What the transformer is trained on, from images."""
        return self.quantizer.tokens(self.encode(image_BHWC))

    def latent(self, tokens: Tokens) -> jax.Array:
        """The latent that tokens are of; see `Quantizer.latent`."""
        return self.quantizer.latent(tokens)

    def latent_tokens(self, latent_BhwC: jax.Array) -> Tokens:
        """As `tokens`, of a latent."""
        return self.quantizer.tokens(latent_BhwC)

    def corrupt(self, tokens: Tokens, corruption: TokenCorruption) -> Tokens:
        """See `Quantizer.corrupt`."""
        return self.quantizer.corrupt(tokens, corruption)

    def decode_indices(self, indices: Sequence[jax.Array], sampled: bool = False) -> jax.Array:
        """The latent f_hat of one (B, p*q) index array per scale; see `Quantizer.decode_indices`."""
        return self.quantizer.decode_indices(indices, sampled)

    def lookup(self, indices_BL: jax.Array) -> jax.Array:
        return self.quantizer.lookup(indices_BL)

    def contribution(self, code_BPC: jax.Array, scale: int) -> jax.Array:
        return self.quantizer.contribution(code_BPC, scale)

    def reconstruct(self, image_BHWC: jax.Array, *, continuous: bool) -> jax.Array:
        """The image after the tokenizer, with or without the continuous residual, clipped to [-1, 1]."""
        quantized = self.quantize(self.encode(image_BHWC))
        latent = quantized.f_hat_BhwC + (quantized.residual_BhwC if continuous else 0.0)
        return jnp.clip(self.decode(latent), -1.0, 1.0)

    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        """Touches every parameter; used for initialisation."""
        return self.reconstruct(image_BHWC, continuous=False)
