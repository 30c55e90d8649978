"""The methods by name."""

from collections.abc import Mapping

from quant.method import Method
from quant.methods.awq import Awq, AwqGptq
from quant.methods.gptq import Gptq
from quant.methods.hqq import HalfQuadratic
from quant.methods.rtn import RoundToNearest
from quant.methods.rtn_w import WeightedRoundToNearest

_ALL: tuple[Method, ...] = (
    RoundToNearest(),
    WeightedRoundToNearest(),
    HalfQuadratic(),
    Awq(),
    Gptq(),
    AwqGptq(),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
