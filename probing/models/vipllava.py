"""VipLLaVA in the format of transformers: LLaVA-1.5 that reads several layers of its vision tower."""

from probing.models.llava import describe as describe
from probing.models.llava import load as load
from probing.models.llava import make_inputs as make_inputs

MODEL_TYPE = "vipllava"
