"""Health checks: what each one sees, what it must not take for a fault, and the way to the report and the board.

That each names a planted fault with its layer is in tests/test_health_corpus.py.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probe import Board, Kind, Probe, health, histogram, sketch
from probe.findings import Finding, Findings, Severity
from probe.health import modules, vitals
from probe.health.records import Fetch
from tests import reading, zoo


def mlp(*between: nn.Module, act: type[nn.Module] = nn.ReLU, width: int = 16) -> nn.Sequential:
    """``[B, 8]`` to three classes; layer ``"0"`` is linear, then an activation, what is given, and the last layer."""
    return nn.Sequential(nn.Linear(8, width), act(), *between, nn.Linear(width, 3))


def batch(size: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 8), torch.randint(0, 3, (size,))


def train(
    model: nn.Module,
    *checks: health.Check,
    optimizer: Any = None,
    steps: int = 8,
    size: int = 32,
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    before: Callable[[int], Any] = lambda step: None,
    after: Callable[[int], Any] = lambda step: None,
    **options: Any,
) -> Findings:
    """The findings of a short training on random data, by the checks given or by all."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    with Probe(model, optimizer=optimizer, observers=list(checks) or health.checks(), **options) as p:
        for step in range(steps):
            before(step)
            x, y = batch(size)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            after(step)
    return p.findings


def names(found: Findings) -> list[tuple[str, str]]:
    return [(each.check, each.layer) for each in found]


class Silent:
    """A writer that writes nothing."""

    def add_scalar(self, *args: Any) -> None: ...
    def add_text(self, *args: Any) -> None: ...


