from setuptools import setup

from minirm import TESTED, __version__

setup(
    name="minirm",
    version=__version__,
    description="A reward-model trainer in plain PyTorch, small enough to read in one sitting",
    packages=["minirm", "minirm.data", "minirm.report"],
    py_modules=["train"],
    python_requires=">=3.11",
    install_requires=[*(name + tested for name, tested in TESTED.items()), "datasets>=4", "safetensors", "tqdm"],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist", "ruff==0.17.6", "matplotlib", "zstandard"],
        "plot": ["matplotlib"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "bench": ["trl>=1.0", "peft", "matplotlib"],
    },
)
