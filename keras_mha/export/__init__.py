"""Models as files for other runtimes, each checked by value before it is published."""

from keras_mha.export.device.form import register_device_form
from keras_mha.export.device.layers import NoDeviceFormError, Swap
from keras_mha.export.onnx.export import export_onnx
from keras_mha.export.onnx.report import ONNXReport
from keras_mha.export.parity import ParityError, VerificationError
from keras_mha.export.report import ExportReport, Parity, TensorInfo
from keras_mha.export.samples import load_samples
from keras_mha.export.saved_model.export import export_saved_model
from keras_mha.export.saved_model.report import SavedModelReport, SignatureReport
from keras_mha.export.tflite.export import export_tflite
from keras_mha.export.tflite.lint import Finding, lint_tflite
from keras_mha.export.tflite.metadata import BertMetadata, RegexMetadata
from keras_mha.export.tflite.report import MediaPipeCheck, TFLiteFile, TFLiteReport
from keras_mha.export.tokens import without_tokenizer
from keras_mha.export.verification.report import RuntimeCheck, VerificationReport
from keras_mha.export.verification.verify import verify

__all__ = [
    "BertMetadata",
    "ExportReport",
    "Finding",
    "MediaPipeCheck",
    "NoDeviceFormError",
    "ONNXReport",
    "Parity",
    "ParityError",
    "RegexMetadata",
    "RuntimeCheck",
    "SavedModelReport",
    "SignatureReport",
    "Swap",
    "TFLiteFile",
    "TFLiteReport",
    "TensorInfo",
    "VerificationError",
    "VerificationReport",
    "export_onnx",
    "export_saved_model",
    "export_tflite",
    "lint_tflite",
    "load_samples",
    "register_device_form",
    "verify",
    "without_tokenizer",
]
