"""minirm: train a reward model on human preference pairs in plain PyTorch. See README.md."""

__version__ = "0.1.0"
# The ranges that the tests pass with; setup.py installs them, and a start with other versions says so.
TESTED = {"torch": ">=2.11,<2.14", "transformers": ">=5.17,<5.25"}
