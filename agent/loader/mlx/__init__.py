"""The adapter over MLX and mlx-lm; no module outside this package imports either."""
