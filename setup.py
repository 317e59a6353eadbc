from setuptools import setup

setup(
    name="minirm",
    version="0.1.0",
    description="A reward-model trainer in plain PyTorch, small enough to read in one sitting",
    packages=["minirm", "minirm.data", "minirm.report"],
    py_modules=["train"],
    python_requires=">=3.10",
    # Tested ranges: newer versions may work, but nobody has looked.
    install_requires=["torch>=2.11,<2.14", "transformers>=5.17,<6", "datasets>=4", "safetensors", "tqdm"],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist", "ruff==0.17.6", "matplotlib"],
        "plot": ["matplotlib"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "bench": ["trl>=1.0", "matplotlib"],
    },
)