class Apply(nn.Module):
    """A module of a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# -- the report --------------------------------------------------------------------------------------------------------


def test_silence_when_all_is_well() -> None:
    """A sound training has no finding, and the report says so."""
    found = train(mlp())
    assert found == []
    assert str(found) == "nothing found (8 steps examined)"


def test_the_report_has_the_worst_first() -> None:
    """Errors before warnings, then what came first, then what is further beyond its threshold."""

    def finding(layer: str, severity: Severity, step: int = 0, measured: float = 2.0) -> Finding:
        return Finding(layer, "check", "what", measured, 1.0, "meaning", "advice", "source", step, severity)

    found = Findings(
        [
            finding("warning", Severity.WARNING),
            finding("later", Severity.ERROR, 5),
            finding("sooner", Severity.ERROR, 1),
            finding("further", Severity.ERROR, 1, 9.0),
            finding("notice", Severity.NOTICE),
        ]
    )
    assert [each.layer for each in found] == ["further", "sooner", "later", "warning", "notice"]
    text = str(found)
    assert text.startswith("5 findings, the worst first")
    for part in ("error: further: check (step 1)", "what: 9 (threshold 1)", "meaning: ", "try: advice", "rule: source"):
        assert part in text
    assert text.count("meaning: ") == 3  # what several say is said once a severity
    assert "<pre>" in found._repr_html_()


def test_excess_is_a_ratio_either_way() -> None:
    """Too small counts like too large; beyond zero is beyond measure."""

    def excess(measured: float, threshold: float) -> float:
        return Finding("", "", "", measured, threshold, "", "", "").excess

    assert excess(2.0, 1.0) == excess(1.0, 2.0) == 2.0
    assert excess(0.0, 0.0) == 1.0
    assert excess(1.0, 0.0) == excess(math.nan, 1.0) == math.inf


def test_findings_without_checks_are_refused() -> None:
    """An empty list would look like a clean bill of health."""
    with pytest.raises(AttributeError, match=r"health\.checks"):
        _ = Probe(mlp()).findings


def test_thresholds_are_arguments() -> None:
    """A check alone, or all of them with another threshold."""
    model = mlp()
    assert names(train(model, health.dead_units(share=0.0, samples=1, window=1))) == []
    with torch.no_grad():
        model[0].bias[:4] = -100
    assert names(train(model)) == []
    assert names(train(model, *health.checks(dead=0.2))) == [("dead units", "1")]
    with pytest.raises(TypeError, match="deadly"):
        health.checks(deadly=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="at least 1"):
        health.dead_units(window=0)


def test_checks_may_serve_several_probes() -> None:
    """They hold no state."""
    checks = health.checks()
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    assert names(train(model, *checks)) == [("NaN or Inf", "0")]
    assert names(train(mlp(), *checks)) == []


def test_a_check_of_ones_own() -> None:
    """A function of the last steps."""
    rule = health.Rule("wide", "it is wide", "make it narrow", "taste")

    def judge(seen: Any) -> Any:
        for pass_ in seen[-1].trained():
            for call in pass_.calls:
                width = next(iter(call.outputs.values())).shape[-1]
                if call.layer and width > 10:
                    yield rule.broken(seen[-1], call.layer, "width", width, 10)

    found = train(mlp(), health.Check("wide", judge, (Kind.OUTPUT,)))
    assert names(found) == [("wide", "0"), ("wide", "1")]
    assert found[0].measured == 16


# -- nothing is changed, nothing is waited for -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [zoo.ConvNet, zoo.Attention, zoo.Recurrent], ids=lambda make: make.__name__)
def test_training_is_bit_identical_under_checks(make: Any) -> None:
    """Parameters after some steps, and random numbers."""
    x = {"ConvNet": torch.randn(4, 3, 8, 8), "Attention": torch.randn(3, 5, 8), "Recurrent": torch.randn(2, 4, 3)}
    torch.manual_seed(1)
    models = [make() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, observers in zip(models, ([], health.checks()), strict=True):
        torch.manual_seed(2)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        with Probe(model, optimizer=optimizer, observers=observers):
            for _ in range(4):
                optimizer.zero_grad()
                zoo.loss(model(x[make.__name__])).backward()
                optimizer.step()
    for (name, a), (_, b) in zip(models[0].state_dict().items(), models[1].state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_steps_numbers_are_read_when_the_next_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """One deferred wait a step; none in a hook."""
    read: list[int] = []
    result = Fetch.result

    def remember(self: Fetch) -> health.Step:
        step = result(self)
        read.append(step.number)
        return step

    monkeypatch.setattr(Fetch, "result", remember)
    seen: list[list[int]] = []
    train(mlp(), steps=4, before=lambda step: seen.append(list(read)))
    assert seen == [[], [], [0], [0, 1]]
    assert read == [0, 1, 2, 3]


def test_what_is_held_is_bounded() -> None:
    """However long the training: the records of a window."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Probe(model, optimizer=optimizer, observers=health.checks()) as p:
        counts = []
        for step in range(40):
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            optimizer.step()
            if step in (20, 39):
                gc.collect()
                counts.append(sum(type(each) is health.Step for each in gc.get_objects()))
    assert counts[0] == counts[1] <= 15
    assert not p.findings or p.findings.steps == 40


