"""Which base is served, and how."""

from __future__ import annotations

from typing import Literal

from server.setting_groups.field import SettingGroup, setting
from server.setting_groups.values import Size, Words


class ModelSettings(SettingGroup):
    heading = "Model"

    model: str | None = setting(
        None, "Base model: a directory or a Hugging Face id. Without it the small built-in base is served."
    )
    served_model_name: Words = setting(
        (),
        "Name(s) the base is served under; the first is the one told to clients. Default: MODEL.",
        metavar="NAME",
    )
    revision: str | None = setting(None, "Branch, tag or commit of the base model on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Type of the base's weights and activations; auto takes the checkpoint's own."
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Where the base runs; auto prefers a GPU.")
    max_model_len: Size | None = setting(
        None,
        "Longest prompt plus answer, in tokens. Default: what the model was trained for.",
        gt=0,
        metavar="N",
    )
