"""Class activation maps beside grad-cam, torch-cam and captum: ``python -m benchmarks.cam``.

    pip install grad-cam torchcam captum        # whoever is missing: a row that says so

Error: the largest difference from the oracle (``torch.autograd.grad`` on the network cut in two by hand), as a share of
the map's maximum; peers return maps after ReLU and scaling to 0..1, so all are compared like that. Time: the ratio of
interleaved pairs, peer / `probe`, above 1 where `probe` is faster; for `probe` itself, its time / that of a plain
forward without a graph. Peak: memory beyond what was resident before, in a process of its own whose freed memory goes
back at once, measured by the kernel (Linux). Left: what differs on a model in train mode, half of it frozen, with
gradients, after one explanation. Random weights, on the CPU; GPUs are not measured here.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import apart, command
from benchmarks.command import Results, progress
from benchmarks.timing import Ratio, compare, returning, steady
from probe import cam

LIBRARIES = ("probe", "grad-cam", "torchcam", "captum")  # as pip calls them
METHODS = {  # the classes of grad-cam and of torch-cam
    "grad_cam": ("GradCAM", "GradCAM"),
    "grad_cam_pp": ("GradCAMPlusPlus", "GradCAMpp"),
    "xgrad_cam": ("XGradCAM", "XGradCAM"),
    "layer_cam": ("LayerCAM", "LayerCAM"),
    "hires_cam": ("HiResCAM", None),
    "eigen_cam": ("EigenCAM", None),
    "score_cam": ("ScoreCAM", "ScoreCAM"),
    "ablation_cam": ("AblationCAM", None),
}
GRADIENT = ("grad_cam", "grad_cam_pp", "xgrad_cam", "layer_cam", "hires_cam")
Explainer = Callable[[], Tensor]


class Work(NamedTuple):
    """One model, at one size, and the methods that are measured on it; of `errors` only the error is of interest."""

    model: str
    layer: str
    batch: int
    size: int
    methods: tuple[str, ...]
    errors: tuple[str, ...] = ()


WORKS = (
    Work("resnet18", "layer4", 8, 224, (*GRADIENT, "eigen_cam")),
    Work("alexnet", "features.10", 8, 224, ("grad_cam",), GRADIENT[1:]),  # an in-place ReLU follows the layer
    Work("convnext_tiny", "features", 2, 224, ("grad_cam",)),
    Work("vit_b_16", "encoder.layers.encoder_layer_11.ln_1", 1, 224, ("grad_cam",)),
    Work("resnet18", "layer4", 1, 64, ("score_cam", "ablation_cam")),
)


def build(work: Work) -> tuple[nn.Module, nn.Module, Tensor]:
    """The model with random weights, the layer to explain, and an input."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, work.model)(weights=None).eval()
    if work.model == "vit_b_16":  # whose head torchvision starts at zero
        nn.init.normal_(model.heads.head.weight, std=0.02)
    return model, model.get_submodule(work.layer), torch.randn(work.batch, 3, work.size, work.size)


def tokens_to_map(x: Tensor) -> Tensor:
    """What grad-cam's users write for a ViT: ``reshape_transform``."""
    return x[:, 1:].transpose(1, 2).unflatten(2, (14, 14))


def explainer(library: str, method: str, work: Work, model: nn.Module, layer: nn.Module, x: Tensor) -> Explainer | None:
    """A call that explains class 0 of every image, or None where the library has no such method."""
    theirs, torchcams = METHODS[method]
    transformer = work.model == "vit_b_16"
    if library == "probe":
        return lambda: cam.explain(model, x, layer=work.layer, target=0, method=getattr(cam, method))
    if library == "grad-cam":
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        reshape = tokens_to_map if transformer else None

        def run() -> Tensor:
            with getattr(pytorch_grad_cam, theirs)(model, [layer], reshape_transform=reshape) as explain:
                return torch.from_numpy(explain(x, [ClassifierOutputTarget(0)] * len(x)))

        return run
    if library == "torchcam":
        if torchcams is None:
            return None
        from torchcam import methods

        def run() -> Tensor:
            with getattr(methods, torchcams)(model, layer, input_shape=tuple(x.shape[1:])) as explain:
                with torch.set_grad_enabled(method in GRADIENT):
                    scores = model(x)
                return explain([0] * len(x), scores)[0]

        return run
    if method != "grad_cam" or transformer:
        return None
    from captum.attr import LayerGradCam

    return lambda: LayerGradCam(model, layer).attribute(x, target=0, relu_attributions=True)[:, 0].detach()