def test_many_calls_and_passes_are_bounded_too() -> None:
    """A cell in a long loop, and more micro-batches than are measured: NaN is still told apart."""
    model = zoo.Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with Probe(model, optimizer=optimizer, observers=health.checks()) as p:
        for _ in range(2):
            for _ in range(12):
                model(torch.randn(2, 40, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert names(p.findings) == []
    with torch.no_grad():
        model.cell.bias_ih[0] = torch.nan
    with Probe(model, optimizer=optimizer, observers=health.checks()) as p:
        model(torch.randn(2, 40, 3)).sum().backward()
    assert names(p.findings) == [("NaN or Inf", "cell")]


# -- health.check ------------------------------------------------------------------------------------------------------


def test_check_leaves_everything_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters, gradients, buffers, modes, optimizer state and random numbers."""
    model = zoo.ConvNet()
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))
    before = zoo.fingerprint(model)
    found = health.check(model, F.cross_entropy, x, y, optimizer=optimizer)
    assert zoo.fingerprint(model) == before
    assert not optimizer.state
    assert "nothing found (10 steps examined)" in capsys.readouterr().out
    assert found == []


def test_check_takes_batches_in_every_form() -> None:
    """Input and target, several inputs, a mapping of keywords, and no target at all."""
    silent = {"report": None, "steps": 2}
    assert health.check(nn.Bilinear(3, 3, 2), F.mse_loss, *torch.randn(2, 4, 3), torch.randn(4, 2), **silent) == []
    hf = zoo.HFModel()
    ids = {"input_ids": torch.randint(0, 11, (4, 6))}
    optimizer = torch.optim.SGD(hf.parameters(), 0.01)
    assert health.check(hf, lambda out: out.logits.square().mean(), ids, optimizer=optimizer, **silent) == []
    assert health.check(mlp(), lambda out: out.square().mean(), batch()[0], **silent) == []
    with pytest.raises(TypeError, match="a batch"):
        health.check(mlp(), F.cross_entropy)


def test_check_steps_an_optimizer_that_calls_the_model() -> None:
    """LBFGS takes a closure."""
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    found = health.check(model, F.cross_entropy, *batch(), optimizer=optimizer, steps=3, report=None)
    assert (found, found.steps) == ([], 3)


def test_check_reports_what_is_wrong() -> None:
    """To whom one wants."""
    model = mlp()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    said: list[str] = []
    found = health.check(model, F.cross_entropy, *batch(), report=said.append)
    assert names(found) == [("dead units", "1")]
    assert said == [str(found)]


# -- the board, and the table ------------------------------------------------------------------------------------------


def test_log_writes_findings_and_marks_steps(tmp_path: Path) -> None:
    """As text at the step where each was found first, and how many there are at every observed step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Board(tmp_path) as board, Probe(model, optimizer=optimizer) as p:
        p.log(board, histogram, *health.checks(), every=2)
        for step in range(8):
            if step == 4:
                with torch.no_grad():
                    model[2].weight[0, 0] = torch.nan
            optimizer.zero_grad()
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            optimizer.step()
    assert names(p.findings) == [("NaN or Inf", "2")]
    assert p.findings.steps == 4
    assert reading.scalars(tmp_path, "health/findings") == [(0, 0), (2, 0), (4, 1), (6, 0)]
    assert reading.steps(tmp_path, "health/2/NaN or Inf/text_summary") == [4]
    assert reading.steps(tmp_path, "0/output/histogram") == [0, 2, 4]  # at 6 no value is finite


def test_the_table_marks_layers_with_findings() -> None:
    """``print(p)`` shows what is wrong where."""
    model = mlp()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    with Probe(model, observers=health.checks(), keep=1) as p:
        for _ in range(6):
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            p.step()
    marks = {row.name: row.mark for row in p.summary()}
    assert marks["1"] == "! dead units"


def test_findings_stay_when_the_log_is_removed() -> None:
    """And several logs' are merged."""
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan

    with Probe(model) as p:
        handle = p.log(Silent(), *health.checks())
        p.log(Silent(), *health.checks())
        model(batch()[0])
        handle.remove()
    assert names(p.findings) == [("NaN or Inf", "0")]


# -- NaN and Inf -------------------------------------------------------------------------------------------------------


def test_nan_comes_with_the_statistics_before_it() -> None:
    """And with who passes it on."""
    model = mlp(Apply(lambda x: x))

    def grow(step: int) -> None:
        with torch.no_grad():
            model[0].weight.mul_(10.0**step)

    (found,) = train(model, health.nonfinite_values(history=3), before=grow, steps=12)
    assert found.layer in ("0", "3")
    assert sum(line.startswith("step ") for line in found.details) == 3


def test_nan_of_an_operation_between_layers() -> None:
    """The layer that meets it first is named, and that it was in its input."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.log(self.first(x)))

    (found,) = train(Between())
    assert (found.check, found.layer) == ("NaN or Inf", "second")
    assert "between 'first' and this one" in found.meaning


def test_minus_infinity_as_a_mask_is_no_finding() -> None:
    """In what goes in, and in what comes out, as long as nothing else comes of it."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.mask, self.softmax = nn.Linear(8, 3), Apply(self.hide), nn.Softmax(-1)

        def hide(self, x: Tensor) -> Tensor:
            return x.masked_fill(torch.tensor([True, False, False]), -math.inf)

        def forward(self, x: Tensor) -> Tensor:
            return self.softmax(self.mask(self.score(x)))

    assert train(Masked(), loss=lambda out, y: (out[:, 1] - 0.3).square().mean()) == []


@pytest.mark.parametrize("planted", ["1", "3"])
def test_nan_in_backward_is_named_where_it_began(planted: str) -> None:
    """A derivative at zero that is not finite, after a sound forward."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model[int(planted)] = Apply(lambda x: F.relu(x) + (x - x.detach()).square().sqrt())
    (found,) = train(model)
    assert (found.check, found.layer) == ("NaN or Inf in gradients", planted)


def test_nan_in_backward_of_the_first_layer() -> None:
    """It hands nothing back; its parameters tell."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.weight.square().sum().sqrt()

    (found,) = train(nn.Sequential(Root(), nn.Linear(8, 3)))
    assert (found.check, found.layer) == ("NaN or Inf in gradients", "0")


def test_a_scaler_that_overflows_is_no_finding() -> None:
    """It skips the update and halves the scale; that is how it finds the largest one."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    with Probe(model, optimizer=optimizer, scaler=scaler, observers=health.checks()) as p:
        for _ in range(12):
            x, y = batch()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                out = model(x)
            scaler.scale(F.cross_entropy(out.float(), y)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() < 2.0**24
    assert p.steps > 4
    assert names(p.findings) == []


def test_updates_too_small_for_the_weights_are_not_stuck_because_a_scaler_scales() -> None:
    """What counts is the gradient without the scale."""
    model = mlp()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 1e-5), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with Probe(model, optimizer=optimizer, scaler=scaler, observers=health.stuck_parameters()) as p:
        for _ in range(4):
            x, y = batch()
            optimizer.zero_grad()
            scaler.scale(1e-3 * F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert p.findings.steps == 4
    assert names(p.findings) == []


# -- layers ------------------------------------------------------------------------------------------------------------


def test_dead_units_are_told_once_and_not_of_those_that_pass_them_on() -> None:
    """Pooling, flattening and dropout after a dead ReLU are not to blame."""
    model = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 8, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip
    with torch.no_grad():
        model[1].bias[:6] = -100
    (found,) = train(model, health.dead_units())
    assert (found.layer, found.measured) == ("2", 0.75)
    assert found.details == ("fed by '1'",)


def test_few_samples_prove_no_unit_dead() -> None:
    """A unit that fires once in ten samples is not dead because two samples did not fire it."""
    model = mlp(act=lambda: nn.Threshold(1.0, 0.0))  # type: ignore[arg-type]
    assert train(model, health.dead_units(share=0.1), size=2) == []


def test_constant_input_makes_no_layer_constant() -> None:
    """The layer that throws the difference away is to blame, not those before or after it."""
    model = mlp(nn.Linear(16, 16), Apply(lambda x: x.mean(0, keepdim=True) + 0 * x), nn.Linear(16, 16))
    (found,) = train(model, health.constant_outputs())
    assert found.layer == "3"
    x = torch.ones(4, 8)
    with Probe(mlp(), observers=health.constant_outputs()) as p:
        for _ in range(4):
            mlp()(x)
            p.step()
    assert p.findings == []


def test_an_encoding_of_positions_is_not_constant() -> None:
    """It looks at its input's shape only: no gradient goes through it, though one reaches what comes before."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.table.expand(len(x), -1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.positions, self.head = nn.Linear(8, 16), Positions(), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(x + self.positions(x))

    assert train(Model()) == []


def test_a_sure_classifier_is_not_saturated() -> None:
    """The last layer is left out; a hidden one is not."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid())
    with torch.no_grad():
        model[2].weight.mul_(1000)
    loss = lambda out, y: (out[:, 0] - y.clamp_max(1)).square().mean()  # noqa: E731
    assert train(model, health.saturation(), loss=loss) == []
    with torch.no_grad():
        model[0].weight.mul_(1000)
    assert names(train(model, health.saturation(), loss=loss)) == [("saturated", "1")]


@pytest.mark.parametrize("how", ["softmax", "dropout", "multihead", "qkv"])
def test_attention_is_seen_in_every_form(how: str) -> None:
    """Weights that pass a softmax or a dropout module, or are computed once more."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.qkv = nn.Linear(8, 24)
            self.softmax = nn.Softmax(-1) if how == "softmax" else None
            self.drop = nn.Dropout(0.0) if how == "dropout" else None

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
            scores = q @ k.transpose(-1, -2) / 2
            weights = scores.softmax(-1) if self.softmax is None else self.softmax(scores)
            weights = weights if self.drop is None else self.drop(weights)
            return (weights @ v).transpose(1, 2).flatten(2)

    model = nn.Sequential(nn.Linear(8, 8), zoo.Attention() if how == "multihead" else Attention(), nn.Linear(8, 3))
    weight = model[1].attn.in_proj_weight if how == "multihead" else model[1].qkv.weight
    run = lambda: names(  # noqa: E731
        train(
            nn.Sequential(Apply(lambda x: x[:, None] * torch.linspace(-1, 1, 6)[:, None]), model, Apply(last)),
            health.attention_entropy(),
        )
    )
    assert run() == []
    with torch.no_grad():
        weight[:16].mul_(1000)
    found = run()
    where = {"softmax": "1.1.softmax", "dropout": "1.1.drop", "multihead": "1.1.attn", "qkv": "1.1.qkv"}[how]
    assert ("attention collapsed", where) in found


def last(x: Tensor) -> Tensor:
    return x[:, -1]


def test_small_gradients_in_bfloat16_do_not_underflow() -> None:
    """Its range is float32's."""
    for dtype, expected in ((torch.bfloat16, []), (torch.float16, ["float16 underflow"])):
        model = mlp()

        def loss(out: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(out.float(), y) * 1e-5

        with torch.autocast("cpu", dtype):
            found = train(model, health.half_precision(), loss=loss)
        assert [each.check for each in found] == expected


def test_a_hook_that_copies_is_no_finding() -> None:
    """Nor is one whose tensor nobody writes to, nor one that keeps nothing."""
    kept: dict[str, Tensor] = {}
    keeps = {
        "clone": lambda m, a, o: kept.__setitem__("x", o.detach().clone()),
        "nothing": lambda m, a, o: None,
        "detach": lambda m, a, o: kept.__setitem__("x", o.detach()),
    }
    for how, hook in keeps.items():
        for inplace in (False, True):
            kept.clear()
            model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=inplace), nn.Linear(16, 3))
            model[0].register_forward_hook(hook)
            expected = [("overwritten capture", "0")] if how == "detach" and inplace else []
            assert names(train(model, health.overwritten_captures())) == expected, (how, inplace)


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_a_branch_without_gradient_beside_a_shortcut_is_no_finding() -> None:
    """What matters is whether the first layers are reached."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch, self.second = nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-7 * self.second(self.branch(self.first(x)))

    assert train(mlp(Residual(), Residual()), health.gradient_flow()) == []


def test_gradients_that_fade_layer_by_layer_name_the_first() -> None:
    """One layer that does it all is named itself; see the corpus."""
    layers = [each for _ in range(10) for each in (nn.Linear(16, 16), nn.Sigmoid())]
    (found,) = train(mlp(*layers, act=nn.Sigmoid), health.gradient_flow())
    assert (found.check, found.layer) == ("gradients vanishing", "0")
    assert "each layer multiplies" in found.details[0]


def test_gradients_that_one_place_cuts_name_it_beside_shortcuts() -> None:
    """Branches, each with little gradient beside its shortcut, are not taken for the place."""

    class Residual(nn.Module):
        def __init__(self, gain: float) -> None:
            super().__init__()
            self.branch, self.gain = nn.Linear(16, 16), gain

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gain * self.branch(x)

    small = Apply(lambda x: 1e-6 * x)
    model = mlp(Residual(1e-3), Residual(1e-3), small, nn.Linear(16, 16), Residual(1e-3))
    (found,) = train(model, health.gradient_flow())
    assert (found.check, found.layer) == ("gradients vanishing", "4")


def test_a_zero_initialised_branch_has_time_to_begin() -> None:
    """Its first gradient is exactly zero; it is no finding unless it stays so."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gain = nn.Linear(16, 16), nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gain * self.inner(x)

    assert train(mlp(Branch())) == []
    model = mlp(Branch())
    model[2].gain.requires_grad_(False)
    assert names(train(model)) == [("no gradient", "2.inner")]


def test_a_bias_that_cancels_in_the_loss_is_no_finding() -> None:
    """As the last one of a critic does, of which the difference of two means is taken."""
    assert train(mlp(), loss=lambda out, y: out[:16].mean() - out[16:].mean()) == []


@pytest.mark.filterwarnings("ignore:.* were never called")  # in the steps that are observed
def test_layers_that_are_skipped_at_times_are_no_finding() -> None:
    """As by LayerDrop, by experts, or by the heads of several tasks; nor those whose turn is in steps not observed."""

    class Heads(nn.Module):
        def __init__(self, turn: Callable[[int], int], number: int = 4) -> None:
            super().__init__()
            self.trunk, self.heads = nn.Linear(8, 16), nn.ModuleList(nn.Linear(16, 3) for _ in range(number))
            self.calls, self.turn = -1, turn

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.heads[self.turn(self.calls)](self.trunk(x))

    assert names(train(Heads(lambda call: call if call < 4 else 0), steps=16)) == []
    assert names(train(Heads(lambda call: call % 8, 8), steps=12)) == []  # the last one's first turn is the eighth step
    model = Heads(lambda call: call % 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Probe(model, optimizer=optimizer) as p:
        p.log(Silent(), *health.checks(), every=4)
        for _ in range(24):
            optimizer.zero_grad()
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            optimizer.step()
    assert names(p.findings) == []
    assert p.findings.steps == 6


def test_an_expert_that_is_given_no_sample_is_told_as_such() -> None:
    """It is called, but the graph is not cut after it."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.trunk(x)
            chosen = torch.arange(len(x)) % 2  # the third one never
            for i, expert in enumerate(self.experts):
                rows = (chosen == i).nonzero()[:, 0]
                h = h.index_add(0, rows, expert(h[rows]))
            return h

    (finding,) = train(Experts(), steps=12)
    assert (finding.check, finding.layer, finding.step) == ("no gradient", "experts.2", 9)
    assert finding.meaning.startswith("it takes no part in the forward pass")


def test_frozen_layers_are_meant_to_have_no_gradient() -> None:
    """They need none."""
    model = mlp()
    model[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert train(model, optimizer=torch.optim.SGD(trained, 0.1)) == []


def test_gradients_that_are_zeroed_before_the_step_are_told() -> None:
    """Every weight has a gradient and never moves: the advice names the usual reason first."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Probe(model, optimizer=optimizer, observers=health.checks()) as p:
        for _ in range(4):
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            optimizer.zero_grad()
            optimizer.step()
    assert {each.check for each in p.findings} == {"never moves"}
    assert all(each.advice.startswith("is zero_grad() called between") for each in p.findings)


def test_rows_that_differ_are_no_symmetry() -> None:
    """Equal gradients alone, as a sum of the outputs gives, are none: the weights differ."""
    model = nn.Sequential(nn.Linear(8, 4))
    assert train(model, health.symmetric_weights(), loss=lambda out, y: out.sum(1).square().mean()) == []
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    found = train(model, health.symmetric_weights(), loss=lambda out, y: out.sum(1).square().mean())
    assert names(found) == [("symmetry", "0")]


# -- parameters and optimizers -----------------------------------------------------------------------------------------


def test_warm_up_and_decay_are_no_findings() -> None:
    """Rates that begin at zero, or end near it."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for rate in (lambda n: n / 20, lambda n: 0.5**n):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        found = train(model, optimizer=optimizer, after=lambda step, schedule=schedule: schedule.step(), steps=24)
        assert found == []


def test_weights_that_start_at_zero_may_grow() -> None:
    """Their first updates are large beside them."""
    model = mlp()
    nn.init.zeros_(model[2].weight)
    assert train(model, health.update_sizes(), optimizer=torch.optim.Adam(model.parameters(), 0.05)) == []


def test_what_another_optimizer_updates_is_no_finding() -> None:
    """Though the probe does not know that one."""
    model = mlp()
    mine, other = torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.SGD(model[2].parameters(), 0.1)
    assert train(model, optimizer=mine, after=lambda step: other.step()) == []
    assert names(train(model, optimizer=mine)) == [("in no optimizer", "2")]


def test_groups_go_by_their_names() -> None:
    """The optimizer's own where it has them; several optimizers are told apart."""
    model = mlp()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "name": "all", "lr": 0.0}])
    assert names(train(model, optimizer=optimizer)) == [("learning rate is zero", "all")]
    halves = [torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.SGD(model[2].parameters(), 0.0)]
    with Probe(model, optimizer=halves, observers=health.checks()) as p:
        for _ in range(4):
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            for each in halves[::-1]:
                each.step()
    assert names(p.findings) == [("learning rate is zero", "optimizer1/group0")]


