"""Other people's code: Stable Diffusion, diffusers, the original FeatInv."""
