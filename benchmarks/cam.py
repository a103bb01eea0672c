"""Class activation maps beside grad-cam, torch-cam and captum: error, time, peak memory, and what is left behind.

    pip install grad-cam torchcam captum        # optional: whoever is missing is left out
    python benchmarks/cam.py [--batch 8] [--repeats 7] [--methods grad_cam score_cam ...]

Error: the largest difference from the oracle (``torch.autograd.grad`` on the network cut in two by hand), as a share
of the map's maximum; peers return maps after ReLU and scaling to 0..1, so all are compared like that. Time: the
median of the ratios of interleaved pairs of CPU time, peer / probe, above 1 where probe is faster. Peak: memory
beyond what was resident before, in a process of its own, in MB, measured by the kernel. Left: what differs on the
model afterwards. Everything runs on one CPU thread with random weights; GPUs are not measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from probe import cam

MODELS = {"resnet18": "layer4", "alexnet": "features.10", "convnext_tiny": "features", "vit_b_16": "encoder.ln_1"}
LIBRARIES = ("probe", "grad-cam", "torchcam", "captum")
METHODS = {
    "grad_cam": ("GradCAM", "GradCAM"),
    "grad_cam_pp": ("GradCAMPlusPlus", "GradCAMpp"),
    "xgrad_cam": ("XGradCAM", "XGradCAM"),
    "layer_cam": ("LayerCAM", "LayerCAM"),
    "hires_cam": ("HiResCAM", None),
    "eigen_cam": ("EigenCAM", None),
    "score_cam": ("ScoreCAM", "ScoreCAM"),
    "ablation_cam": ("AblationCAM", None),
}
SLOW = ("score_cam", "ablation_cam")
Explainer = Callable[[], Tensor]


def build(name: str) -> tuple[nn.Module, nn.Module, str]:
    """A model with random weights, its layer, and that layer's name."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    layer = MODELS[name]
    if name == "vit_b_16":
        nn.init.normal_(model.heads.head.weight, std=0.02)
        layer = "encoder.layers.encoder_layer_11.ln_1"
    return model, model.get_submodule(layer), layer


def tokens_to_map(x: Tensor) -> Tensor:
    """What grad-cam's users write for a ViT: ``reshape_transform``."""
    return x[:, 1:].transpose(1, 2).unflatten(2, (14, 14))


def explainer(library: str, method: str, model: nn.Module, layer: nn.Module, name: str, x: Tensor) -> Explainer | None:
    """A call that explains class 0 of every image, or None where the library has no such method."""
    theirs, torchcams = METHODS[method]
    transformer = name.startswith("encoder")
    if library == "probe":
        return lambda: cam.explain(model, x, layer=name, target=0, method=getattr(cam, method))
    if library == "grad-cam":
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        reshape = tokens_to_map if transformer else None

        def run() -> Tensor:
            with getattr(pytorch_grad_cam, theirs)(model, [layer], reshape_transform=reshape) as explain:
                return torch.from_numpy(explain(x, [ClassifierOutputTarget(0)] * len(x)))

        return run
    if library == "torchcam":
        if torchcams is None or (transformer and method in SLOW):
            return None
        from torchcam import methods

        def run() -> Tensor:
            with getattr(methods, torchcams)(model, layer, input_shape=tuple(x.shape[1:])) as explain:
                return explain([0] * len(x), model(x))[0]

        return run
    if method != "grad_cam" or transformer:
        return None
    from captum.attr import LayerGradCam

    return lambda: LayerGradCam(model, layer).attribute(x, target=0, relu_attributions=True)[:, 0].detach()


def oracle(name: str, method: str, model: nn.Module, x: Tensor) -> Tensor | None:
    """Raw maps by autograd on the model cut by hand; None where the cut is not written here."""
    if name == "resnet18":
        stem = nn.Sequential(*list(model.children())[:8])
        value, head = stem(x).detach(), lambda a: model.fc(a.mean((2, 3)))
    elif name == "alexnet":
        relu = [nn.ReLU() if isinstance(m, nn.ReLU) else m for m in model.features]
        tail = [nn.ReLU() if isinstance(m, nn.ReLU) else m for m in model.classifier]
        value = nn.Sequential(*relu[:11])(x).detach()
        head = nn.Sequential(*relu[11:], model.avgpool, nn.Flatten(), *tail)
    elif name == "convnext_tiny":
        value, head = model.features(x).detach(), lambda a: model.classifier(a.mean((2, 3), keepdim=True))
    else:
        return None
    value = value.requires_grad_()
    g = torch.autograd.grad(head(value)[:, 0].sum(), value)[0].double()
    a, total = value.detach().double(), value.detach().double().sum((2, 3), keepdim=True)
    alpha = torch.where(g == 0, 0.0, g**2 / torch.where(g == 0, 1.0, 2 * g**2 + total * g**3))
    weights = {
        "grad_cam": g.mean((2, 3), keepdim=True),
        "grad_cam_pp": (alpha * g.relu()).sum((2, 3), keepdim=True),
        "xgrad_cam": torch.where(total == 0, 0.0, (g * a).sum((2, 3), keepdim=True) / total),
        "layer_cam": g.relu(),
        "hires_cam": g,
    }
    return (weights[method] * a).sum(1) if method in weights else None


