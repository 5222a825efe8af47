"""optimize_for_inference: an eval-only copy of a model, in which a skipped block is saved time."""
from .blocks import InferenceStage, run_rows
from .optimize import InferenceModel, optimize_for_inference

__all__ = ['InferenceModel', 'InferenceStage', 'optimize_for_inference', 'run_rows']
