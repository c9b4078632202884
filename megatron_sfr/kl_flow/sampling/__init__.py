"""Non-autoregressive generation with a denoiser on the simplex: KL-flow's samplers, their requests and trajectories."""
