"""OpenVINO as the engine that answers for a network on a CPU: the same sums in float32, sooner.

The library is an extra (``parry-bench[openvino]``) and is imported here alone, when a network is to be converted.
"""

import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from bench.errors import ConfigError
from bench.system.extras import library

EXAMPLES = 2  # images that a network is traced with; one would look as if there were no batch


def installed() -> "OpenVINO | None":
    """The engine, if the library is there; whether it works shows when it converts a network."""
    try:
        return OpenVINO(f"OpenVINO {version('openvino')}") if find_spec("openvino") else None
    except (PackageNotFoundError, ValueError):  # something else has its name
        return None


@dataclass(frozen=True)
class OpenVINO:
    """Converts networks; ``name`` is the library and its version."""

    name: str

    def __call__(self, network: nn.Module, images: Tensor) -> "Compiled":
        """``network`` compiled for as many threads as torch has, and batches of any size.

        A trace holds one way through a network's Python. Whatever depends on the values or the number of the images
        there is noticed, and refused.

        Args:
            network: logits (B, K) from images (B, C, H, W), frozen, in eval mode, on the CPU.
            images: some that it can be traced with.

        Raises:
            Exception: it cannot be traced, converted or compiled; what is raised depends on its own code.
        """
        ov = _openvino()
        with torch.no_grad(), warnings.catch_warnings(record=True) as told:  # that tracing is deprecated, among others
            warnings.simplefilter("always")
            traced = torch.jit.trace(network, (images[:EXAMPLES].clone(),), check_trace=False)
            if blind := [str(one.message) for one in told if issubclass(one.category, TracerWarning)]:
                raise ConfigError(f"its Python depends on values or sizes: {blind[0]}")
            decoder = library("openvino.frontend.pytorch.ts_decoder", "openvino").TorchScriptPythonDecoder(traced)
            frontend = ov.frontend.FrontEndManager().load_by_framework("pytorch")
            model = frontend.convert(frontend.load(decoder))  # reads the decoder, which has to live until then
        model.reshape([-1, *images.shape[1:]])
        return Compiled(_core().compile_model(model, "CPU", _settings()))


class Compiled:
    """Logits (B, K) from images (B, C, H, W), both float32 on the CPU. It never changes, and can be pickled.

    Raises:
        ConfigError: it would compute in other numbers than float32.
    """

    def __init__(self, compiled: Any) -> None:
        if (found := compiled.get_property("INFERENCE_PRECISION_HINT")) != _openvino().Type.f32:
            raise ConfigError(f"OpenVINO computes in {found.to_string()} where it was told float32")
        self._compiled, self._request, self._alone = compiled, compiled.create_infer_request(), Lock()

    def __call__(self, x: Tensor) -> Tensor:
        """Answer ``x``."""
        ov, given = _openvino(), x.detach().contiguous().numpy()
        with self._alone:
            self._request.infer({0: ov.Tensor(given, shared_memory=True)}, share_inputs=True, share_outputs=True)
            return torch.from_numpy(self._request.get_output_tensor(0).data).clone()

    def __deepcopy__(self, memo: object) -> "Compiled":
        return self

    def __reduce__(self) -> tuple[Callable[[bytes], "Compiled"], tuple[bytes]]:
        return _imported, (self._compiled.export_model().getvalue(),)


@cache
def _openvino() -> Any:
    """The library, without the part that tells its makers of each import, through a network if there is one.

    Raises:
        ConfigError: it is not there, or does not import.
    """
    reports = "openvino.tools.ovc"
    hidden = {} if reports in sys.modules else {reports: None}
    sys.modules.update(hidden)  # type: ignore[arg-type]  # None is for what cannot be imported
    try:
        return library("openvino", "openvino")
    finally:
        for name in hidden:
            del sys.modules[name]


@cache
def _core() -> Any:
    return _openvino().Core()


def _imported(blob: bytes) -> Compiled:
    return Compiled(_core().import_model(io.BytesIO(blob), "CPU", _settings()))


def _settings() -> dict[str, Any]:
    """One answer at a time, in float32 whatever else the processor could do, on processors that others may use, too."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
