"""The methods by name."""

from collections.abc import Mapping

from quant.method import Method
from quant.methods.awq import Awq, AwqGptq
from quant.methods.gptq import Gptq
from quant.methods.hqq import HQQ
from quant.methods.rtn import RTN
from quant.methods.rtn_w import RTN_W

_ALL: tuple[Method, ...] = (RTN, RTN_W, HQQ, Awq(), Gptq(), AwqGptq())
METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