# -- error -------------------------------------------------------------------------------------------------------------


def oracle(method: str, model: nn.Module, name: str, x: Tensor) -> Tensor | None:
    """Raw maps by autograd on the model cut by hand; None where the method is not written here."""
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
        value, head = cut_vit(model, x)
    value = value.requires_grad_()
    pair = value.detach(), torch.autograd.grad(head(value)[:, 0].sum(), value)[0]
    a, g = (tokens_to_map(each).double() if name == "vit_b_16" else each.double() for each in pair)
    total = a.sum((2, 3), keepdim=True)
    alpha = torch.where(g == 0, 0.0, g**2 / torch.where(g == 0, 1.0, 2 * g**2 + total * g**3))
    weights = {
        "grad_cam": g.mean((2, 3), keepdim=True),
        "grad_cam_pp": (alpha * g.relu()).sum((2, 3), keepdim=True),
        "xgrad_cam": torch.where(total == 0, 0.0, (g * a).sum((2, 3), keepdim=True) / total),
        "layer_cam": g.relu(),
        "hires_cam": g,
    }
    return (weights[method] * a).sum(1) if method in weights else None


@torch.no_grad()
def cut_vit(model: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the last block's first norm returns, and the network from there on."""
    last = model.encoder.layers[-1]
    tokens = torch.cat([model.class_token.expand(len(x), -1, -1), model._process_input(x)], 1)
    before = model.encoder.layers[:-1](tokens + model.encoder.pos_embedding)

    def head(a: Tensor) -> Tensor:
        y = before + last.self_attention(a, a, a, need_weights=False)[0]
        return model.heads(model.encoder.ln(y + last.mlp(last.ln_2(y)))[:, 0])

    return last.ln_1(before), head


def shown(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps as peers return them: ReLU, scaled to 0..1, at one size, scaled again."""

    def scaled(maps: Tensor) -> Tensor:
        low, high = maps.flatten(1).amin(1)[:, None, None], maps.flatten(1).amax(1)[:, None, None]
        return (maps - low) / (high - low).clamp_min(1e-300)

    maps = scaled(maps.double().relu())
    return maps if maps.shape[1:] == size else scaled(F.interpolate(maps[:, None], size, mode="bilinear")[:, 0])


# -- what is left, and memory ------------------------------------------------------------------------------------------


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


def left_behind(library: str, method: str, work: Work) -> str:
    """What differs on a model in train mode, with gradients and a frozen half, after one explanation."""
    model, layer, x = build(work._replace(batch=2))
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(i % 2 == 0)
    model.train()
    before = fingerprint(model)
    call = explainer(library, method, work, model, layer, x)
    if call is None:
        return ""
    try:
        call()
    except Exception as error:
        return f"raises {type(error).__name__}"
    after = fingerprint(model)
    return ", ".join(key for key in before if before[key] != after[key]) or "nothing"


def memory(library: str, method: str, work: Work) -> int:
    """Peak memory of one call in bytes beyond what is resident; ``forward`` is a plain forward without a graph."""
    model, layer, x = build(work)
    calls = [
        torch.no_grad()(lambda rows=rows: model(rows))
        if library == "forward"
        else explainer(library, method, work, model, layer, rows)
        for rows in (x[:1], x)
    ]
    calls[0]()  # imports, thread pools and kernels' workspaces are not the method's
    model.zero_grad()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = _status("VmRSS")
    calls[1]()
    return 1024 * (_status("VmHWM") - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


# -- one process a library and a model ---------------------------------------------------------------------------------


def measure(library: str, method: str, work: Work, seconds: float, least: int) -> dict[str, Any] | None:
    """One row's error, time and what is left behind; None where the library has no such method."""
    model, layer, x = build(work)
    theirs = explainer(library, method, work, model, layer, x)
    if theirs is None:
        return None
    row: dict[str, Any] = {}
    expected, maps = oracle(method, model, work.model, x), theirs()
    if maps.dim() != 3:
        raise ValueError(f"returns {tuple(maps.shape)}, no map [B, h, w]")
    if expected is not None:
        size = tuple(maps.shape[1:])
        row["error"] = float((shown(maps, size) - shown(expected, size)).abs().max())
    if method in work.methods:
        ours = explainer("probe", method, work, model, layer, x)
        base = torch.no_grad()(lambda: model(x)) if library == "probe" else ours
        row["ratio"] = compare(theirs, base, seconds=seconds, least=least)._asdict()
    if work.model == "resnet18" and method == "grad_cam":
        row["left"] = left_behind(library, method, work)
    return row


def worker(order: dict[str, Any]) -> None:
    """Do what an order says, method by method."""
    work, library = Work(*order["work"]), order["library"]
    steady(order["threads"])
    if order["what"] == "memory":
        returning()

    def row(method: str) -> dict[str, Any] | None:
        if order["what"] == "memory":
            return {"peak": memory(library, method, work)}
        return measure(library, method, work, order["seconds"], order["least"])

    apart.answer(row, order["tasks"])


def ask(work: Work, methods: Sequence[str], *, limit: float, **order: Any) -> list[Any]:
    """A worker's rows, one a method."""
    return list(apart.rows("benchmarks.cam", methods, limit, work=work, **order))


def version(library: str) -> str | None:
    """The installed version; None if it is missing."""
    return "" if library == "probe" else apart.version(library)


def rows_of(work: Work, library: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything about one library on one model."""
    start = {"model": work.model, "batch": work.batch, "size": work.size, "library": library}
    order: dict[str, Any] = {"library": library, "limit": options.limit, "threads": options.threads}
    if library == "forward":
        return [{**start, "method": "", **ask(work, ["grad_cam"], what="memory", **order)[0]}]
    if version(library) is None:
        return [{**start, "method": "", "failed": f"not installed: pip install {library}"}]
    methods = (*work.methods, *work.errors)
    seconds, least = (0.3 if options.quick else 4.0), 5
    found = []
    measured = ask(work, methods, what="measure", seconds=seconds, least=least, **order)
    for method, row in zip(methods, measured, strict=True):
        if row is None:
            continue
        row = {**start, "version": version(library), "method": method, **row}
        if "ratio" in row:
            row["ratio"] = Ratio(**row["ratio"])
            if method in ("grad_cam", "score_cam"):
                row |= ask(work, [method], what="memory", **order)[0]
        found.append(row)
    return found


def text_of(row: dict[str, Any]) -> str:
    start = f"{row['model']:13} {row['method']:12} {row['library']:8}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    error = f"{row['error']:.1e}" if "error" in row else ""
    peak = f"{row['peak'] / 1e6:.0f} MB" if "peak" in row else ""
    ratio = f"{row['ratio'].median:.2f} ({row['ratio'].low:.2f}-{row['ratio'].high:.2f})" if "ratio" in row else ""
    return f"{start} {error:>8} {ratio:>18} {peak:>8}  {row.get('left', '')}".rstrip()


def _quick(works: list[Work]) -> list[Work]:
    """One method a model is timed, on small pictures where the model takes them."""
    first: dict[str, Work] = {}
    for work in works:
        first.setdefault(work.model, work)
    return [
        work._replace(size=224 if work.model == "vit_b_16" else 64, methods=("grad_cam",), errors=work.methods[1:])
        for work in first.values()
    ]


def main(words: Sequence[str] | None = None) -> None:
    parser = command.arguments(__doc__, device=False)
    parser.add_argument("--models", help="only these, with commas between")
    apart.arguments(parser)
    options = parser.parse_args(words)
    if options.worker:
        worker(json.loads(options.worker))
        return
    options.device = "cpu"
    known = list(dict.fromkeys(work.model for work in WORKS))
    asked = options.models.split(",") if options.models else known
    if unknown := [name for name in asked if name not in known]:
        raise SystemExit(f"--models {options.models}: no {unknown[0]!r} here; there are {', '.join(known)}")
    command.start(options)
    works = [work for work in WORKS if work.model in asked]
    if options.quick:
        works = _quick(works if options.models else works[:1])
    with Results("cam", options, device="cpu") as kept:
        print(f"{'model':13} {'method':12} {'library':8} {'error':>8} {'time / probe':>18} {'peak':>8}  left behind")
        tasks = [(work, library) for work in works for library in ("forward", *LIBRARIES)]
        for work, library in progress(tasks, len(tasks)):
            for row in rows_of(work, library, options):
                kept.add(text_of(row), **row)


if __name__ == "__main__":
    command.run(main)
