"""Other people's training loops and models: what is logged is what flowed, and what is trained is the same."""

from __future__ import annotations

import builtins
import copy
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from probe import Board, Kind, Probe, histogram, stats
from probe.hooks import ours
from tests.reading import scalars, steps

MODELS = ["bert", "gpt2", "llama", "resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


def transformer(name: str) -> nn.Module:
    """A tiny model from a configuration: nothing is downloaded."""
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=16)
        return transformers.GPT2LMHeadModel(config)
    if name == "llama":
        config = transformers.LlamaConfig(**small, intermediate_size=48, max_position_embeddings=16)
        return transformers.LlamaForCausalLM(config)
    config = transformers.BertConfig(**small, intermediate_size=48, max_position_embeddings=16)
    return transformers.BertForMaskedLM(config)


def model_and_inputs(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name in ("bert", "gpt2", "llama"):
        tokens = torch.randint(0, 60, (2, 8))
        return transformer(name), {"input_ids": tokens, "labels": tokens}
    timm = pytest.importorskip("timm")
    size = {"resnet18": {}, "vit_tiny_patch16_224": {"img_size": 32}}.get(name, {"img_size": 56})
    return timm.create_model(name, num_classes=5, **size), {"x": torch.randn(2, 3, *[size.get("img_size", 64)] * 2)}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(1)  # dropout
    out = model(**inputs)
    loss = out.square().mean() if isinstance(out, torch.Tensor) else out.loss
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.filterwarnings("ignore:.*probed layers were never called:probe.ProbeWarning")  # dropout as a function
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_is_bit_identical(name: str, tmp_path: Path) -> None:
    """With all four hooks on every leaf, and a log; every leaf that was called has an output and its gradient."""
    model, inputs = model_and_inputs(name)
    twin = copy.deepcopy(model)
    optimizer, other = (torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, twin))
    with Board(tmp_path) as board, Probe(model, optimizer=optimizer, kinds=Kind.all(), keep=1) as p:
        p.log(board, stats)
        loss = train_step(model, optimizer, inputs)
    assert torch.equal(loss, train_step(twin, other, inputs))
    for (key, one), two in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two), key
        assert (one.grad is None) == (two.grad is None), key
        assert one.grad is None or torch.equal(one.grad, two.grad), key
    assert all(map(torch.equal, model.buffers(), twin.buffers()))
    called = list(p.activations)
    assert len(called) > 10
    assert set(called) - set(p.gradients) <= {"model.rotary_emb"}  # which has no parameter and no input with a gradient
    assert scalars(tmp_path, f"{called[0]}/output/mean")


# -- trainers ----------------------------------------------------------------------------------------------------------

ROWS = 24


@pytest.fixture
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(ROWS, 4, generator=generator), torch.randint(0, 2, (ROWS,), generator=generator))


def hooked(model: nn.Module) -> bool:
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return any(map(ours, hooks))


def check_run(run: Path, layer: str, weight: str, *numbers: int) -> None:
    """Steps of activations and parameters, and gradients that are those of the update, not zero or of the last one."""
    assert steps(run, f"{layer}/output/mean") == list(numbers)
    assert steps(run, f"{layer}/grad_output/mean") == list(numbers)
    assert steps(run, f"{weight}/grad/norm") == list(numbers)
    assert all(value > 0 for _, value in scalars(run, f"{weight}/grad/norm"))
    updates, rates = scalars(run, f"{weight}/update/norm"), scalars(run, "lr/group0")
    gradients = scalars(run, f"{weight}/grad/norm")
    for (_, update), (_, rate), (_, gradient) in zip(updates, rates, gradients, strict=True):
        assert update == pytest.approx(rate * gradient, rel=1e-3)  # plain SGD


