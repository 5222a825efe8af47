"""Packages of timm_aig/, and hub_configs/ as timm_aig.hub_configs. Everything else is in pyproject.toml."""
from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=['timm_aig*']), 'timm_aig.hub_configs'],
    package_dir={'timm_aig.hub_configs': 'hub_configs'},
)
