"""Packages and their data; everything else is in pyproject.toml. The configurations go into the package."""

from pathlib import Path

from setuptools import find_packages, setup

CONFIGS = "lever_plus.configs"


def requirements() -> list[str]:
    """requirements.txt without comments."""
    lines = (line.split("#")[0].strip() for line in Path("requirements.txt").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


setup(
    packages=[*find_packages(include=["lever_plus", "lever_plus.*", "open_mmicl", "open_mmicl.*"]), CONFIGS],
    package_dir={CONFIGS: "configs"},
    package_data={
        CONFIGS: ["**/*.yaml", "**/*.json", "**/*.env"],
        "lever_plus.mini": ["*.yaml", "weights/**/*"],
        "lever_plus.settings": ["*.yaml"],
        "lever_plus.experiments": ["templates/*"],
        "lever_plus.release": ["templates/*"],
    },
    install_requires=requirements(),
)
