"""Decoders: from the files of one kind of adapter to the forms that the engine knows."""

from peft_core.methods.registry import SERVED_KINDS, check, decode
from peft_core.methods.report import Decoded, DecodeReport, MatchedSite
from peft_core.methods.tensors import Header, TensorShape, TensorSource

__all__ = [
    "SERVED_KINDS",
    "DecodeReport",
    "Decoded",
    "Header",
    "MatchedSite",
    "TensorShape",
    "TensorSource",
    "check",
    "decode",
]
