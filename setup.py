"""Install trsr_dist. The ranges cover the pinned CPU set of constraints.txt and torch 2.11 on CUDA."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

INSTALL = [
    "torch>=2.11",
    "deepspeed>=0.19.8,<0.20",
    "transformers>=5.17,<6",
    "accelerate>=1.10",
    "peft>=0.21,<0.22",
    "safetensors>=0.5",
    "webdataset>=1.0.2,<2",
    "tensorboard>=2.20",
    "pyarrow>=18",
    "pydantic>=2.11,<3",
    "pydantic_core>=2.33",
    "tokenizers>=0.22",
    "typing_extensions>=4.12",
    "huggingface_hub>=1",
    "jinja2>=3.1.6",  # with an older one transformers renders no chat template
    "pyyaml>=6",
    "numpy>=2",
    "tqdm>=4.66",
    "matplotlib>=3.9",
    "fsspec>=2025.3",
]

EXTRAS = {
    "flash-attn": ["flash-attn>=2.7"],
    "flash-attn-4": ["flash-attn-4>=4.0.0b36"],
    "openai": ["openai>=2"],
    "stores": ["aiohttp>=3.9"],
    "completion": ["shtab>=1.7"],
    "wandb": ["wandb>=0.19"],
    "mlflow": ["mlflow>=3"],
    "trackio": ["trackio>=0.20"],
    "quantization": ["bitsandbytes>=0.46.1"],
    "liger": ["liger-kernel>=0.8"],
    "gguf": ["gguf>=0.17"],
    "trl": ["trl>=1"],
    "dev": [
        "openai>=2",
        "aiohttp>=3.9",
        "bitsandbytes>=0.46.1",
        "gguf>=0.17",
        "shtab>=1.7",
        "trl>=1",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "pytrec-eval-terrier>=0.5.6",
        "hypothesis>=6",
        "kubernetes-validate>=1.30",
        "mutmut>=3.8,<3.9",
        "ruff>=0.14",
    ],
}

SHIPPED = ("configs", "ds_configs", "launch", "tools")
DEVELOPMENT = ("benchmark.py", "gpu_check.py")
"""They need benchmarks/."""


class BuildWithScripts(build_py):
    """In a wheel the package also holds the scripts of the commands, and the configs."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            ignored = shutil.ignore_patterns("__pycache__", *DEVELOPMENT)
            for folder in SHIPPED:
                target = Path(self.build_lib, "trsr_dist", folder)
                shutil.copytree(ROOT / folder, target, ignore=ignored, dirs_exist_ok=True)


setup(
    name="trsr_dist",
    version="0.1.0",
    description="LLM-TRSR at cluster scale: text-rich sequential recommendation with summarized histories",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the trsr_dist authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    project_urls={"Method": "https://arxiv.org/abs/2403.13325"},
    keywords="recommendation, large language models, LoRA, DeepSpeed, ZeRO, Slurm, WebDataset",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["trsr_dist", "trsr_dist.*"]),
    package_data={"trsr_dist": ["**/*.html"]},
    cmdclass={"build_py": BuildWithScripts},
    entry_points={"console_scripts": ["trsr = trsr_dist.__main__:main"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
)
