"""`probe` beside other libraries, at the same work on the same model: ``python -m benchmarks.peers``.

    pip install torchlens nnsight pyvene transformer_lens captum wandb grad-cam torchcam     # whoever is missing: a row

Three kinds of work: *outputs* captures the output of every leaf module in a forward; *histograms* logs one of every
parameter and its gradient in every training step; *Grad-CAM* explains resnet18's last block. Each library runs in a
process of its own, in interleaved pairs with the bare model, and with `probe` at the same work. ``true`` counts the
values that are right, of all there are: outputs against copies made inside hooks, histograms (number of values, least
and greatest) against the parameters and gradients themselves, maps against ``torch.autograd.grad`` on the network cut
in two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import apart, command, libraries
from benchmarks.command import Results, progress
from benchmarks.libraries import Adapter
from benchmarks.timing import compare, steady
from benchmarks.work import prepare


class Peer(NamedTuple):
    """A library's way of doing one kind of work; `package` is what pip calls it."""

    name: str
    work: str
    adapter: Adapter
    package: str | None = None
    models: tuple[str, ...] = ()
    note: str = ""


PEERS = (
    Peer("probe", "outputs", libraries.probe_attached),
    Peer("probe entered anew", "outputs", libraries.probe_anew, note="Probe(...) and its with-block in every forward"),
    Peer("reference hook", "outputs", libraries.by_hand, note="by hand; the limit"),
    Peer("create_feature_extractor", "outputs", libraries.torchvision_extractor, "torchvision"),
    Peer("captum", "outputs", libraries.captum_activation, "captum", note="LayerActivation"),
    Peer("nnsight", "outputs", libraries.nnsight_trace, "nnsight", note="one call of each module"),
    Peer("pyvene", "outputs", libraries.pyvene_collect, "pyvene", note="CollectIntervention"),
    Peer("torchlens record", "outputs", libraries.torchlens_record, "torchlens"),
    Peer("torchlens trace", "outputs", libraries.torchlens_trace, "torchlens", note="and the whole graph"),
    Peer(
        "TransformerLens",
        "outputs",
        libraries.transformerlens_cache,
        "transformer_lens",
        ("gpt",),
        "run_with_cache; a GPT-2 of transformers as gpt's stand-in, bare, for probe and for what is true",
    ),
    Peer("probe", "histograms", libraries.probe_log),
    Peer("add_histogram", "histograms", libraries.summary_writer, "tensorboard"),
    Peer("wandb", "histograms", libraries.wandb_watch, "wandb", note='watch(log="all", log_freq=1), offline'),
    Peer("probe", "Grad-CAM", libraries.probe_cam),
    Peer("grad-cam", "Grad-CAM", libraries.pytorch_grad_cam, "grad-cam"),
    Peer("torchcam", "Grad-CAM", libraries.torchcam_grad_cam, "torchcam"),
    Peer("captum", "Grad-CAM", libraries.captum_grad_cam, "captum", note="LayerGradCam"),
)
MODELS = {"outputs": ("resnet18", "gpt", "mlp200"), "histograms": ("resnet18", "mlp200"), "Grad-CAM": ("resnet18",)}


def main(words: Sequence[str] | None = None) -> None:
    parser = command.arguments(__doc__)
    parser.add_argument("--peers", help="only these, with commas between; each is set beside probe")
    parser.add_argument("--models", help="only these, with commas between: resnet18,gpt,mlp200 (resnet18 with --quick)")
    parser.add_argument("--works", help="only these: outputs,histograms,Grad-CAM (outputs with --quick)")
    apart.arguments(parser)
    options = parser.parse_args(words)
    if options.worker:
        worker(json.loads(options.worker))
        return
    names = list(dict.fromkeys(peer.name for peer in PEERS))
    chosen = _listed(options.peers, names, "--peers")
    models = _listed(options.models or ("resnet18" if options.quick else None), list(MODELS["outputs"]), "--models")
    works = _listed(options.works or ("outputs" if options.quick else None), list(MODELS), "--works")
    tasks = [
        (peer.name, peer.work, model)
        for peer in PEERS
        if peer.name in chosen and peer.work in works
        for model in MODELS[peer.work]
        if model in models and (not peer.models or model in peer.models)
    ]
    if not tasks:
        which = f"of {', '.join(chosen)} none has a way to do {', '.join(works)} on {', '.join(models)}"
        raise SystemExit(f"nothing to measure: {which}")
    command.start(options)
    with Results("peers", options, device=options.device) as found:
        print(f"{'work':11} {'model':9} {'library':25} {'/ bare':>24} {'/ probe':>24} {'true':>9}  note")
        packages = list(dict.fromkeys(_peer(*task[:2]).package for task in tasks))
        for package in progress(packages, len(packages)):
            run(package, [task for task in tasks if _peer(*task[:2]).package == package], options, found)


