"""Attention kernels in C++, built once on the machine that runs them; never required."""