# -- modes -------------------------------------------------------------------------------------------------------------


def test_one_pass_without_gradient_between_steps_is_no_evaluation() -> None:
    """A GAN makes its samples so, also several in every step; two in a row, or one under a tag, are an evaluation."""
    model = mlp(nn.BatchNorm1d(16))

    def passes(count: int, every: int = 1) -> Findings:
        @torch.no_grad()
        def look(step: int) -> None:
            for _ in range(count if step % every == 0 else 0):
                model(batch()[0])

        return train(model, after=look)

    assert passes(1) == []
    assert passes(5) == []
    assert names(passes(2, every=3)) == [("train mode in evaluation", "")]
    with Probe(model, observers=health.checks()) as p, p.tag("valid"), torch.no_grad():
        model(batch()[0])
    assert names(p.findings) == [("train mode in evaluation", "")]


def test_frozen_batch_norm_in_eval_mode_is_meant() -> None:
    """As in fine-tuning with small batches, where its statistics fit."""
    model = mlp(nn.BatchNorm1d(16))
    train(model, steps=40)
    model[2].eval().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert train(model, optimizer=torch.optim.SGD(trained, 0.01)) == []


def test_a_small_batch_is_set_beside_running_statistics_as_torch_computes_them() -> None:
    """The variance of a batch of two is the unbiased one that ``running_var`` is an average of."""
    norm, x = nn.BatchNorm1d(3, momentum=1.0), torch.randn(2, 3)
    norm(x)
    facts = modules.input_facts(norm, [("", x)])
    assert float(facts["scale"]) == pytest.approx(1.0, abs=1e-4)
    assert float(facts["shift"]) == pytest.approx(0.0, abs=1e-4)


