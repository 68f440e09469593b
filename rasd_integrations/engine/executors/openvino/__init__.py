"""Steps on a CPU as one graph compiled by OpenVINO (extra ``openvino``)."""

import sys

# OpenVINO reports its import and each conversion over the network, unasked, where it finds this package; where not it
# takes a stub. An ``openvino`` that was imported before is left as it is.
_REPORTS = "openvino_telemetry"
if _REPORTS not in sys.modules:
    sys.modules[_REPORTS] = None  # type: ignore[assignment]
    try:
        import openvino  # noqa: F401
    finally:
        del sys.modules[_REPORTS]
