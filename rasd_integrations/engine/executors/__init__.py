"""How a step runs: eager torch, OpenVINO, CUDA graphs."""