def test_dropout_of_nothing_may_sleep() -> None:
    """With p=0 eval mode makes no difference."""
    model = mlp(nn.Dropout(0.0))
    model[2].eval()
    assert train(model) == []


# -- losses ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_what_backward_was_called_on() -> None:
    """Whatever it is called, and the mean over micro-batches."""
    seen: list[float | None] = []

    def judge(steps: Any) -> Any:
        seen.append(steps[-1].loss)
        return ()

    model, loss = mlp(), []
    with Probe(model, observers=health.Check("loss", judge, (Kind.GRAD_OUTPUT,))) as p:
        for _ in range(2):
            for _ in range(3):
                anything = model(batch()[0]).square().sum()
                loss.append(anything.item())
                torch.autograd.backward(anything)
            p.step()
    assert seen == pytest.approx([sum(loss[:3]) / 3, sum(loss[3:]) / 3])


def test_a_loss_that_runs_away_jumps_once() -> None:
    """What follows the first jump is its consequence."""
    model = mlp()
    scale = [1.0]

    def grow(step: int) -> None:
        scale[0] *= 3 if step > 12 else 1

    found = train(model, health.loss_spikes(), loss=lambda out, y: scale[0] * F.cross_entropy(out, y), before=grow,
                  optimizer=torch.optim.SGD(model.parameters(), 1e-4), steps=24)  # fmt: skip
    assert len(found) == 1


