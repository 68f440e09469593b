"""Steps on a CPU as one graph compiled by OpenVINO (extra ``openvino``)."""
