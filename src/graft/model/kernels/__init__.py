"""Triton kernels for what PyTorch's own compiler writes slowly, or cannot put into one pass. elementwise.py has each one's twin."""
