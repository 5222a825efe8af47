"""Packages: those of timm_aig/, and hub_configs/ of the checkout as timm_aig.hub_configs. The rest: pyproject.toml."""
from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=['timm_aig*']), 'timm_aig.hub_configs'],
    package_dir={'timm_aig.hub_configs': 'hub_configs'},
)
