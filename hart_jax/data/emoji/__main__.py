"""`python -m hart_jax.data.emoji` builds the captioned set: `hart_jax.data.emoji.build`."""

from hart_jax.data.emoji.build import main
from hart_jax.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