def shown(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps as peers return them: ReLU, scaled to 0..1, at one size, scaled again."""

    def scaled(maps: Tensor) -> Tensor:
        low, high = maps.flatten(1).amin(1)[:, None, None], maps.flatten(1).amax(1)[:, None, None]
        return (maps - low) / (high - low).clamp_min(1e-300)

    maps = scaled(maps.double().relu())
    return maps if maps.shape[1:] == size else scaled(F.interpolate(maps[:, None], size, mode="bilinear")[:, 0])


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that explaining it must not change."""
    return {
        "hooks": sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
        ),
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        ".grad": [None if p.grad is None else float(p.grad.double().sum()) for p in model.parameters()],
        "buffers": [float(b.double().sum()) for b in model.buffers()],
        "structure": [(n, type(m).__name__) for n, m in model.named_modules()],
    }


def left_behind(library: str, method: str, name: str) -> str:
    """What differs on a model in train mode, with gradients and a frozen half, after one explanation."""
    model, layer, layer_name = build(name)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(i % 2 == 0)
    model.train()
    before = fingerprint(model)
    try:
        call = explainer(library, method, model, layer, layer_name, torch.randn(2, 3, 224, 224))
        if call is None:
            return ""
        call()
    except Exception as error:
        return f"raises {type(error).__name__}"
    after = fingerprint(model)
    return ", ".join(key for key in before if before[key] != after[key]) or "nothing"


def memory(library: str, method: str, name: str, batch: int) -> float:
    """Peak memory of one call in MB beyond what is resident; ``forward`` is a plain forward without a graph."""
    model, layer, layer_name = build(name)
    x = torch.randn(batch, 3, 224, 224)
    small = explainer(library, method, model, layer, layer_name, x[:1]) if library != "forward" else None
    if small is not None:
        small()  # imports, thread pools and kernels' workspaces are not the method's
    call = explainer(library, method, model, layer, layer_name, x) if library != "forward" else lambda: model(x)
    if call is None:
        return float("nan")
    model.zero_grad()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = _status("VmRSS")
    with torch.no_grad() if library == "forward" else contextlib.nullcontext():
        call()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def times(a: Explainer, b: Explainer, repeats: int) -> tuple[float, float]:
    """Median milliseconds of `a`, and the median ratio b / a over interleaved pairs."""
    a(), b()
    found = []
    for i in range(repeats):
        spent = {}
        for key, call in (("a", a), ("b", b)) if i % 2 else (("b", b), ("a", a)):
            start = time.process_time()
            call()
            spent[key] = time.process_time() - start
        found.append(spent)
    ratios = [pair["b"] / pair["a"] for pair in found]
    return 1000 * statistics.median(pair["a"] for pair in found), statistics.median(ratios)


def measure(library: str, method: str, name: str, batch: int, repeats: int) -> dict[str, Any]:
    """One row's numbers, in a process of its own."""
    model, layer, layer_name = build(name)
    x = torch.randn(batch, 3, 224, 224)
    theirs = explainer(library, method, model, layer, layer_name, x)
    ours = explainer("probe", method, model, layer, layer_name, x)
    if theirs is None or ours is None:
        return {}
    row: dict[str, Any] = {}
    expected, maps = oracle(name, method, model, x), theirs()
    if expected is not None:
        size = tuple(maps.shape[1:])
        row["error"] = float((shown(maps, size) - shown(expected, size)).abs().max())
    row["ms"], row["ratio"] = times(ours, theirs, repeats)
    return row


def worker(arguments: list[str]) -> None:
    what, library, method, name, batch, repeats = arguments
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            if what == "memory":
                result: Any = memory(library, method, name, int(batch))
            elif what == "left":
                result = left_behind(library, method, name)
            else:
                result = measure(library, method, name, int(batch), int(repeats))
        except ImportError:
            result = None
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"[:60]} if what == "measure" else None
    print(json.dumps(result))


def run(*arguments: object) -> Any:
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 and done.stdout else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    print("| model | method | library | error | time / probe | probe ms | peak MB | left behind |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models:
        plain = run("memory", "forward", "grad_cam", name, options.batch, 1)
        print(f"| {name} | *plain forward* | | | | | {plain:.0f} | |", flush=True)
        for method in options.methods:
            slow = method in SLOW
            if slow and name != "resnet18":
                continue
            batch, repeats = (1, 3) if slow else (options.batch, options.repeats)
            for library in LIBRARIES:
                row = run("measure", library, method, name, batch, repeats)
                if not row:
                    continue
                if "failed" in row:
                    print(f"| {name} | {method} | {library} | {row['failed']} | | | | |", flush=True)
                    continue
                measured = run("memory", library, method, name, batch, 1)
                peak = "" if measured is None else f"{measured:.0f}"
                left = run("left", library, method, name, batch, 1) if method == "grad_cam" else ""
                error = f"{row['error']:.1e}" if "error" in row else ""
                ratio = "" if library == "probe" else f"{row['ratio']:.2f}"
                own = f"{row['ms']:.0f}" if library == "probe" else ""
                print(f"| {name} | {method} | {library} | {error} | {ratio} | {own} | {peak} | {left} |", flush=True)


if __name__ == "__main__":
    worker(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
