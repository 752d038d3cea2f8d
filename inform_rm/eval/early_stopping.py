"""`CSIEarlyStopping` under the name by which other code imports it; it lives in `inform_rm.eval.detection`."""

from inform_rm.eval.detection.early_stopping import CSIEarlyStopping

__all__ = ["CSIEarlyStopping"]
