"""FFRTrainer: the Hugging Face Trainer takes the steps of a plain loop with FeatureFlow."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_models import Tower, outputs, trained
from regularizers import Ridge
from torch import Tensor, nn
from torch.utils.data import Dataset

transformers = pytest.importorskip("transformers", reason="needs ffr-ext[hf]")
pytest.importorskip("accelerate", reason="needs ffr-ext[hf]")

from ffr_ext import FeatureFlow, ffr_loss  # noqa: E402
from ffr_ext.trainers import FFRTrainer, FFRTrainerMixin  # noqa: E402

OPTIONS: dict[str, Any] = {"gradient": 2.0, "curvature": 1.0, "backend": "reference"}


class Samples(Dataset):
    def __init__(self) -> None:
        self.x, self.y = Tower.data()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class PerBatchLoss(nn.Module):
    """The mean over its batch: the Trainer divides it by the number of micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tower()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class WholeBatchLoss(PerBatchLoss):
    """Normalised over the accumulated batch by itself, as language models do; the Trainer leaves it alone."""

    def forward(
        self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        logits = self.net(x)
        total = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return {
            "loss": total / (len(x) if num_items_in_batch is None else num_items_in_batch),
            "logits": logits,
        }


def make_trainer(
    model: nn.Module, folder: Path, micro_batches: int = 1, epochs: int = 3, **options: Any
) -> FFRTrainer:
    settings = {"save_strategy": "no", **options.pop("settings", {})}
    return FFRTrainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=16 // micro_batches,
            gradient_accumulation_steps=micro_batches,
            max_grad_norm=0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            lr_scheduler_type="constant",
            **settings,
        ),
        train_dataset=Samples(),
        eval_dataset=Samples(),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
        ffr_layers=options.pop("layers", "auto"),
        ffr_options={**OPTIONS, **options.pop("options", {})},
        **options,
    )


