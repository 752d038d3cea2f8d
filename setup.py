"""Build of the distribution ``inform-rm`` (import name ``inform_rm``).

The ranges are narrow on purpose: their lower ends were run together (see ``constraints.txt``), and each of these
libraries has renamed arguments between minor releases. The Hub pair alone also loads under transformers 4.57.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "inform_rm/__init__.py").read_text(encoding="utf-8"), re.M)
if VERSION is None:
    raise SystemExit('inform_rm/__init__.py has no line __version__ = "...".')

setup(
    name="inform-rm",
    version=VERSION.group(1),
    description="InfoRM reward models for the Hugging Face Hub: training, evaluation, overoptimization detection",
    long_description=README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["inform_rm*"]),
    package_data={"inform_rm": ["py.typed", "util/templates/*.j2", "training/accelerate_configs/*.yaml"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.13,<3",
        "transformers>=5.5.4,<6",
        "accelerate>=1.10.1,<2",
        "datasets>=4.0,<6",
        "safetensors>=0.6.2,<1",
        "huggingface-hub>=1.10,<3",
        "tokenizers>=0.22,<1",
        "jinja2>=3.1,<4",
        "numpy>=2.0,<3",
        "pyarrow>=21,<27",
        "matplotlib>=3.9,<4",
        "scikit-learn>=1.5.2,<2",
        "scipy>=1.13.1,<2",
        "PyYAML>=6,<7",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "bf16": ["torch-optimi>=0.3.3,<0.4"],
        "peft": ["peft>=0.18.1,<1"],
        "quant": ["bitsandbytes>=0.50,<1"],
        "rl": ["trl>=1.7,<2"],
        "serve": [
            "fastapi>=0.136.3,<1",
            "prometheus-client>=0.20,<1",
            "pydantic>=2.11,<3",
            "starlette>=0.46,<2",
            "uvicorn>=0.34,<1",
        ],
        "docs": [
            "griffelib>=2.4.1,<3",
            "latex2mathml>=3.81,<4",
            "mkdocs>=1.6.1,<2",
            "mkdocs-material>=9.8.2,<10",
            "mkdocstrings>=1.0.8,<2",
            "mkdocstrings-python>=2.0.11,<3",
        ],
        "dev": [
            "build",
            "httpx",
            "hypothesis",
            "import-linter",
            "markdown-it-py",
            "mutmut",
            "mypy",
            "pytest",
            "pytest-xdist",
            "requests",
            "ruff",
            "schemathesis",
            "setuptools>=77",
            "tensorboard",
            "types-PyYAML",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["inform-rm = inform_rm.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
