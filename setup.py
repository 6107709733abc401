"""Build the kernels with CMake and Ninja; everything else is in pyproject.toml.

Environment: `CDROP_BUILD_CUDA` auto (default: where nvcc is), on or off;
`CDROP_CUDA_ARCHITECTURES`, a CMake list; `MAX_JOBS`.
"""

import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
KERNELS = "libcdrop.so"


def commit() -> str:
    """The commit of the sources, or `unknown` outside a repository."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class CMakeBuild(build_ext):
    """Builds `libcdrop.so` and `_C` together, into the package."""

    def build_extension(self, ext: Extension) -> None:
        output = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        defines = {
            "CDROP_OUTPUT": output,
            "CDROP_VERSION": self.distribution.get_version(),
            "CDROP_COMMIT": commit(),
            "Python_EXECUTABLE": sys.executable,
            "CDROP_BUILD_CUDA": os.environ.get("CDROP_BUILD_CUDA", "auto"),
        }
        arguments = [f"-D{name}={value}" for name, value in defines.items()]
        architectures = os.environ.get("CDROP_CUDA_ARCHITECTURES")
        arguments.append(  # or back to the list in CMakeLists.txt
            f"-DCDROP_CUDA_ARCHITECTURES={architectures}"
            if architectures
            else "-UCDROP_CUDA_ARCHITECTURES"
        )
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *arguments], check=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run(["cmake", "--build", build, *jobs], check=True)

    def copy_extensions_to_source(self) -> None:
        """An editable install also needs the library that stands beside the module."""
        super().copy_extensions_to_source()
        built = pathlib.Path(self.build_lib) / "consensusdrop_kernels" / KERNELS
        if built.exists():  # else it was built in place
            # A new file, not new bytes in the old one, which a process may have mapped.
            target = ROOT / "consensusdrop_kernels" / KERNELS
            target.unlink(missing_ok=True)
            shutil.copyfile(built, target)


setup(
    ext_modules=[Extension("consensusdrop_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
