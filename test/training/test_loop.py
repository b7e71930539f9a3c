"""The loop that trainings share, on a network of one weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.training.loop import LOG_EVERY, CsvLog, TrainingLoop, file_stamp, state_stamp


@dataclass(frozen=True)
class Data:
    slope: float = 3.0


@dataclass(frozen=True)
class Recipe:
    iterations: int = 70
    learning_rate: float = 0.1
    seed: int = 0
    data: Data = field(default_factory=Data)


class Line:
    """Fits ``slope * x``; counts the batches it makes, and stops like Ctrl-C before batch ``stop_at``."""

    def __init__(self, recipe: Recipe, output: Path, **options: object) -> None:
        self.recipe = recipe
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.net.weight)
        self.optimizer = torch.optim.SGD(self.net.parameters(), recipe.learning_rate, momentum=0.5)
        self.checkpoints: list[int] = []
        self.loop = TrainingLoop(
            output,
            recipe,
            {"net": self.net, "optimizer": self.optimizer},
            title="line",
            panels=(("total",), ("error",)),
            may_change=("iterations",),
            **{"checkpoint_every": 25, **options},  # type: ignore[arg-type]
        )

    def batches(self, stop_at: int | None) -> Iterator[Tensor]:
        for k in range(self.loop.done, self.recipe.iterations):
            if k == stop_at:
                raise KeyboardInterrupt
            yield torch.rand(8, 1, generator=torch.Generator().manual_seed(k))

    def step(self, x: Tensor) -> dict[str, Tensor]:
        loss = (self.net(x) - self.recipe.data.slope * x).square().mean()
        self.loop.descend(self.optimizer, loss)
        return {"total": loss}

    def at_checkpoint(self) -> dict[str, float]:
        self.checkpoints.append(self.loop.done)
        return {"error": abs(self.net.weight.item() - self.recipe.data.slope)}

    def run(self, stop_at: int | None = None) -> Line:
        self.loop.run(self.batches(stop_at), self.step, self.at_checkpoint)
        return self


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no curve where none is looked at: that takes longer than all the steps."""
    if "draws" not in request.node.name:
        monkeypatch.setattr(CsvLog, "plot", lambda *_: None)


def test_it_learns_logs_and_draws(tmp_path: Path) -> None:
    line = Line(Recipe(), tmp_path / "new" / "run").run()
    assert line.net.weight.item() == pytest.approx(3.0, abs=0.05)
    assert line.checkpoints == [25, 50, 70]
    assert line.loop.done == 70
    assert line.loop.seconds > 0
    rows = CsvLog(tmp_path / "new/run/log.csv", ("total", "error"), 70).rows()
    assert [int(row["iteration"]) for row in rows if row["total"]] == [20, 40, 60]
    assert [int(row["iteration"]) for row in rows if row["error"]] == [25, 50, 70]
    assert float(rows[-1]["error"]) < float(rows[1]["error"])
    assert (tmp_path / "new/run/curve.png").stat().st_size > 1000


