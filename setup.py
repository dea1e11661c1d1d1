"""The build: configs/ becomes featinv.configs in a wheel. All else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

configs = [f"featinv.configs.{folder}" for folder in find_namespace_packages("configs")]
setup(
    packages=[
        *find_namespace_packages(include=["featinv*"], exclude=["*__pycache__*"]),
        *["featinv.configs", *configs],
    ],
    package_dir={"featinv.configs": "configs"},
    package_data={"": ["*.yaml", "*.md", "*.safetensors"]},
)