class Classifier(nn.Module):
    """What the Trainer of transformers takes: keywords in, a dict with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.fc(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(model: nn.Module, data: TensorDataset, folder: Path, *callbacks: Any, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=5, learning_rate=0.1, optim="sgd",
        report_to="none", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, seed=0, **options,
    )  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in data]
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_trainer_of_transformers(data: TensorDataset, tmp_path: Path) -> None:
    """A run with every second global step, gradient accumulation and evaluation; the same training; nothing left."""
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    model = Classifier()
    twin = copy.deepcopy(model)
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    from probe.integrations.transformers import ProbeCallback

    callback = ProbeCallback(tmp_path / "run", stats, histogram, every=2)
    trainer(model, data, tmp_path / "out", callback, **options).train()
    trainer(twin, data, tmp_path / "out", **options).train()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert not hooked(model)
    check_run(tmp_path / "run", "fc", "fc.weight", 0, 2, 4)
    assert steps(tmp_path / "run" / "eval", "fc/output/mean") == [2, 4]
    assert callback.probe.schedule.lr.shape == (5, 2)  # it makes a group of what does not decay


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_resumed_training_of_transformers_goes_on_counting(data: TensorDataset, tmp_path: Path) -> None:
    """From the global step of the checkpoint; and an exception leaves nothing on the model after ``close()``."""
    pytest.importorskip("accelerate")
    from probe.integrations.transformers import ProbeCallback

    class Interrupt(pytest.importorskip("transformers").TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            if state.global_step == 3:
                raise ZeroDivisionError

    model, callback = Classifier(), ProbeCallback(tmp_path / "run", stats)
    options = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(ZeroDivisionError):
        trainer(model, data, tmp_path / "out", callback, Interrupt(), **options).train()
    callback.close()
    assert not hooked(model)
    assert steps(tmp_path / "run", "fc/output/mean") == [0, 1, 2]
    resumed = ProbeCallback(tmp_path / "again", stats)
    trainer(model, data, tmp_path / "out", resumed, **options).train(resume_from_checkpoint=True)
    check_run(tmp_path / "again", "fc", "fc.weight", 2, 3, 4)


def test_the_scaler_of_a_float16_training_of_transformers(tmp_path: Path) -> None:
    """It is accelerate's, kept at its optimizer; gradients are logged without its scale."""
    pytest.importorskip("transformers")
    from probe.integrations.transformers import ProbeCallback

    model, scaler = Classifier(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.scaler = scaler
    callback, state = ProbeCallback(tmp_path, stats), SimpleNamespace(global_step=0)
    callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
    out = model(torch.ones(2, 4), torch.tensor([0, 1]))
    gradients: list[torch.Tensor] = []
    out["logits"].register_hook(gradients.append)
    scaler.scale(out["loss"]).backward()
    scaler.step(optimizer)
    callback.on_train_end(None, state, None)
    assert scalars(tmp_path, "grad_scaler/scale") == [(0, 1024.0)]
    ((_, norm),) = scalars(tmp_path, "head/grad_output/norm")
    assert norm == pytest.approx(float(gradients[0].norm()) / 1024, rel=1e-5)


def lightning_module(fails_at: int = -1) -> Any:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(inplace=True), nn.Linear(16, 2))

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            if self.global_step == fails_at:
                raise ZeroDivisionError
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, number: int) -> None:
            self.net(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def fit(module: Any, data: TensorDataset, *callbacks: Any, **options: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    loader = DataLoader(data, 4)
    lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=5, limit_val_batches=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        **options,
    ).fit(module, loader, loader)  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_trainer_of_lightning(data: TensorDataset, tmp_path: Path) -> None:
    """Backward runs inside ``optimizer.step(closure)`` there; the training is the same."""
    module, twin = lightning_module(), lightning_module()
    from probe.integrations.lightning import ProbeCallback

    callback = ProbeCallback(tmp_path / "run", stats, histogram, every=2)
    fit(module, data, callback)
    fit(twin, data)
    assert all(map(torch.equal, module.parameters(), twin.parameters()))
    assert not hooked(module)
    check_run(tmp_path / "run", "net.0", "net.0.weight", 0, 2, 4)
    assert callback.probe.steps == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_training_of_lightning_that_fails(data: TensorDataset, tmp_path: Path) -> None:
    """What was logged is written, and nothing is left on the model."""
    module = lightning_module(fails_at=3)
    from probe.integrations.lightning import ProbeCallback

    with pytest.raises(ZeroDivisionError):
        fit(module, data, ProbeCallback(tmp_path / "run", stats))
    assert not hooked(module)
    assert steps(tmp_path / "run", "net.0/output/mean") == [0, 1, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_recipe_for_accelerate(data: TensorDataset, tmp_path: Path) -> None:
    """Its wrapped optimizer is taken as it is; steps are those of the update, after accumulation."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model, optimizer, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1), DataLoader(data, 4))
    with Board(tmp_path) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, stats)
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
    check_run(tmp_path, "0", "0.weight", 0, 1, 2)


@pytest.mark.parametrize(("name", "says"), [("transformers", "accelerate"), ("lightning", "lightning")])
def test_a_missing_library_is_told_with_what_to_install(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is installed: as if it were not."""
    real = builtins.__import__

    def absent(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return real(module, *args, **kwargs)

    monkeypatch.delitem(sys.modules, f"probe.integrations.{name}", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=f"pip install .*{says}"):
        importlib.import_module(f"probe.integrations.{name}")