def assert_same_weights(model: Any, truth: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, value in model.net.state_dict().items():
        torch.testing.assert_close(value, truth[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [PerBatchLoss, WholeBatchLoss])
def test_steps_are_those_of_a_plain_loop_whatever_the_accumulation(
    tmp_path: Path, kind: Any, micro_batches: int
) -> None:
    model = kind()
    truth = trained(copy.deepcopy(model.net), 3, **OPTIONS)
    make_trainer(model, tmp_path, micro_batches).train()
    assert_same_weights(model, truth)


def test_evaluation_has_no_penalty_and_no_hook_stays(tmp_path: Path) -> None:
    model = PerBatchLoss()
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    metrics = trainer.evaluate()
    x, y = Tower.data()
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(
            float(nn.functional.cross_entropy(model.net(x), y)), rel=1e-5
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_made_by_model_init_is_followed(tmp_path: Path) -> None:
    start = PerBatchLoss()
    truth = trained(copy.deepcopy(start.net), 3, lr=0.1, **OPTIONS)
    trainer = FFRTrainer(
        model_init=lambda: copy.deepcopy(start),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=16,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Samples(),
        ffr_options=OPTIONS,
    )
    trainer.train()
    assert_same_weights(trainer.model, truth)


def test_penalty_and_terms_are_logged(tmp_path: Path) -> None:
    trainer = make_trainer(PerBatchLoss(), tmp_path, epochs=1)
    trainer.train()
    logs = trainer.state.log_history[0]
    lengths = [logs[f"ffr_length_{i}"] for i in range(3)]
    curvatures = [logs[f"ffr_curvature_{i}"] for i in range(2)]
    assert logs["ffr_penalty"] == pytest.approx(2 * sum(lengths) + sum(curvatures), rel=1e-5)
    assert logs["ffr_factor"] == 1


def test_a_schedule_continues_after_resuming_from_a_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ffr_schedule": {"ramp": 4}, "settings": {"save_strategy": "epoch"}}
    whole = make_trainer(PerBatchLoss(), tmp_path / "a", epochs=4, **copy.deepcopy(options))
    start = copy.deepcopy(whole.model)
    whole.train()
    first = make_trainer(copy.deepcopy(start), tmp_path / "b", epochs=2, **copy.deepcopy(options))
    first.train()
    second = make_trainer(copy.deepcopy(start), tmp_path / "b", epochs=4, **copy.deepcopy(options))
    second.train(resume_from_checkpoint=True)
    factors = [entry["ffr_factor"] for entry in second.state.log_history if "ffr_factor" in entry]
    assert factors == [0.25, 0.5, 0.75, 1.0]
    assert_same_weights(second.model, whole.model.net.state_dict())


def small_vit() -> Any:
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


class Pictures(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.full((1, 8, 8), index / 16), "labels": torch.tensor(index % 3)}


def vit_trainer(model: Any, folder: Path, use_reentrant: bool | None) -> FFRTrainer:
    checkpointing = {} if use_reentrant is None else {"use_reentrant": use_reentrant}
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
    )
    return FFRTrainer(model=model, args=arguments, train_dataset=Pictures(), ffr_options=OPTIONS)


def test_auto_finds_the_layers_of_a_vit(tmp_path: Path) -> None:
    trainer = vit_trainer(small_vit(), tmp_path, None)
    assert len(trainer.flow.layers) == 3
    trainer.train()
    assert all(entry["ffr_penalty"] > 0 for entry in trainer.state.log_history[:2])


@pytest.mark.skipif(
    "__call__" in vars(transformers.modeling_layers.GradientCheckpointingLayer),
    reason="this transformers checkpoints the call of a block, hooks included",
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reentrant_checkpointing_hides_what_is_inside_a_block_and_not_the_block() -> None:
    def gradients(layers: Any, use_reentrant: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = small_vit().train()
        if use_reentrant:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with FeatureFlow(model, layers) as flow:
            model(pixel_values=torch.linspace(-1, 1, 128).view(2, 1, 8, 8))
            flow.loss().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for plain, checkpointed in zip(gradients("auto", False), gradients("auto", True), strict=True):
        torch.testing.assert_close(checkpointed, plain)

    def inside(name: str, module: Any) -> bool:
        return name.endswith(".attention")

    assert gradients(inside, False)
    with pytest.raises(RuntimeError, match=r"attention'.*without autograd.*use_reentrant=False"):
        gradients(inside, True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_steps_or_an_error_with_the_advice(
    tmp_path: Path, use_reentrant: bool
) -> None:
    plain = vit_trainer(small_vit(), tmp_path / "plain", None)
    model = copy.deepcopy(plain.model)
    plain.train()
    trainer = vit_trainer(model, tmp_path / "checkpointed", use_reentrant)
    try:
        trainer.train()
    except RuntimeError as error:
        # transformers 4 checkpoints the call of a layer, hooks included; transformers 5 its forward, hooks
        # excluded.
        if not use_reentrant or "use_reentrant=False" not in str(error):
            raise
        return
    for (name, a), b in zip(model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# --- losses that people write ---------------------------------------------------------------------


class TwoCalls(transformers.Trainer):
    """Two views in one step, as R-Drop, SimCSE and reward models have, beside a reference without autograd."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        assert not return_outputs, "the loss alone, as some trainers have it"
        with torch.no_grad():
            model(**inputs)
        first, second = model(**inputs), model(**self.second(inputs))
        return first["loss"] + second["loss"]

    @staticmethod
    def second(inputs: Any) -> Any:
        return {**inputs, "x": inputs["x"].flip(1)}


class FFRTwoCalls(FFRTrainerMixin, TwoCalls):
    pass


def fit(trainer_class: Any, model: nn.Module, folder: Path, micro_batches: int = 1, **options: Any) -> Any:
    settings = {"logging_steps": 1, "max_grad_norm": 0, "num_train_epochs": 3, **options.pop("settings", {})}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **settings,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=Samples(), optimizers=(optimizer, None), **options
    )
    trainer.train()
    return trainer


def test_several_calls_in_one_loss_are_all_penalised_also_where_the_trainer_returns_the_loss_alone(
    tmp_path: Path,
) -> None:
    model = PerBatchLoss()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    batch = dict(zip(("x", "labels"), Tower.data(), strict=True))
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for inputs in (batch, TwoCalls.second(batch)):
            features = outputs(twin.net.layers, inputs["x"])
            logits = twin.net.head(features[-1])
            loss = (
                loss + nn.functional.cross_entropy(logits, inputs["labels"]) + ffr_loss(features, **OPTIONS)
            )
        loss.backward()
        optimizer.step()
    fit(FFRTwoCalls, model, tmp_path, ffr_options=OPTIONS)
    assert_same_weights(model, twin.net.state_dict())


def test_a_schedule_that_stops_lets_the_training_go_on(tmp_path: Path) -> None:
    model = PerBatchLoss()
    truth = copy.deepcopy(model.net)
    truth.load_state_dict(trained(truth, 2, **OPTIONS))
    trained(truth, 2, gradient=0.0, curvature=0.0, backend="reference")
    trainer = fit(
        FFRTrainer,
        model,
        tmp_path,
        ffr_options=OPTIONS,
        ffr_schedule={"stop": 2},
        settings={"num_train_epochs": 4},
    )
    assert_same_weights(model, truth.state_dict())
    logged = [entry for entry in trainer.state.log_history if "ffr_factor" in entry]
    assert [entry["ffr_factor"] for entry in logged] == [1, 1, 0, 0]
    assert ["ffr_penalty" in entry for entry in logged] == [True, True, False, False]


# --- other regularizers ---------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("clip", [0, 0.1], ids=["not clipped", "clipped"])
def test_a_penalty_of_weights_is_added_once_per_step_before_clipping(
    tmp_path: Path, clip: float, micro_batches: int
) -> None:
    model = PerBatchLoss()
    twin = copy.deepcopy(model)
    optimizer, ridge = torch.optim.SGD(twin.parameters(), lr=0.1), Ridge(twin.net, threshold=0.05)
    x, y = Tower.data()
    for _ in range(3):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(twin.net(x), y) + ridge.loss()).backward()
        if clip:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        optimizer.step()
        ridge.step()
    trainer = fit(
        FFRTrainer,
        model,
        tmp_path,
        micro_batches,
        ffr_regularizers=lambda model: Ridge(model.net, threshold=0.05),
        settings={"max_grad_norm": clip},
    )
    assert (trainer.regularizers[0].added, trainer.regularizers[0].stepped) == (3, 3)
    assert_same_weights(model, twin.net.state_dict())
    assert "ffr_Ridge_head.weight" in trainer.state.log_history[0]


def test_a_flow_and_a_penalty_of_weights_go_together(tmp_path: Path) -> None:
    model = PerBatchLoss()
    twin = copy.deepcopy(model)
    optimizer, ridge = torch.optim.SGD(twin.parameters(), lr=0.1), Ridge(twin.net)
    x, y = Tower.data()
    with FeatureFlow(twin.net, **OPTIONS) as flow:
        for _ in range(3):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(twin.net(x), y) + flow.loss() + ridge.loss()).backward()
            optimizer.step()
    both = [lambda model: FeatureFlow(model, **OPTIONS), lambda model: Ridge(model.net)]
    trainer = fit(FFRTrainer, model, tmp_path, ffr_regularizers=both)
    assert_same_weights(model, twin.net.state_dict())
    assert {"ffr_penalty", "ffr_length_0", "ffr_Ridge_head.weight"} <= set(trainer.state.log_history[0])


def test_wrong_regularizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ffr_regularizers: expected them alone"):
        fit(FFRTrainer, PerBatchLoss(), tmp_path, ffr_regularizers=Ridge, ffr_options=OPTIONS)
    with pytest.raises(ValueError, match="ffr_regularizers: Ridge is of another model"):
        fit(FFRTrainer, PerBatchLoss(), tmp_path, ffr_regularizers=Ridge(Tower()))
