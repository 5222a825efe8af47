"""Adaptive models as files: ONNX, OpenVINO, torch.export. Each is run and compared with the model before it is kept."""
