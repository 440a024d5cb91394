"""Lightning callbacks: each needs torch, lightning and the torch-only null-space core."""
