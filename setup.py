"""Build entry point: the native libraries of csrc/. Everything declarative is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("csrc_build", _ROOT / "csrc" / "build.py")
assert _spec is not None and _spec.loader is not None
csrc_build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = csrc_build  # dataclasses look their module up
_spec.loader.exec_module(csrc_build)


class BuildLibraries(build_ext):
    """Builds the libraries into the package: in place for an editable installation."""

    def run(self) -> None:
        """Build what this machine can build."""
        built = csrc_build.build_all(self._folder())
        self._built = [str(path) for path in built]

    def _folder(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return (_ROOT if in_place else Path(self.build_lib)) / "erq_kernels"

    def get_outputs(self) -> list[str]:
        return self._built

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """A wheel with libraries runs on this platform and with any Python: they are plain C ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, system = super().get_tag()
        return (python, abi, system) if self.root_is_pure else ("py3", "none", system)


setup(
    # No extension modules of Python: the rows make setuptools run build_ext and tag the platform.
    ext_modules=[Extension(f"erq_kernels.lib{x.name}", []) for x in csrc_build.buildable()],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
