"""Builds the CPU kernels; everything else is in pyproject.toml.

The extensions are optional: without a C++ compiler the installation goes on and
`senet.ops.implementations()` says what is missing. They are compiled with OpenMP but not linked to
an OpenMP runtime: PyTorch has loaded one by the time `senet.ops.cpu` loads its library.
"""

from setuptools import Extension, setup

OPS = "src/senet/ops"
INFERENCE = "src/senet/inference"
OPTIONS = [
    "-std=c++17",
    "-g0",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
]
OPS_HEADERS = [
    f"{OPS}/cpu_{part}.h"
    for part in ("types", "vector", "passes", "gate", "tail", "backward", "join")
]
INFERENCE_HEADERS = [
    f"{INFERENCE}/kernels_{part}.h"
    for part in (
        *("product", "convolution", "winograd", "grouped"),
        *("excitation", "passes", "program"),
    )
]

setup(
    ext_modules=[
        Extension(
            "senet.ops._cpu",
            sources=[f"{OPS}/cpu.cpp"],
            depends=OPS_HEADERS,
            extra_compile_args=["-O3", *OPTIONS],  # -O2 leaves loops of unknown length scalar
            optional=True,
        ),
        Extension(
            "senet.inference._kernels",
            sources=[f"{INFERENCE}/kernels.cpp"],
            depends=OPS_HEADERS + INFERENCE_HEADERS,
            extra_compile_args=["-O2", "-ftree-vectorize", *OPTIONS],
            optional=True,
        ),
    ]
)