def test_a_step_has_one_loss_however_many_passes_it_has() -> None:
    """A script that never steps, as for saliency maps, holds one number of all of them."""
    model = mlp()
    with Probe(model, observers=health.checks()) as p:
        sizes = []
        for _ in range(60):
            model(batch()[0]).sum().backward()
            gc.collect()
            sizes.append(sum(type(each) is Tensor for each in gc.get_objects()))
        assert sizes[-1] == sizes[20]
        p.step()


def test_noise_is_no_spike() -> None:
    """A loss that varies by a few tens of percent, around any level."""
    torch.manual_seed(3)
    model = mlp()
    noisy = lambda out, y: F.cross_entropy(out, y) * (0.7 + 0.6 * torch.rand(()))  # noqa: E731
    assert train(model, health.loss_spikes(), loss=noisy, steps=60) == []


# -- odd models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", zoo.Structuring.HOW)
def test_structured_outputs(how: str) -> None:
    """Nothing is found in them, and nothing fails."""
    model = zoo.Structured(how)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with Probe(model, optimizer=optimizer, observers=health.checks()) as p:
        for _ in range(5):
            optimizer.zero_grad()
            zoo.loss(model(torch.randn(6, 4))).backward()
            optimizer.step()
    assert names(p.findings) == []


def test_checkpointing_inference_and_empty_batches() -> None:
    """Recomputation is no new call; inference mode counts no versions; no sample, no statistics."""
    model = mlp(nn.Linear(16, 16))
    with Probe(model, observers=health.checks()) as p:
        for reentrant in (False, True):
            hidden = checkpoint(model[:3], batch()[0].requires_grad_(), use_reentrant=reentrant)
            model[3](hidden).sum().backward()
            p.step()
        with torch.inference_mode():
            model(batch()[0])
        model(torch.zeros(0, 8)).sum().backward()
    assert names(p.findings) == []


