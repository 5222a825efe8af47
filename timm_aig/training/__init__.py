"""Training and evaluation: trainer, checkpoints, schedule, data sets, calibration of budgets and cascades."""
