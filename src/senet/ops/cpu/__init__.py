"""The operators in C++ and OpenMP, for float32, bfloat16 and float64 on the CPU."""
