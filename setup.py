"""Build entry point. Everything declarative is in pyproject.toml."""

from setuptools import setup

setup()
