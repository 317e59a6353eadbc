"""minirm: train a reward model on human preference pairs in plain PyTorch. See README.md."""

__version__ = "0.1.0"
