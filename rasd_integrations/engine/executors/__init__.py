"""Executors of a step: eager torch, OpenVINO, CUDA graphs."""