def _listed(text: str | None, known: list[str], option: str) -> list[str]:
    if text is None:
        return known
    asked = [word.strip() for word in text.split(",")]
    unknown = [word for word in asked if word not in known]
    if unknown:
        raise SystemExit(f"{option} {text}: no {unknown[0]!r} here; there are {', '.join(known)}")
    return asked


def _peer(name: str, work: str) -> Peer:
    return next(peer for peer in PEERS if (peer.name, peer.work) == (name, work))


Task = tuple[str, str, str]  # a peer's name, the work, the model


def run(package: str | None, tasks: list[Task], options: Any, found: Results) -> None:
    """All rows of one library, measured in a process of its own."""
    if package is not None and apart.version(package) is None:
        for task in tasks:
            _add(found, *task, {"failed": f"not installed: pip install {package}"})
        return
    order = {"device": options.device, "threads": options.threads, "quick": options.quick}
    rows = apart.rows("benchmarks.peers", tasks, options.limit, **order)
    for task, row in zip(tasks, rows, strict=True):
        _add(found, *task, row)


def _add(found: Results, name: str, work: str, model: str, row: dict[str, Any]) -> None:
    peer = _peer(name, work)
    version = apart.version(peer.package) if peer.package else None
    row = {
        "work": work,
        "model": model,
        "peer": name,
        "package": peer.package,
        "version": version,
        "note": peer.note,
        **row,
    }
    start = f"{work:11} {model:9} {name:25}"
    if "failed" in row:
        text = f"{start} {row['failed']}"
    else:
        bare, probe = (
            f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})" if r else "" for r in (row["ratio"], row["to_probe"])
        )
        text = f"{start} {bare:>24} {probe:>24} {row['true']:>4}/{row['all']:<4}  {peer.note}"
    found.add(text, **row)


def worker(order: dict[str, Any]) -> None:
    """Measure one library."""
    steady(order["threads"])
    command.quiet()
    device, quick = order["device"], order["quick"]
    apart.answer(lambda task: measure(_peer(*task[:2]), task[2], device, quick), order["tasks"])


def measure(peer: Peer, model: str, device: str, quick: bool) -> dict[str, Any]:
    """One row: what is true of what the first run captured, and two ratios."""
    settings = {"batch": 4} if peer.work == "Grad-CAM" else {}
    if quick and model == "resnet18":
        settings["size"] = 64
    mode = "train" if peer.work == "histograms" else "forward"
    work = prepare(model, mode, device, torch.float32, False, settings)
    time = {"seconds": 0.3, "least": 3} if quick else {"seconds": 2.0, "least": 5}
    with peer.adapter(work.twin()) as job:
        job.run()
        values = job.values()
        base = job.work or work
        truth = TRUTH[peer.work](base.twin())
        right = sum(key in values and _same(peer.work, values[key], expected) for key, expected in truth.items())
        row = {"true": right, "all": len(truth), "ratio": command.plain(compare(job.run, base.twin().step, **time))}
        row["to_probe"] = None
        if peer.name != "probe":
            with _peer("probe", peer.work).adapter(base.twin()) as own:
                row["to_probe"] = command.plain(compare(job.run, own.run, **time))
    return row


TRUTH = {
    "outputs": libraries.true_outputs,
    "histograms": libraries.true_histograms,
    "Grad-CAM": libraries.true_maps,
}


def _same(kind: str, value: Any, expected: Any) -> bool:
    if kind == "histograms":
        return value[0] == expected[0] and all(
            abs(a - b) <= 1e-5 * max(abs(a), abs(b)) for a, b in zip(value[1:], expected[1:], strict=True)
        )
    if kind == "Grad-CAM":
        value, expected = _shown(value, value.shape), _shown(expected, value.shape)
        return float((value - expected).abs().max()) < 1e-3
    close = {"rtol": 1e-4, "atol": 1e-5}
    return (
        isinstance(value, torch.Tensor) and value.shape == expected.shape and torch.allclose(value, expected, **close)
    )


def _shown(map_: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """A map after ReLU and scaled to 0..1, at the size of the picture where that is how a library returns it."""

    def scaled(map_: torch.Tensor) -> torch.Tensor:
        return (map_ - map_.min()) / (map_.max() - map_.min()).clamp_min(1e-30)

    map_ = scaled(map_.relu())
    if map_.shape == size:
        return map_
    return scaled(torch.nn.functional.interpolate(map_[None, None], size, mode="bilinear")[0, 0])


if __name__ == "__main__":
    command.run(main)
