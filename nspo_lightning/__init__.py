"""Safety reinforcement learning without the alignment tax (NSPO, arXiv 2512.11391), for PyTorch Lightning."""

__version__ = "0.1.0"