def test_a_resumed_run_equals_an_uninterrupted_one_with_its_log(tmp_path: Path) -> None:
    whole = Line(Recipe(), tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        Line(Recipe(), tmp_path / "parts").run(stop_at=47)
    parts = Line(Recipe(), tmp_path / "parts")
    assert parts.loop.done == 25
    assert parts.loop.seconds > 0
    parts.run()
    assert torch.equal(parts.net.weight, whole.net.weight)
    assert (tmp_path / "parts/log.csv").read_text() == (tmp_path / "whole/log.csv").read_text()


def test_it_draws_logs_whose_iterations_were_rounded(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("iteration,total\n20,2\n1.2342e+05,1\n")
    CsvLog(tmp_path / "log.csv", ("total",), 123_420).plot(tmp_path / "curve.png", (("total",),))
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_finished_run_does_nothing_more_and_can_be_made_longer(tmp_path: Path) -> None:
    Line(Recipe(iterations=30), tmp_path).run()
    assert Line(Recipe(iterations=30), tmp_path).run().checkpoints == []
    assert Line(Recipe(iterations=60), tmp_path).run().checkpoints == [50, 60]


def test_a_run_that_is_further_than_asked_for_is_refused(tmp_path: Path) -> None:
    Line(Recipe(iterations=30), tmp_path).run()
    with pytest.raises(InputError, match="has 30 iterations behind it, --iterations is 20: choose another output folder"):
        Line(Recipe(iterations=20), tmp_path)


def test_other_recipes_are_refused_by_field(tmp_path: Path) -> None:
    Line(Recipe(), tmp_path).run()
    with pytest.raises(InputError, match=r"another recipe \(learning_rate 0.1 instead of 0.2; data.slope 3.0 instead of 4.0\)"):
        Line(Recipe(learning_rate=0.2, data=Data(4.0)), tmp_path)


def test_checkpoints_without_recipe_or_with_an_older_one_are_read(tmp_path: Path) -> None:
    Line(Recipe(), tmp_path).run()
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    older = {name: value for name, value in state.items() if name not in ("recipe", "seconds", "recent", "done")} | {"iteration": 50}
    torch.save(older, path)
    assert Line(Recipe(learning_rate=0.2), tmp_path).loop.done == 50
    torch.save({**older, "recipe": {"iterations": 70, "learning_rate": 0.1, "seed": 0}}, path)
    assert Line(Recipe(), tmp_path).loop.done == 50
    with pytest.raises(InputError, match=r"data.slope 3.0 instead of 4.0"):
        Line(Recipe(data=Data(4.0)), tmp_path)


def test_damaged_checkpoints_and_those_of_another_network_are_refused(tmp_path: Path) -> None:
    line = Line(Recipe(), tmp_path).run()
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "net": nn.Linear(2, 1).state_dict()}, path)
    with pytest.raises(InputError, match="of another network"):
        Line(Recipe(), tmp_path)
    torch.save({"recipe": asdict(line.recipe), "net": state["net"]}, path)
    with pytest.raises(InputError, match=r"of another network.*'optimizer'"):
        Line(Recipe(), tmp_path)
    path.write_bytes(b"half a file")
    with pytest.raises(InputError, match="cannot be read, delete it"):
        Line(Recipe(), tmp_path)


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    line = Line(replace(Recipe(), learning_rate=7.0), tmp_path)
    with pytest.raises(InputError, match=r"the loss is nan at iteration 0: lower the learning rate \(7.0\)"):
        line.loop.descend(line.optimizer, line.net(torch.tensor([[torch.nan]])).sum())
    assert line.net.weight.item() == 0.0


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    line = Line(Recipe(), tmp_path)
    line.loop.descend(line.optimizer, line.net(torch.tensor([[1000.0]])).sum(), clip_norm=2.0)
    assert line.net.weight.item() == pytest.approx(-0.2, rel=1e-4)


def test_checkpoints_by_time(tmp_path: Path) -> None:
    often = Line(Recipe(iterations=3), tmp_path / "often", checkpoint_every=None, checkpoint_minutes=0.0).run()
    assert often.checkpoints == [1, 2, 3]
    seldom = Line(Recipe(iterations=3), tmp_path / "seldom", checkpoint_every=None, checkpoint_minutes=60.0).run()
    assert seldom.checkpoints == [3]


def test_further_processes_write_nothing(tmp_path: Path) -> None:
    line = Line(Recipe(iterations=LOG_EVERY), tmp_path, writes=False).run()
    assert line.loop.done == LOG_EVERY
    assert list(tmp_path.iterdir()) == []


def test_log_of_other_columns_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("iteration,seconds,total\n20,1.5,0.25\n40,3,0.125\n")
    log = CsvLog(tmp_path / "log.csv", ("total", "recall"), 20)
    log.write(123_456, {"recall": 0.5, "total": float("nan")})
    assert (tmp_path / "log.csv").read_text().split() == ["iteration,total,recall", "20,0.25,", "123456,,0.5"]


def test_runs_that_began_from_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    first = {"init": file_stamp(tmp_path / "a"), "data": "12 frames"}
    Line(Recipe(), tmp_path / "run", origin=first).run()
    assert Line(Recipe(), tmp_path / "run", origin=first).loop.done == 70
    with pytest.raises(InputError, match=f"init {file_stamp(tmp_path / 'a')} instead of none"):
        Line(Recipe(), tmp_path / "run", origin={**first, "init": file_stamp(None)})
    with pytest.raises(InputError, match=r"began from something else .*12 frames instead of 13 frames"):
        Line(Recipe(), tmp_path / "run", origin={**first, "data": "13 frames"})
    # A checkpoint that says nothing is taken at its word.
    Line(Recipe(), tmp_path / "old").run()
    assert Line(Recipe(), tmp_path / "old", origin=first).loop.done == 70


def test_the_stamp_of_weights_is_of_names_and_values_in_any_order() -> None:
    first, second = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)
    stamp = state_stamp({"a": first, "b": second})
    assert stamp == state_stamp({"b": second.clone(), "a": first.T.contiguous().T})
    others = [{"a": first}, {"a": first, "c": second}, {"a": first + 1, "b": second}, {"a": first, "b": second * 2}, None]
    assert len({stamp, *map(state_stamp, others)}) == 6
