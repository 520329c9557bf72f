"""Checks Triton kernels without a GPU: numbers (interpreter), machine code (codegen), host path (fake_driver)."""
