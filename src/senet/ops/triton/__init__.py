"""The operators as Triton kernels, for CUDA and ROCm tensors.

Triton is imported with the first call. With TRITON_INTERPRET=1 in the environment the kernels run
in Triton's interpreter on the CPU, slowly, for tests; only `use("triton")` takes that way.
"""