def test_transforms_of_torch_func() -> None:
    """What they wrap is not read as if it were a batch, and fails nothing."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(1), nn.Linear(40, 4), nn.BatchNorm1d(4).eval(), nn.Sigmoid())
    parameters = dict(model.named_parameters())

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().mean()

    gradients = torch.func.grad(loss)
    each = torch.func.vmap(gradients, in_dims=(None, 0), randomness="different")
    with Probe(model, observers=health.checks()) as p:
        for _ in range(3):
            gradients(parameters, torch.randn(5, 8))
            each(parameters, torch.randn(6, 5, 8))
            p.step()
    assert names(p.findings) == []


def test_copies_of_the_model_are_not_observed() -> None:
    """Nor does a copy hold what checks saw."""
    model = mlp()
    with Probe(model, observers=health.checks()) as p:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[0].weight[0, 0] = torch.nan
        twin(batch()[0])
        model(batch()[0])
    assert p.findings == []


@pytest.mark.parametrize("size", [(6, 3), (6, 3, 4), (300, 5, 9, 9)])  # small ones wait for others, and are looked at
def test_units_without_a_zero_are_alive_without_a_look(size: tuple[int, ...]) -> None:
    x = torch.randn(size)
    seen = vitals.alive(x, None)["alive"]
    assert seen.all()
    assert torch.equal(vitals.alive(x, sketch.of(x))["alive"], seen)
    assert torch.equal(vitals.alive(x, sketch.Pool().of(x))["alive"], seen)
    x.select(-1 if len(size) == 3 else 1, 1).zero_()
    dead = vitals.alive(x, sketch.of(x))["alive"]
    assert dead.tolist() == [unit != 1 for unit in range(len(seen))]
